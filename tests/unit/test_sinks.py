"""The online sink: bytes equal to Feast's own protos and keys, and the newest row of each entity into any store."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import StringList, Value
from feast.types import Array, Float32, Float64, Int32, Int64, String, UnixTimestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.feast_bytes import as_bytes, entity_keys, value_protos
from streaming.records import Emission
from streaming.sinks import OnlineSink, OnlineSinkError, latest

TEXT = st.text(max_size=200)
STRINGS = pa.list_(pa.string())
CASES = {
    Int64: (st.integers(-(2**63), 2**63 - 1), pa.int64(), lambda v: Value(int64_val=v)),
    Int32: (st.integers(-(2**31), 2**31 - 1), pa.int64(), lambda v: Value(int32_val=v)),
    Float64: (st.floats(allow_nan=False), pa.float64(), lambda v: Value(double_val=v)),
    Float32: (st.floats(allow_nan=False, width=32), pa.float64(), lambda v: Value(float_val=v)),
    String: (TEXT, pa.string(), lambda v: Value(string_val=v)),
    Array(String): (st.lists(TEXT, max_size=5), STRINGS, lambda v: Value(string_list_val=StringList(val=v))),
}


@pytest.mark.parametrize("dtype", CASES, ids=str)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_columns_become_feasts_protos(dtype, data):
    value, kind, proto = CASES[dtype]
    values = data.draw(st.lists(st.none() | value, max_size=20))
    cut = data.draw(st.integers(0, len(values)))
    column = pa.chunked_array([values[:cut], values[cut:]], kind)
    expected = [b"" if each is None else proto(each).SerializeToString() for each in values]
    assert as_bytes(value_protos(column, dtype)) == expected
    assert as_bytes(value_protos(column[cut:], dtype)) == expected[cut:]


@settings(deadline=None)
@given(names=st.lists(TEXT, max_size=10), numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_entity_keys_are_feasts(names, numbers):
    for values, kind, member in ((names, pa.string(), "string_val"), (numbers, pa.int64(), "int64_val")):
        protos = [EntityKey(join_keys=["usér"], entity_values=[Value(**{member: value})]) for value in values]
        expected = [serialize_entity_key(proto, entity_key_serialization_version=3) for proto in protos]
        assert as_bytes(entity_keys("usér", pa.array(values, kind))) == expected
        assert as_bytes(entity_keys("usér", pa.array(values, kind)[1:])) == expected[1:]


def emission(entities: list[str], times_us: list[int], counts: list[int]) -> Emission:
    features = pa.table({"edits": pa.array(counts, pa.int64())})
    return Emission(pa.array(entities, pa.string()), np.array(times_us, dtype=np.int64), features)


ROWS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-5, 5)), max_size=12)


@given(flush=st.lists(ROWS, max_size=4))
def test_latest_is_the_newest_row_of_each_entity_and_of_equal_times_the_last(flush):
    expected, emissions, number = {}, [], 0
    for rows in flush:
        emissions.append(
            emission([name for name, _ in rows], [at for _, at in rows], list(range(number, number + len(rows))))
        )
        for name, at in rows:
            if name not in expected or at >= expected[name][0]:
                expected[name] = (at, number)
            number += 1
    newest = latest(emissions)
    if newest is None:
        assert not expected
        return
    columns = newest.entities.to_pylist(), newest.event_time_us.tolist(), newest.features["edits"].to_pylist()
    assert sorted(zip(*columns, strict=True)) == sorted((name, *found) for name, found in expected.items())


# A plain FeatureView serves: the sink only asks the store for the view by name and reads its fields.
class Store(FeatureStore):
    def get_stream_feature_view(self, name, **_):
        return self.get_feature_view(name)


FIELDS = {"edits": Int64, "mean": Float64, "small": Int32, "half": Float32, "page": String, "pages": Array(String)}
USER = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)


def applied(folder: Path, kind: str, fields=FIELDS) -> Store:
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": kind, "path": str(folder / "online.db")},
        entity_key_serialization_version=3,
    )
    store = Store(config=config)
    schema = [Field(name="user", dtype=String), *(Field(name=name, dtype=dtype) for name, dtype in fields.items())]
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    store.apply([USER, FeatureView(name="activity", entities=[USER], schema=schema, source=source)])
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Store]:
    kinds = ("streaming.sinks.GuardedSqliteOnlineStore", "sqlite")
    return {kind: applied(tmp_path_factory.mktemp(kind[-6:]), kind) for kind in kinds}


AT_US = 1_442_016_000_250_000


def full(entities: list[str], at_us: int = AT_US) -> Emission:
    size = len(entities)
    columns = {
        "edits": pa.array(range(size), pa.int64()),
        "mean": pa.array([None if row % 2 else row / 3 for row in range(size)], pa.float64()),
        "small": pa.array([-row for row in range(size)], pa.int64()),
        "half": pa.array([row / 2 for row in range(size)], pa.float64()),
        "page": pa.array([None if row % 3 == 1 else "é" * row for row in range(size)], pa.string()),
        "pages": pa.array([None if row % 3 == 2 else ["x"] * row for row in range(size)], STRINGS),
    }
    return Emission(pa.array(entities), np.full(size, at_us, dtype=np.int64), pa.table(columns))


def online(store: FeatureStore, users: list[str], features=tuple(FIELDS)) -> dict:
    refs = [f"activity:{name}" for name in features]
    found = store.get_online_features(features=refs, entity_rows=[{"user": user} for user in users]).to_dict()
    return {name: found[name] for name in features}


def test_every_type_reads_back_through_feast_the_same_from_both_stores(stores, caplog):
    users = ["ann", "böb", "cee", "dee", "nobody"]
    written = full(users[:4])
    expected = {name: [*column, None] for name, column in written.features.to_pydict().items()}
    for store in stores.values():
        assert OnlineSink(store, "activity").write([written]) == 4
        assert online(store, users) == expected
    assert caplog.text.count("not guarded") == 1


def test_an_entity_that_comes_several_times_in_one_flush_keeps_its_newest_row(stores):
    store = stores["streaming.sinks.GuardedSqliteOnlineStore"]
    sink = OnlineSink(store, "activity")
    rows = full(["twice", "once", "twice"])._replace(event_time_us=np.array([AT_US + 2, AT_US, AT_US + 1]))
    assert sink.write([rows]) == 2
    assert online(store, ["twice", "once"], ["edits"]) == {"edits": [0, 1]}
    assert sink.write([]) == 0


def test_an_older_event_time_never_overwrites_a_newer_one(stores):
    store = stores["streaming.sinks.GuardedSqliteOnlineStore"]
    sink = OnlineSink(store, "activity")
    for at_us, count, expected in ((AT_US, 2, 2), (AT_US - 1, 1, 2), (AT_US, 3, 3), (AT_US + 1, 0, 0)):
        features = full(["old"]).features.set_column(0, "edits", pa.array([count]))
        sink.write([Emission(pa.array(["old"]), np.array([at_us]), features)])
        assert online(store, ["old"], ["edits"]) == {"edits": [expected]}
    frame = features.append_column("user", pa.array(["old"])).to_pandas()
    for step_us, expected in ((0, 0), (2, 9)):
        frame["edits"] = 9
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=AT_US + step_us)
        frame["event_timestamp"] = moment
        store.write_to_online_store("activity", frame.copy())
        assert online(store, ["old"], ["edits"]) == {"edits": [expected]}


def test_a_type_that_no_aggregate_has_is_refused(tmp_path, stores):
    store = applied(tmp_path, "sqlite", {"seen": UnixTimestamp})
    with pytest.raises(OnlineSinkError, match="'seen'.*declare Int64"):
        OnlineSink(store, "activity")
    wrong = Emission(pa.array(["ann"]), np.array([AT_US]), pa.table({"edits": pa.array(["many"])}))
    for store in stores.values():
        with pytest.raises(OnlineSinkError, match="declares another type"):
            OnlineSink(store, "activity").write([wrong])
