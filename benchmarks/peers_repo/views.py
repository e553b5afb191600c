"""One view for each set of windows in windows.json (length and slide in seconds), over the same topic."""

import json
import os
from datetime import timedelta
from pathlib import Path

from feast import Entity, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String

WINDOWS = json.loads(Path(__file__).with_name("windows.json").read_text())
AGGREGATES = {"added": ("count", "sum", "mean", "min", "max", "std"), "score": ("mean", "min", "max", "std")}

editor = Entity(name="editor", join_keys=["user"], value_type=ValueType.STRING)


def _features(windows: list[list[int]]) -> list[tuple[str, str, str, timedelta, timedelta]]:
    return [
        (f"{function}_{column}_{length}_{slide}", column, function, timedelta(seconds=length), timedelta(seconds=slide))
        for length, slide in windows
        for column, functions in AGGREGATES.items()
        for function in functions
    ]


def _view(name: str, windows: list[list[int]]) -> StreamFeatureView:
    log = FileSource(
        name=f"{name}_log",
        path=f"{os.environ['MILLRACE_HOME']}/features/offline/{name}/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    source = KafkaSource(
        name=f"{name}_edits",
        topic=os.environ["PEERS_TOPIC"],
        kafka_bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        message_format=JsonFormat(schema_json="time timestamp, user string, added bigint, score double"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(0),
        batch_source=log,
    )
    features = _features(windows)
    return StreamFeatureView(
        name=name,
        entities=[editor],
        ttl=timedelta(days=1),
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(name=feature, column=column, function=function, time_window=length, slide_interval=slide)
            for feature, column, function, length, slide in features
        ],
        schema=[
            Field(name="user", dtype=String),
            *(
                Field(name=feature, dtype=Int64 if function == "count" else Float64)
                for feature, _, function, *_ in features
            ),
        ],
    )


tumbling, sliding, three = (_view(name, WINDOWS[name]) for name in ("tumbling", "sliding", "three"))
