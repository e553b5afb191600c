"""The guarded sqlite store through Feast's own doors: write, push, materialize, read, apply again, convert."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import sqlite_store
from streaming.row_layout import RowLayout, encode_values
from streaming.sqlite_store import OnlineStoreError

GUARDED = "streaming.sinks.GuardedSqliteOnlineStore"
NOW = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)
USER = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
TYPES = {
    "edits": Int64,
    "small": Int32,
    "mean": Float64,
    "half": Float32,
    "robot": Bool,
    "seen": UnixTimestamp,
    "page": String,
    "raw": Bytes,
    "pages": Array(String),
    "sizes": Array(Float64),
}
COLUMNS = {
    "user": ["ann", "bob"],
    "edits": [3, -1],
    "small": [1, 2],
    "mean": [1.5, None],
    "half": [0.1, 0.25],
    "robot": [True, False],
    "seen": [NOW.replace(microsecond=0), NOW.replace(microsecond=0)],
    "page": ["Änderung", ""],
    "raw": [b"\x00\x01", b""],
    "pages": [["a", "b"], []],
    "sizes": [[0.5], [1.0, 2.0]],
}


def opened(folder: Path, kind: str = GUARDED) -> FeatureStore:
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": kind, "path": str(folder / "online.db")},
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
    )
    return FeatureStore(config=config)


def view(folder: Path, names) -> FeatureView:
    schema = [Field(name="user", dtype=String), *(Field(name=name, dtype=TYPES[name]) for name in names)]
    batch = FileSource(path=str(folder / "history.parquet"), timestamp_field="event_timestamp")
    source = PushSource(name="pushed", batch_source=batch)
    return FeatureView(name="activity", entities=[USER], schema=schema, source=source, ttl=timedelta(days=1))


def applied(folder: Path, names=tuple(TYPES), kind: str = GUARDED) -> FeatureStore:
    store = opened(folder, kind)
    store.apply([USER, view(folder, names)])
    return store


def frame(at: datetime = NOW, **changes) -> pd.DataFrame:
    return pd.DataFrame({**COLUMNS, "event_timestamp": [at, at], **changes})


def read(store: FeatureStore, users, names) -> dict:
    refs = [f"activity:{name}" for name in names]
    found = store.get_online_features(features=refs, entity_rows=[{"user": user} for user in users])
    return {name: values for name, values in found.to_dict().items() if name != "user"}


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return applied(tmp_path)


def test_feasts_own_write_gives_what_feasts_own_store_gives(tmp_path, store):
    (tmp_path / "own").mkdir()
    own = applied(tmp_path / "own", kind="sqlite")
    found = []
    for each in (store, own):
        each.write_to_online_store("activity", frame())
        found.append(read(each, ["ann", "bob", "nobody"], TYPES))
    assert found[0] == found[1]
    assert found[0]["mean"] == [1.5, None, None]
    assert found[0]["pages"][0] == ["a", "b"]


def test_the_event_time_comes_back_to_the_microsecond(store):
    store.write_to_online_store("activity", frame())
    answer = store.get_online_features(["activity:edits"], [{"user": "ann"}, {"user": "nobody"}]).proto
    stamp = answer.results[1].event_timestamps[0]
    assert stamp.ToNanoseconds() == int(NOW.timestamp()) * 10**9 + 678_901_000
    assert store._get_provider().online_store.newest_event_us(store.config, view(Path(), ["edits"])) is not None


def test_push_and_materialize_write_through_the_guard(tmp_path, store):
    store.push("pushed", frame())
    store.push("pushed", frame(NOW - timedelta(microseconds=1), edits=[7, 7]))
    assert read(store, ["ann", "bob"], ["edits"]) == {"edits": [3, -1]}
    later = NOW + timedelta(minutes=1)
    pd.concat([frame(later, edits=[10, 11]), frame(NOW - timedelta(hours=1))]).to_parquet(tmp_path / "history.parquet")
    store.materialize(NOW - timedelta(hours=2), NOW + timedelta(hours=1))
    assert read(store, ["ann", "bob"], ["edits", "page"]) == {"edits": [10, 11], "page": ["Änderung", ""]}


def test_a_view_that_gains_and_loses_features_goes_on_reading_its_old_rows(tmp_path):
    store = applied(tmp_path, ["edits", "mean", "page"])
    store.write_to_online_store("activity", frame()[["user", "event_timestamp", "edits", "mean", "page"]])
    store.apply([view(tmp_path, ["page", "small", "edits"])])
    assert read(store, ["ann", "bob"], ["edits", "small", "page"]) == {
        "edits": [3, -1],
        "small": [None, None],
        "page": ["Änderung", ""],
    }
    newer = frame(NOW + timedelta(seconds=1), edits=[4, 5])
    store.write_to_online_store("activity", newer[["user", "event_timestamp", "edits", "small", "page"]].head(1))
    assert read(store, ["ann", "bob"], ["edits", "small"]) == {"edits": [4, -1], "small": [1, None]}


def batch(user: str, at: datetime, **values: Value):
    return EntityKey(join_keys=["user"], entity_values=[Value(string_val=user)]), values, at, None


def test_features_that_a_write_does_not_name_stay(store):
    online, table = store._get_provider().online_store, store.get_feature_view("activity")
    rows = [
        batch("ann", NOW, edits=Value(int64_val=1), mean=Value(double_val=2.0)),
        batch("ann", NOW + timedelta(seconds=1), edits=Value(int64_val=3)),
        batch("ann", NOW + timedelta(seconds=2), page=Value(string_val="x")),
        batch("ann", NOW - timedelta(seconds=9), page=Value(string_val="old"), mean=Value(double_val=9.0)),
    ]
    for row in rows[:2]:
        online.online_write_batch(store.config, table, [row], None)
    online.online_write_batch(store.config, table, rows[2:], None)
    assert read(store, ["ann"], ["edits", "mean", "page"]) == {"edits": [3], "mean": [2.0], "page": ["x"]}


def test_a_value_of_another_type_than_declared_is_kept_as_it_is(store):
    online, table = store._get_provider().online_store, store.get_feature_view("activity")
    online.online_write_batch(store.config, table, [batch("ann", NOW, edits=Value(double_val=0.5))], None)
    assert read(store, ["ann"], ["edits"]) == {"edits": [0.5]}


OWN = {
    "int64_val": st.integers(-(2**63), 2**63 - 1).map(lambda value: Value(int64_val=value)),
    "int32_val": st.integers(-(2**31), 2**31 - 1).map(lambda value: Value(int32_val=value)),
    "double_val": st.floats(allow_nan=False).map(lambda value: Value(double_val=value)),
    "float_val": st.floats(allow_nan=False, width=32).map(lambda value: Value(float_val=value)),
    "bool_val": st.booleans().map(lambda value: Value(bool_val=value)),
}
MISSING = st.just(Value())
VALUES = st.one_of(*OWN.values(), st.text().map(lambda value: Value(string_val=value)), MISSING)
CELLS = st.sampled_from([*OWN, "proto"]).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(OWN.get(kind, VALUES) | MISSING, min_size=3, max_size=3))
)


@settings(deadline=None, max_examples=60)
@given(columns=st.lists(CELLS | st.tuples(st.just("int64_val"), st.lists(VALUES, min_size=3, max_size=3)), max_size=12))
def test_blobs_read_back_whatever_was_declared(columns):
    kinds = {f"f{at}": kind for at, (kind, _) in enumerate(columns)}
    rows = [{f"f{at}": values[row] for at, (_, values) in enumerate(columns)} for row in range(3)]
    layout, blobs = encode_values(rows, kinds)
    reread = RowLayout.parse(str(layout))
    for wanted in (set(kinds), set(list(kinds)[::2]) | {"unknown"}):
        for row, blob in zip(rows, blobs.to_pylist(), strict=True):
            assert reread.read(blob, wanted) == {name: value for name, value in row.items() if name in wanted}


WRITES = st.lists(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(-3, 3), st.integers(0, 99)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(writes=WRITES, columnar=st.lists(st.booleans(), min_size=6, max_size=6), size=st.sampled_from([1, 2, 3, 50]))
def test_the_newest_event_time_wins_within_a_batch_and_between_batches(shared, writes, columnar, size):
    store, fresh = shared
    prefix, expected = f"{next(fresh)}-", {}
    online, table = store._get_provider().online_store, store.get_feature_view("activity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_store, "ROWS_A_STATEMENT", size)
        patch.setattr(sqlite_store, "ROWS_A_CHUNK", size + 1)
        for rows, arrow in zip(writes, columnar, strict=False):
            if arrow:
                features = pa.table(
                    {"edits": pa.array([count for *_, count in rows]), "mean": pa.array([0.0] * len(rows))}
                )
                times = np.array([1_000_000 + at for _, at, _ in rows])
                online.write_columns(store.config, table, pa.array([prefix + row[0] for row in rows]), times, features)
            else:
                epoch = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
                data = [
                    batch(
                        prefix + name,
                        epoch + timedelta(microseconds=at),
                        edits=Value(int64_val=count),
                        mean=Value(double_val=0.0),
                    )
                    for name, at, count in rows
                ]
                online.online_write_batch(store.config, table, data, None)
            for name, at, count in rows:
                if name not in expected or at >= expected[name][0]:
                    expected[name] = at, count
    users = sorted(expected)
    assert read(store, [prefix + user for user in users], ["edits"])["edits"] == [expected[user][1] for user in users]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return applied(tmp_path_factory.mktemp("shared"), ["edits", "mean"]), iter(range(10_000))


@pytest.mark.parametrize("guarded", [False, True])
def test_a_table_of_feasts_layout_is_converted_by_apply(tmp_path, caplog, guarded):
    own = applied(tmp_path, kind="sqlite")
    own.write_to_online_store("activity", frame(NOW.replace(microsecond=0)))
    expected = read(own, ["ann", "bob"], TYPES)
    connection = own._get_provider().online_store._get_conn(own.config)
    if guarded:  # the column of our own earlier version
        connection.execute("ALTER TABLE test_activity ADD COLUMN event_us INTEGER")
        connection.execute("UPDATE test_activity SET event_us = ?", [int(NOW.timestamp()) * 1_000_000 + 5])
    connection.commit()
    connection.close()
    store = opened(tmp_path)
    with pytest.raises(OnlineStoreError, match="run `feast apply`"):
        store.write_to_online_store("activity", frame())
    caplog.set_level("INFO")
    store.apply([view(tmp_path, TYPES)])
    assert read(store, ["ann", "bob"], TYPES) == expected
    assert [getattr(record, "entities", None) for record in caplog.records if "converted" in record.message] == [2]
    newest = store._get_provider().online_store.newest_event_us(store.config, view(tmp_path, ["edits"]))
    assert newest == int(NOW.timestamp()) * 1_000_000 + 5 * guarded
    with sqlite3.connect(tmp_path / "online.db") as file:
        assert {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")} == {
            "_layouts",
            "test_activity",
        }
    store.apply([view(tmp_path, TYPES)])
    assert read(store, ["bob"], ["edits"]) == {"edits": [-1]}


def test_a_conversion_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    own = applied(tmp_path, ["edits"], kind="sqlite")
    own.write_to_online_store("activity", frame()[["user", "event_timestamp", "edits"]])
    own._get_provider().online_store._get_conn(own.config).close()
    store = opened(tmp_path)
    monkeypatch.setattr(sqlite_store, "encode_values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.apply([view(tmp_path, ["edits"])])
    monkeypatch.undo()
    store.apply([view(tmp_path, ["edits"])])
    assert read(store, ["ann"], ["edits"]) == {"edits": [3]}


def test_teardown_and_deletion_remove_tables_and_files(tmp_path, store):
    store.write_to_online_store("activity", frame())
    store.apply([], objects_to_delete=[store.get_feature_view("activity")], partial=False)
    with sqlite3.connect(tmp_path / "online.db") as file:
        assert ("test_activity",) not in file.execute("SELECT name FROM sqlite_master").fetchall()
    store.apply([USER, view(tmp_path, TYPES)])
    assert read(store, ["ann"], ["edits"]) == {"edits": [None]}
    store.teardown()
    assert not list(tmp_path.glob("online.db*[!k]"))
    again = applied(tmp_path)
    again.write_to_online_store("activity", frame())
    assert read(again, ["ann"], ["edits"]) == {"edits": [3]}


def test_threads_and_stores_of_one_file_take_turns(tmp_path, store):
    stores = [store, store, opened(tmp_path), opened(tmp_path)]

    def write(number: int, each: FeatureStore) -> None:
        online, table = each._get_provider().online_store, each.get_feature_view("activity")
        for at in range(20):
            times = np.array([10 * at + number] * 50)
            features = pa.table({"edits": pa.array(times)})
            online.write_columns(each.config, table, pa.array([f"u{row}" for row in range(50)]), times, features)

    threads = [threading.Thread(target=write, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read(store, [f"u{row}" for row in range(50)], ["edits"])["edits"]) == {193}


def test_search_is_refused(tmp_path, store):
    with pytest.raises(OnlineStoreError, match="no vector or text search"):
        store._get_provider().online_store.retrieve_online_documents_v2()
