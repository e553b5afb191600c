"""The online sink: bytes equal to Feast's own protos, rows equal to Feast's own rows, newer values never lost."""

import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Float64, Int64, String
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.records import Emission
from streaming.sinks import OnlineSink, encode, entity_keys, latest

INTS = st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=30)
FLOATS = st.lists(st.none() | st.floats(allow_nan=False), max_size=30)


def emission(entities: list[str], at_us: int, counts: list[int], means: list[float | None]) -> Emission:
    features = pa.table({"edits": pa.array(counts, pa.int64()), "mean": pa.array(means, pa.float64())})
    return Emission(pa.array(entities, pa.string()), np.full(len(entities), at_us, dtype=np.int64), features)


@settings(deadline=None)
@given(values=INTS)
def test_integers_are_feasts_protos(values):
    protos, texts = encode(pa.chunked_array([pa.array(values, pa.int64())]), 0x20)
    assert protos == [b"" if v is None else Value(int64_val=v).SerializeToString() for v in values]
    assert texts == [None if v is None else str(v) for v in values]


@settings(deadline=None)
@given(values=FLOATS)
def test_floats_are_feasts_protos(values):
    column = pa.chunked_array([pa.array(values, pa.float64())])
    protos, texts = encode(column, 0x29)
    assert protos == [b"" if v is None else Value(double_val=v).SerializeToString() for v in values]
    assert texts == [None if v is None else str(v) for v in values]


def test_narrow_types_are_feasts_protos():
    column = pa.chunked_array([pa.array([0.0, 1.0, -3.0, None])])
    assert encode(column, 0x18)[0][:3] == [Value(int32_val=v).SerializeToString() for v in (0, 1, -3)]
    assert encode(column, 0x35)[0][:3] == [Value(float_val=v).SerializeToString() for v in (0.0, 1.0, -3.0)]


@given(names=st.lists(st.text(), max_size=10), numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_entity_keys_are_feasts(names, numbers):
    for values, kind, member in ((names, pa.string(), "string_val"), (numbers, pa.int64(), "int64_val")):
        protos = [EntityKey(join_keys=["usér"], entity_values=[Value(**{member: value})]) for value in values]
        expected = [serialize_entity_key(proto, entity_key_serialization_version=3) for proto in protos]
        assert entity_keys("usér", pa.array(values, kind)) == expected


def test_latest_keeps_the_last_row_of_each_entity():
    newest = latest(
        [emission(["a", "b"], 1, [1, 1], [1.0, None]), emission([], 2, [], []), emission(["a"], 3, [2], [4.0])]
    )
    assert newest is not None
    found = dict(zip(newest.entities.to_pylist(), newest.features.column("edits").to_pylist(), strict=True))
    times = dict(zip(newest.entities.to_pylist(), newest.event_time_us.tolist(), strict=True))
    assert (found, times) == ({"a": 2, "b": 1}, {"a": 3, "b": 1})
    assert latest([]) is None


# A plain FeatureView serves: the sink only asks the store for the view by name and reads its fields.
class Store(FeatureStore):
    def get_stream_feature_view(self, name, **_):
        return self.get_feature_view(name)


def applied(folder: Path, kind: str) -> Store:
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / f"{kind[-10:]}.registry"),
        online_store={"type": kind, "path": str(folder / f"{kind[-10:]}.db")},
        entity_key_serialization_version=3,
    )
    store = Store(config=config)
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    fields = [Field(name="user", dtype=String), Field(name="edits", dtype=Int64), Field(name="mean", dtype=Float64)]
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    view = FeatureView(name="activity", entities=[user], schema=fields, source=source, ttl=timedelta(days=1))
    store.apply([user, view])
    return store


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Store:
    return applied(tmp_path_factory.mktemp("guarded"), "streaming.sinks.GuardedSqliteOnlineStore")


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory) -> Store:
    return applied(tmp_path_factory.mktemp("ordinary"), "sqlite")


def online(store: FeatureStore, *users: str) -> dict:
    found = store.get_online_features(
        features=["activity:edits", "activity:mean"], entity_rows=[{"user": user} for user in users]
    ).to_dict()
    return {user: (found["edits"][row], found["mean"][row]) for row, user in enumerate(found["user"])}


AT_US = 1_442_016_000_250_000


def test_get_online_features_returns_what_was_written(guarded, ordinary, caplog):
    for store in (guarded, ordinary):
        sink = OnlineSink(store, "activity")
        assert sink.write([emission(["ann", "böb"], AT_US, [3, 0], [1.5, None])]) == 2
        assert online(store, "ann", "böb", "nobody") == {"ann": (3, 1.5), "böb": (0, None), "nobody": (None, None)}
    assert "not guarded" in caplog.text


def test_rows_equal_those_of_feasts_own_store(guarded, ordinary):
    tables = []
    for store in (guarded, ordinary):
        OnlineSink(store, "activity").write([emission(["row", "two"], AT_US, [300, 0], [0.1, None])])
        connection = store._get_provider().online_store._get_conn(store.config)
        rows = connection.execute(
            "SELECT entity_key, feature_name, value, value_text, vector_value, event_ts FROM test_activity"
            " WHERE entity_key IN (?, ?) ORDER BY entity_key, feature_name",
            entity_keys("user", pa.array(["row", "two"])),
        )
        tables.append(rows.fetchall())
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4


def test_an_older_event_time_never_overwrites_a_newer_one(guarded):
    sink = OnlineSink(guarded, "activity")
    sink.write([emission(["old"], AT_US, [2], [2.0])])
    sink.write([emission(["old"], AT_US - 1, [1], [1.0])])
    assert online(guarded, "old") == {"old": (2, 2.0)}
    sink.write([emission(["old"], AT_US, [3], [3.0])])
    assert online(guarded, "old") == {"old": (3, 3.0)}
    frame = pa.table({"user": ["old"], "edits": [9], "mean": [9.0]}).to_pandas()
    for older, expected in ((True, (3, 3.0)), (False, (9, 9.0))):
        frame["event_timestamp"] = datetime.fromtimestamp(AT_US / 1e6, UTC) + timedelta(microseconds=-1 if older else 1)
        guarded.write_to_online_store("activity", frame.copy())
        assert online(guarded, "old") == {"old": expected}


def test_the_value_bytes_are_tag_and_payload():
    protos, _ = encode(pa.chunked_array([[1.5]]), 0x29)
    assert protos == [b"\x29" + struct.pack("<d", 1.5)]
