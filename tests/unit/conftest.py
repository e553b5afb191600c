"""Fixtures of the unit tests of workers."""

from pathlib import Path

import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, Int64, String

from tests.worker_world import Steps, World, config, finish


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("applied")
    store = FeatureStore(config=config(folder, folder / "registry.db"))
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    fields = [Field(name="user", dtype=String), Field(name="edits", dtype=Int64), Field(name="mean", dtype=Float64)]
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    store.apply([user, FeatureView(name="activity", entities=[user], schema=fields, source=source)])
    store._get_provider().online_store._get_conn(store.config).close()  # leaves one file to copy, without a WAL
    return folder


@pytest.fixture
def undisturbed(tmp_path, applied):
    world = World(tmp_path / "undisturbed", applied)
    steps = Steps()
    worker = world.worker(steps)
    status = finish(worker)
    return world, steps, status
