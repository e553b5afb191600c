"""A view's transformation: what it may do with events, and what becomes of those that it drops or breaks on."""

import inspect
import json
from datetime import timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from feast import FileSource, KafkaSource
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat
from feast.stream_feature_view import StreamFeatureView
from ray import cloudpickle

from streaming.arrow_columns import TableError
from streaming.partition import Counters, Partition
from streaming.plan import PlanError
from streaming.records import RecordBatch
from streaming.transformations import Reader, TransformationError
from streaming.views import compile_view

HOUR = timedelta(hours=1)
NOW_US = 10**15


def only_large(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Filter, derive, cast and rename by expressions on Arrow columns."""
    batch = batch.filter(pc.greater(batch["added"], 10))
    doubled = pc.multiply(batch["added"].cast(pa.float64()), 2.0)
    return batch.append_column("doubled", doubled).rename_columns(
        ["word" if name == "channel" else name for name in [*batch.schema.names, "doubled"]]
    )


def upper(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame[frame["added"] > 10]
    return frame.assign(word=frame["channel"].str.upper(), doubled=frame["added"] * 2.0)


def listed(columns: dict[str, list]) -> dict[str, list]:
    kept = [at for at, added in enumerate(columns["added"]) if added is not None and added > 10]
    columns = {name: [values[at] for at in kept] for name, values in columns.items()}
    return columns | {"word": columns["channel"], "doubled": [added * 2.0 for added in columns["added"]]}


def view(**options) -> StreamFeatureView:
    log = FileSource(path="log/*.parquet", timestamp_field="event_timestamp")
    source = KafkaSource(
        name="edits",
        topic="edits",
        kafka_bootstrap_servers="broker:9092",
        message_format=JsonFormat(schema_json="time timestamp, user string, added bigint, channel string"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(),
        batch_source=log,
    )
    aggregations = [
        Aggregation(column="doubled", function="sum", time_window=HOUR, name="doubled"),
        Aggregation(column="added", function="count", time_window=HOUR, name="edits"),
        Aggregation(column="word", function="last", time_window=HOUR, name="word"),
    ]
    return StreamFeatureView(
        name="activity", source=source, timestamp_field="time", aggregations=aggregations, **options
    )


def records(*events) -> RecordBatch:
    values = [event if isinstance(event, bytes) else json.dumps(event).encode() for event in events]
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    count = len(values)
    keys = np.full((count, 2), -1, dtype=np.int64)
    buffer = np.frombuffer(b"".join(values), dtype=np.uint8)
    return RecordBatch(0, buffer, np.arange(count), keys, spans, np.zeros(count, dtype=np.int64))


def edit(user, time_ms, added, channel="#en"):
    return {"user": user, "time": time_ms, "added": added, "channel": channel}


EVENTS = [edit("a", 1_000, 20), edit("a", 2_000, 5), b"{", edit("b", 3_000, 30, "#de"), edit("c", 4_000, None)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tags": {"millrace.transformation": f"{__name__}:only_large"}}, "#en"),
        ({"mode": "pandas", "udf": upper, "udf_string": "upper"}, "#EN"),
        ({"mode": "python", "udf": listed, "udf_string": "listed"}, "#en"),
    ],
)
def test_events_are_filtered_derived_and_renamed_before_they_are_aggregated(options, word):
    plan = compile_view(view(**options), "user", "string")
    partition = Partition(plan, 0)
    (reject,) = partition.process(records(*EVENTS), NOW_US)
    assert (reject.offset, reject.value) == (2, b"{")
    emission = partition.emit()
    assert emission.entities.to_pylist() == ["a", "b"]
    assert emission.features["doubled"].to_pylist() == [40.0, 60.0]
    assert emission.features["edits"].to_pylist() == [1, 1]
    assert emission.features["word"].to_pylist()[0] == word
    assert partition.clock_us == 4_000_000  # also by an event that was dropped
    assert partition.counters == Counters(processed=5, dead=1, late=0, keys=2)
    assert Partition.restore(plan, 0, partition.snapshot()).counters == partition.counters


@pytest.mark.parametrize(("mode", "udf"), [("pandas", upper), ("python", listed)])
def test_it_comes_out_of_the_registry_and_travels_to_a_worker(mode, udf):
    declared = view(mode=mode, udf=udf, udf_string=inspect.getsource(udf))
    stored = StreamFeatureView.from_proto(declared.to_proto())
    plan = cloudpickle.loads(cloudpickle.dumps(compile_view(stored, "user", "string")))
    partition = Partition(plan, 0)
    partition.process(records(*EVENTS), NOW_US)
    assert partition.emit().features["doubled"].to_pylist() == [40.0, 60.0]


def test_tables_are_transformed_as_records_are():
    plan = compile_view(view(mode="pandas", udf=upper, udf_string="upper"), "user", "string")
    readable = [event for event in EVENTS if isinstance(event, dict)]
    table = pa.RecordBatch.from_pylist(readable)
    reader = Reader(plan)
    columns, rejects = reader.convert(table, 0, np.arange(len(readable)))
    by_record, _ = reader.decode(records(*readable))
    assert rejects == []
    for one, other in (
        (columns.values, by_record.values),
        (columns.kept, by_record.kept),
        (columns.times, by_record.times),
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("udf", "error", "sentence"),
    [
        (lambda frame: pd.concat([frame, frame]), TransformationError, "added or reordered rows"),
        (lambda frame: frame.iloc[::-1], TransformationError, "added or reordered rows"),
        (lambda frame: frame[["user", "time", "added"]].head(1), TransformationError, "without the column '__row'"),
        (
            lambda frame: frame.assign(added="many") if len(frame) else frame,
            TableError,
            "What the transformation gives",
        ),
        (lambda frame: frame.assign(added=1 / len(frame)) if len(frame) else frame, None, ""),
    ],
)
def test_what_it_must_not_do_changes_no_state(udf, error, sentence):
    def with_columns(frame):
        frame = udf(frame)
        return frame.assign(word="w", doubled=1.0)

    plan = compile_view(view(mode="pandas", udf=with_columns, udf_string="x"), "user", "string")
    partition = Partition(plan, 0)
    before = partition.snapshot()
    batch = records(edit("a", 1_000, 20), edit("b", 2_000, 5))
    if error is None:
        assert [reject.kind for reject in partition.process(batch, NOW_US)] == ["dead", "dead"]
        return
    with pytest.raises(error, match=sentence):
        partition.process(batch, NOW_US)
    assert partition.snapshot() == before


def test_a_transformation_that_cannot_be_used_is_refused_when_the_view_is_compiled():
    with pytest.raises(PlanError, match="There is no transformation 'nowhere:f'.*package.module:function"):
        compile_view(view(tags={"millrace.transformation": "nowhere:f"}), "user", "string")
    with pytest.raises(PlanError, match="fails on a batch without rows: KeyError"):
        compile_view(view(mode="pandas", udf=lambda frame: frame[["gone"]], udf_string="x"), "user", "string")
    with pytest.raises(PlanError, match="'word' is not in"):
        compile_view(view(mode="pandas", udf=lambda frame: frame.assign(doubled=1.0), udf_string="x"), "user", "string")
    one = compile_view(view(mode="pandas", udf=upper, udf_string="one"), "user", "string")
    other = compile_view(view(mode="pandas", udf=upper, udf_string="other"), "user", "string")
    assert one.fingerprint != other.fingerprint
