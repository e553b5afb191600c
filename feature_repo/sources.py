"""Where events and the history of features are found: Kafka topics and Parquet logs under MILLRACE_HOME."""

import os
from datetime import timedelta

from feast import FileSource, KafkaSource
from feast.data_format import JsonFormat, ParquetFormat

if not os.environ.get("MILLRACE_HOME"):
    raise RuntimeError(
        'MILLRACE_HOME is not set: run `eval "$(millrace env)"` first, or set it to the state\'s folder.'
    )


def offline_log(view: str) -> FileSource:
    """The Parquet parts logged for one view; a glob, because Feast's duckdb store refuses a bare folder."""
    return FileSource(
        name=f"{view}_log",
        path=f"{os.environ['MILLRACE_HOME']}/features/offline/{view}/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )


edits = KafkaSource(
    name="edits",
    topic="edits",
    kafka_bootstrap_servers=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9092"),
    message_format=JsonFormat(schema_json="time timestamp, user string, added bigint, deleted bigint"),
    timestamp_field="time",
    watermark_delay_threshold=timedelta(minutes=5),
    batch_source=offline_log("editor_activity"),
    description="Every edit as it is saved, keyed by user.",
)

utterance_audio_log = offline_log("utterance_audio")
