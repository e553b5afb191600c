"""The guarded Redis store over a real server: Feast reads what we write, and no race lets an older row win."""

import asyncio
import shutil
import signal
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Float64, Int64, String

from ops.ports import free_ports
from streaming.records import Emission
from streaming.sinks import OnlineSink

redis = pytest.importorskip("redis", reason="the extra `redis` is not installed")
BINARY = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(BINARY is None, reason="no redis-server binary: apt-get install redis-server")

AT_US = 1_700_000_000_250_001
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Server:
    """A redis-server on a free loopback port with its data in a folder of the test's."""

    def __init__(self, folder, *options: str):
        (self.port,) = free_ports(1)
        self.command = [BINARY, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self.command += ["--appendonly", "no", "--logfile", str(folder / "redis.log"), *options]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command)
        self.client = redis.Redis(port=self.port)
        for _ in range(200):
            try:
                self.client.ping()
                return
            except redis.exceptions.ConnectionError:
                assert self.process.poll() is None, "redis-server ended"
                time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


class Store(FeatureStore):
    """Offers a plain FeatureView under the name of a stream view: the sink reads its name and fields only."""

    def get_stream_feature_view(self, name, **_):
        return self.get_feature_view(name)


def applied(folder, port: int, kind="streaming.redis_store.GuardedRedisOnlineStore", **options) -> Store:
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / f"{kind[-8:]}.registry"),
        online_store={"type": kind, "connection_string": f"127.0.0.1:{port}", **options},
        entity_key_serialization_version=3,
    )
    store = Store(config=config)
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    types = {"edits": Int64, "mean": Float64, "page": String, "top": Array(String)}
    schema = [Field(name="user", dtype=String), *(Field(name=name, dtype=dtype) for name, dtype in types.items())]
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    store.apply([user, FeatureView(name="activity", entities=[user], schema=schema, source=source)])
    return store


@pytest.fixture
def store(tmp_path, server) -> Store:
    server.client.flushall()
    return applied(tmp_path, server.port)


def emission(users: list[str], times_us: list[int], edits: list[int]) -> Emission:
    columns = {
        "edits": pa.array(edits, pa.int64()),
        "mean": pa.array([None if edit % 2 else edit / 3 for edit in edits], pa.float64()),
        "page": pa.array([None if edit == 7 else f"é{edit}" for edit in edits]),
        "top": pa.array([["a"] * (edit % 3) for edit in edits], pa.list_(pa.string())),
    }
    return Emission(pa.array(users), np.array(times_us, dtype=np.int64), pa.table(columns))


def online(store, users, names=("edits", "mean", "page", "top")) -> dict:
    refs = [f"activity:{name}" for name in names]
    found = store.get_online_features(features=refs, entity_rows=[{"user": user} for user in users]).to_dict()
    return {name: found[name] for name in names}


def hashes(client) -> dict:
    return {key: client.hgetall(key) for key in client.keys("*")}


def test_what_is_kept_is_what_feasts_own_store_keeps(tmp_path, server, store):
    rows = emission(["ann", "böb", "cee"], [AT_US, AT_US + 1, -1_500_000], [1, 2, 7])
    OnlineSink(store, "activity").write([rows])
    ours = hashes(server.client)
    expected = {name: [*column, None] for name, column in rows.features.to_pydict().items()}
    assert online(store, ["ann", "böb", "cee", "nobody"]) == expected
    server.client.flushall()
    own = applied(tmp_path, server.port, "redis")
    OnlineSink(own, "activity").write([rows])
    assert hashes(server.client) == ours
    OnlineSink(store, "activity").write([emission(["ann"], [AT_US - 1], [5])])
    assert online(own, ["ann"], ["edits"]) == {"edits": [1]}


@pytest.mark.parametrize("at_us", [AT_US, 0, 1, -1, -1_000_000, -1_000_001, -(10**15), 10**15])
def test_the_guard_compares_microseconds_on_both_sides_of_the_epoch(store, at_us):
    sink = OnlineSink(store, "activity")
    for step_us, edits, expected in ((0, 1, 1), (-1, 2, 1), (-1_000_000, 3, 1), (0, 4, 4), (1, 5, 5), (10**6, 6, 6)):
        sink.write([emission(["old"], [at_us + step_us], [edits])])
        assert online(store, ["old"], ["edits"]) == {"edits": [expected]}


def proto_row(user: str, at_us: int, **values: Value):
    key = EntityKey(join_keys=["user"], entity_values=[Value(string_val=user)])
    return key, values, EPOCH + timedelta(microseconds=at_us), None


def test_feasts_own_writes_are_guarded_also_the_asynchronous_ones(store):
    online_store, view = store._get_provider().online_store, store.get_feature_view("activity")
    rows = [proto_row("ann", AT_US + at, edits=Value(int64_val=at)) for at in (1, 3, 2)]
    rows.append(proto_row("ann", AT_US + 3, page=Value(string_val="x")))
    done = []
    online_store.online_write_batch(store.config, view, rows, done.append)
    assert online(store, ["ann"], ["edits", "page"]) == {"edits": [3], "page": ["x"]}

    async def write():
        await online_store.online_write_batch_async(
            store.config, view, [proto_row("ann", AT_US + at, edits=Value(int64_val=at)) for at in (9, 4)], done.append
        )
        await online_store._client_async.aclose()

    asyncio.run(write())
    assert (online(store, ["ann"], ["edits"]), done) == ({"edits": [9]}, [4, 2])


def test_racing_writers_leave_the_newest_row(tmp_path, server, store):
    users = [f"user{number}" for number in range(300)]

    def write(number: int) -> None:
        sink, random = (
            OnlineSink(applied(tmp_path / str(number), server.port), "activity"),
            np.random.default_rng(number),
        )
        for at in random.permutation(15).tolist():
            sink.write([emission(users, [AT_US + 10 * at + number] * 300, [10 * at + number] * 300)])

    for number in range(4):
        (tmp_path / str(number)).mkdir()
    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(online(store, users, ["edits"])["edits"]) == {143}


def test_a_ttl_is_set_and_a_view_can_be_deleted(tmp_path, server):
    server.client.flushall()
    store = applied(tmp_path, server.port, key_ttl_seconds=100)
    OnlineSink(store, "activity").write([emission(["ann"], [AT_US], [1])])
    (key,) = server.client.keys("*")
    assert 0 < server.client.ttl(key) <= 100
    store._get_provider().online_store.delete_table(store.config, store.get_feature_view("activity"))
    assert server.client.keys("*") == []


def test_a_server_that_is_away_or_full_is_an_error_to_try_again(tmp_path):
    server = Server(tmp_path)
    sink = OnlineSink(applied(tmp_path, server.port), "activity")
    rows = [emission(["ann"], [AT_US], [1])]
    sink.write(rows)
    server.client.config_set("maxmemory", 1)
    with pytest.raises(ConnectionError, match="does not take writes"):
        sink.write(rows)
    server.stop()
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{server.port}"):
        sink.write(rows)
    server.start()
    assert sink.write(rows) == 1
    server.stop()


def test_a_cluster_takes_one_entity_a_call(tmp_path):
    (bus_port,) = free_ports(1)  # by default 10,000 above the server's, which need not be a port
    server = Server(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(bus_port))
    try:
        server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        for _ in range(200):
            if b"cluster_state:ok" in server.client.execute_command("CLUSTER", "INFO"):
                break
            time.sleep(0.05)
        store = applied(tmp_path, server.port, redis_type="redis_cluster")
        users = [f"user{number}" for number in range(50)]
        OnlineSink(store, "activity").write([emission(users, [AT_US] * 50, list(range(50)))])
        OnlineSink(store, "activity").write([emission(users, [AT_US - 1] * 50, [0] * 50)])
        assert online(store, users, ["edits"]) == {"edits": list(range(50))}
    finally:
        server.stop()
