"""Models of river as a stage: the same bits however the log is cut, and scores that tell the odd from the usual."""

import json
import re
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FileSource, KafkaSource
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat
from feast.stream_feature_view import StreamFeatureView
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.errors import KafkaError
from river import compose, drift
from river.anomaly import HalfSpaceTrees
from river.preprocessing import MinMaxScaler

from streaming import backfill, history
from streaming.checkpoint import CheckpointStore
from streaming.compute_engine import _plan
from streaming.control import message
from streaming.partition import Partition
from streaming.plan import Plan, PlanError
from streaming.poison import SpoiledError, feed
from streaming.records import Drift, RecordBatch
from streaming.state import StateError
from streaming.transformations import Reader
from streaming.views import compile_view
from streaming.worker import Worker

HOUR = timedelta(hours=1)
NOW_US = 10**15
SMALL = "n_trees=3, height=4, window_size=20, seed=3"
TAGS = {
    "millrace.model.anomaly": f"half_space_trees(x, y, {SMALL}) every 3",
    "millrace.model.drift": "adwin(x, delta=0.01, clock=4)",
}


def declared(tags, schema="time timestamp, user string, x double, y bigint", extra=(), **options) -> StreamFeatureView:
    source = KafkaSource(
        name="events",
        topic="events",
        kafka_bootstrap_servers="broker:9092",
        message_format=JsonFormat(schema_json=schema),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(seconds=5),
        batch_source=FileSource(path="log/*.parquet", timestamp_field="event_timestamp"),
    )
    functions = [("mean", "anomaly"), ("max", "anomaly"), ("count", "anomaly"), ("sum", "drift"), ("count", "drift")]
    aggregations = [
        Aggregation(column=column, function=function, time_window=HOUR, slide_interval=HOUR / 6)
        for function, column in [*functions, *extra]
        if f"millrace.model.{column}" in tags or column in ("x", "y")
    ]
    return StreamFeatureView(
        name="odd", source=source, timestamp_field="time", aggregations=aggregations, tags=tags, **options
    )


def compiled(tags, *args, **options) -> Plan:
    return compile_view(declared(tags, *args, **options), "user", "string")


PLAN = compiled(TAGS, extra=[("sum", "x")])


def events(count: int, seed: int = 0) -> list[bytes]:
    """Nulls, broken records, late ones and some from the future among them; the level of x shifts half-way."""
    random = np.random.default_rng(seed)
    values = []
    for number in range(count):
        lot = random.random()
        x = None if lot < 0.05 else float(random.normal(10 * (number > count / 2)))
        time_ms = 100_000 + 2_000 * number + (10**13 if lot > 0.98 else -90_000 if lot > 0.95 else 0)
        event = {"user": f"user {random.integers(3)}", "time": time_ms, "x": x, "y": int(random.integers(5))}
        values.append(b"{" if 0.9 < lot < 0.92 else json.dumps(event).encode())
    return values


def rows(partition: Partition) -> list[tuple]:
    emission = partition.emit()
    features = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
    return [
        (entity, *(value.hex() if isinstance(value, float) else value for value in row))
        for entity, row in sorted(zip(emission.entities.to_pylist(), features, strict=True))
    ]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 5), data=st.data())
def test_any_split_into_batches_and_any_restart_gives_the_same_bits(seed, data):
    values = events(150, seed)
    whole = Partition(PLAN, 0)
    whole.process(RecordBatch.of_values(values, 0), NOW_US)
    split, saved, at = Partition(PLAN, 0), None, 0
    while at < len(values):
        end = min(at + data.draw(st.integers(1, 60)), len(values))
        split.process(RecordBatch.of_values(values[at:end], at), NOW_US)
        at = end
        if saved is not None and data.draw(st.booleans()):
            saved.append(split.delta())
        elif data.draw(st.booleans()):
            saved = [split.snapshot()]
        else:
            continue
        split = Partition.restore(PLAN, 0, *saved)
        assert split.snapshot() == Partition.restore(PLAN, 0, *saved).snapshot()
    assert split.learning == whole.learning
    assert split.snapshot() == whole.snapshot()
    assert rows(split) == rows(whole)


def test_the_columns_are_those_that_river_gives():
    values = events(300)
    partition, reader = Partition(PLAN, 0), Reader(PLAN)
    batch = RecordBatch.of_values(values, 0)
    columns, _ = reader.decode(batch)
    readable = columns.readable & (columns.times <= NOW_US)
    partition.process(batch, NOW_US)
    seen = [event for value, good in zip(values, readable, strict=True) if good for event in [json.loads(value)]]
    model = compose.Pipeline(MinMaxScaler(), HalfSpaceTrees(n_trees=3, height=4, window_size=20, seed=3))
    scores = []
    for event in seen[::3]:
        if event["x"] is not None:
            inputs = {"x": event["x"], "y": float(event["y"])}
            scores.append((event, model.score_one(inputs)))
            model.learn_one(inputs)
    detector, detected = drift.ADWIN(delta=0.01, clock=4), 0
    for event in seen:
        if event["x"] is not None:
            detector.update(event["x"])
            detected += detector.drift_detected
    assert partition.learning == (len(seen), detected) and detected >= 1
    (model_column, _) = (PLAN.columns.index(c) for c in PLAN.columns[-2:])
    follower = Partition(PLAN, 0)
    follower._models.follow(columns, np.flatnonzero(readable), batch.offsets, 0)
    given = columns.values[columns.present[:, model_column], model_column].tolist()
    assert given == [score for _, score in scores[20:]]
    assert len({*given}) > 20


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_backfill_in_shards_computes_what_the_stream_does(tmp_path, shards, kind):
    values = [value for value in events(400) if value != b"{"]
    parsed = [json.loads(value) for value in values]
    source = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        source.write_bytes(b"".join(value + b"\n" for value in values))
    else:
        pq.write_table(pa.Table.from_pylist(parsed), source, row_group_size=70)
    where = backfill.Output(str(tmp_path / "out"), "event_timestamp", None, NOW_US)
    backfill.prepare(where)
    backfill.run(PLAN, history.pieces(PLAN, str(source)), where, shards)
    parts = [pq.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    found = pa.concat_tables(parts).sort_by("event_timestamp").to_pylist()
    newest = {row["user"]: row for row in found}
    live = Partition(PLAN, 0)
    live.process(RecordBatch.of_values(values, 0), NOW_US)
    assert live.learning[1] > 0
    expected = rows(live)
    assert [
        (user, *(v.hex() if isinstance(v, float) else v for v in (row[a.name] for a in PLAN.aggregates)))
        for user, row in sorted(newest.items())
    ] == expected


def test_planted_anomalies_score_above_the_usual():
    random = np.random.default_rng(5)
    planted = (np.arange(3_000) > 600) & (random.random(3_000) < 0.01)
    x, y = random.normal(size=(2, 3_000))
    x[planted] += random.choice([-8, 8], planted.sum())
    plan = compiled(
        {"millrace.model.anomaly": "half_space_trees(x, y)"}, "time timestamp, user string, x float, y float"
    )
    values = [
        json.dumps({"user": "odd" if odd else "usual", "time": at, "x": x[at], "y": y[at]}).encode()
        for at, odd in enumerate(planted)
    ]
    partition = Partition(plan, 0)
    partition.process(RecordBatch.of_values(values, 0), NOW_US)
    (_, odd, _, odds), (_, usual, most, usuals) = rows(partition)
    assert (odds, usuals) == (planted.sum(), 3_000 - planted.sum() - 250)
    assert float.fromhex(odd) > 0.95 and float.fromhex(usual) < 0.85
    assert float.fromhex(most) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_adwin_detects_a_planted_shift_and_nothing_in_stationary_events(seed):
    plan = compiled({"millrace.model.drift": "adwin(x)"})
    random = np.random.default_rng(seed)
    for shift in (0.0, 2.0):
        x = random.normal(size=4_000) + shift * (np.arange(4_000) >= 2_000)
        values = [json.dumps({"user": "a", "time": 1000 * at, "x": value}).encode() for at, value in enumerate(x)]
        partition, detected = Partition(plan, 0), []
        for _ in partition.pieces(RecordBatch.of_values(values, 0), NOW_US):
            detected += partition.drifts
        assert partition.learning == (4_000, len(detected))
        if not shift:
            assert not detected
            continue
        assert 2_000 <= detected[0].offset < 2_100 and len(detected) < 4
        assert detected[0].column == "drift" and detected[0].time_us == 1_000_000 * detected[0].offset
        assert re.fullmatch(r"the mean of x has changed to [\d.]+ \(\d+ events\)", detected[0].reason)


def test_a_transformation_comes_first():
    def large(frame):
        return frame[frame["x"] > 0].assign(z=lambda f: f["x"] * 2.0)

    tags = {"millrace.model.drift": "adwin(z)"}
    plan = compiled(tags, udf=large, mode="pandas")
    assert [column.name for column in plan.columns] == ["z", "drift"]
    values = [json.dumps({"user": "a", "time": 1000 * at, "x": (-1) ** at}).encode() for at in range(100)]
    partition = Partition(plan, 0)
    partition.process(RecordBatch.of_values(values, 0), NOW_US)
    assert partition.learning[0] == 50
    assert rows(partition)[0][1:] == ((0.0).hex(), 50)


def test_what_an_event_calls_like_a_model_is_not_read():
    values = [json.dumps({"user": "a", "time": 1000, "x": 1.0, "drift": "much", "anomaly": [1]}).encode()]
    partition = Partition(PLAN, 0)
    assert partition.process(RecordBatch.of_values(values, 0), NOW_US) == []
    table = pa.RecordBatch.from_pylist([{"user": "a", "time": 1000, "x": 1.0, "y": 1, "drift": "much"}])
    columns, rejects = Reader(PLAN).convert(table, 0, np.arange(1))
    assert not rejects and columns.present.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"millrace.model.a": "half_space_tree(x)"}, "did you mean 'half_space_trees'"),
        ({"millrace.model.a": "adwin(x"}, "write 'half_space_trees(a, b) every 20'"),
        ({"millrace.model.a": "adwin(x) each 3"}, "write 'half_space_trees(a, b) every 20'"),
        ({"millrace.model.": "adwin(x)"}, "the name of the column"),
        ({"millrace.models.a": "adwin(x)"}, "did you mean 'millrace.model.COLUMN'"),
        ({"millrace.model.a": "adwin(x) every 0"}, "a number from 1"),
        ({"millrace.model.a": "adwin(x, y)"}, "exactly one field to learn from, and has 2"),
        ({"millrace.model.a": "half_space_trees(height=3)"}, "at least one field"),
        ({"millrace.model.a": "half_space_trees(x, x)"}, "each once"),
        ({"millrace.model.a": "adwin(x, dela=0.1)"}, "did you mean 'delta'"),
        ({"millrace.model.a": "adwin(x, delta=2)"}, "delta must be a number from"),
        ({"millrace.model.a": "adwin(x, delta=nan)"}, "delta must be a number from"),
        ({"millrace.model.a": "half_space_trees(x, height=2.5)"}, "height must be a whole number from 1 to 10"),
        ({"millrace.model.a": "adwin(z)"}, "'z' is not in the JsonFormat schema"),
        ({"millrace.model.a": "adwin(name)"}, "declared string, which is not one of"),
        ({"millrace.model.a": "adwin(user)"}, "the entity or the timestamp"),
        ({"millrace.model.x": "adwin(y)"}, "would hide the field of that name"),
    ],
)
def test_refuses_tags_that_make_no_sense(tags, sentence):
    schema = "time timestamp, user string, x double, y bigint, name string"
    with pytest.raises(PlanError, match=re.escape(sentence)) as caught:
        compiled(tags, schema, extra=[("sum", "x")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "adwin(x, delta=1e-300, clock=1, max_buckets=2, min_window_length=1, grace_period=1)",
        "adwin(x, delta=0.999)",
        "half_space_trees(x, n_trees=1, height=1, window_size=1, seed=0)",
        "half_space_trees(x, height=10) every 1000000000",
    ],
)
def test_the_limits_of_parameters_and_of_numbers_break_nothing(text):
    plan = compiled({"millrace.model.drift": text})
    x = np.random.default_rng(0).choice([0.0, 1e308, -1e308, 5e-324, -1.0], 500).tolist()
    values = [json.dumps({"user": "a", "time": at, "x": value}).encode() for at, value in enumerate(x)]
    partition = Partition(plan, 0)
    assert partition.process(RecordBatch.of_values(values, 0), NOW_US) == []
    assert partition.learning[0] == 500
    assert Partition.restore(plan, 0, partition.snapshot()).snapshot() == partition.snapshot()


def test_a_batch_source_has_no_offsets_to_follow():
    view = declared(TAGS)
    columns = {"user": pa.string(), "event_timestamp": pa.timestamp("us"), "x": pa.float64(), "y": pa.int64()}
    with pytest.raises(PlanError, match="a batch source has none: compute it by ray_jobs/backfill_features.py"):
        _plan(view, "user", columns)


def test_every_parameter_changes_the_fingerprint():
    texts = ["adwin(x)", "adwin(y)", "adwin(x, clock=33)", "adwin(x) every 2", "half_space_trees(x)"]
    plans = [compiled({"millrace.model.drift": text}) for text in texts]
    assert len({plan.fingerprint for plan in plans}) == len(texts)
    assert compiled({"millrace.model.drift": "adwin(x,clock=32) every 1"}).fingerprint == plans[0].fingerprint


def test_state_of_another_version_of_river_is_refused(monkeypatch):
    from streaming.learning import Models

    saved = Partition(PLAN, 0).snapshot()
    monkeypatch.setattr(Models, "version", "0.99.0")
    with pytest.raises(StateError, match="install that version, or start anew with --reset"):
        Partition.restore(PLAN, 0, saved)


def test_an_error_after_a_model_has_learned_makes_the_partition_be_restored(monkeypatch):
    partition = Partition(PLAN, 0)

    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(partition, "_fill", fail)
    with pytest.raises(SpoiledError):
        list(feed(partition, RecordBatch.of_values(events(5), 0), NOW_US))


class Stub:
    """A consumer of one batch and sinks that keep what they get; publishing fails once."""

    lost: dict[int, int] = {}

    def __init__(self, values: list[bytes]) -> None:
        self.values, self.published, self.failures = values, [], 1

    def poll(self, *_):
        values, self.values = self.values, []
        return [RecordBatch.of_values(values, 0)] if values else []

    def seek(self, *_):
        return 0

    def lag(self):
        return {0: 0}

    def unanswered_s(self):
        return {0: 0.0}

    def position(self, _):
        return 0

    def write(self, drifts):
        if self.failures:
            self.failures -= 1
            raise KafkaError
        self.published += drifts

    def __getattr__(self, _):
        return lambda *_: None


class Sink:
    def __getattr__(self, _):
        return lambda *_: None


def test_a_worker_publishes_drifts_before_it_checkpoints(tmp_path, caplog):
    stub = Stub(events(400))
    worker = Worker(
        PLAN,
        source=stub,
        online=Sink(),
        offline=Sink(),
        rejects=Sink(),
        checkpoints=CheckpointStore(str(tmp_path)),
        drifts=stub,
        wall_us=lambda: NOW_US,
    )
    worker.start({0: 1})
    with pytest.raises(KafkaError):
        worker.step()
    assert CheckpointStore(str(tmp_path)).load(worker.plan.view, 0) is None
    worker.checkpoint()
    worker.checkpoint()
    alone = Partition(PLAN, 0)
    alone.process(RecordBatch.of_values(events(400), 0), NOW_US)
    assert len(stub.published) == alone.learning[1] == 1
    assert 200 <= stub.published[0].offset < 220
    assert [record.offset for record in caplog.records if record.message == "drift detected"] == [
        stub.published[0].offset
    ]
    worker._refresh_status()
    assert worker.status()[0]["drifts"] == 1
    worker.close()


def test_a_drift_as_an_event_of_the_topic_control():
    key, value = message("odd", Drift("drift", 3, 41, -62_135_596_800_000_000 - 1, "because"))
    assert key == b"odd.drift"
    assert json.loads(value) == {
        "model": "odd.drift",
        "time": "0000-12-31T23:59:59.999999Z",
        "action": "drift",
        "reason": "because",
        "partition": 3,
        "offset": 41,
    }
