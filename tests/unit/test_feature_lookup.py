"""The look-up in Feast against Feast's own reading of a real sqlite store."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, Float64, Int64, String

from streaming.deriving.derivation import Derivation, Input
from streaming.deriving.feature_lookup import FeatureLookup
from streaming.plan import PlanError
from streaming.records import RecordBatch

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NOW_US = int(NOW.timestamp()) * 1_000_000
EDITS = Input("edits", "edits", "", "user string, time timestamp", "time", 0)
FIELDS = {"edits": Int64, "mean": Float64, "page": String, "pages": Array(String)}
REFERENCES = [f"activity:{name}" for name in FIELDS]


def derivation(*references: str, source: Input = EDITS) -> Derivation:
    features = tuple((reference.replace(":", "_"), reference) for reference in references)
    return Derivation("enriched", "feature_lookup", (source,), "user", "", 0, on="user", features=features)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    folder: Path = tmp_path_factory.mktemp("feast")
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    device = Entity(name="device", join_keys=["device"], value_type=ValueType.INT64)

    def view(name, entity, kind, fields, ttl):
        schema = [Field(name=entity.join_key, dtype=kind), *(Field(name=each, dtype=fields[each]) for each in fields)]
        return FeatureView(name=name, entities=[entity], schema=schema, source=source, ttl=ttl)

    views = [
        view("activity", user, String, FIELDS, timedelta()),
        view("recent", user, String, {"edits": Int64}, timedelta(hours=1)),
        view("devices", device, Int64, {"reads": Int64}, timedelta()),
    ]
    store.apply([user, device, *views])
    rows = pd.DataFrame(
        {
            "user": [f"user-{n}" for n in range(1_500)] + ["é"],
            "edits": range(1_501),
            "mean": [None if n % 3 == 0 else n / 7 for n in range(1_501)],
            "page": [None if n % 5 == 0 else f'"{n}"' for n in range(1_501)],
            "pages": [["a", str(n)] for n in range(1_501)],
            "event_timestamp": [NOW - timedelta(minutes=30 if n % 2 else 90) for n in range(1_501)],
        }
    )
    store.write_to_online_store("activity", rows)
    store.write_to_online_store("recent", rows[["user", "edits", "event_timestamp"]])
    devices = pd.DataFrame({"device": [7], "reads": [70], "event_timestamp": [NOW]})
    store.write_to_online_store("devices", devices)
    return store


def edits(*users: str) -> RecordBatch:
    return RecordBatch.of_values([json.dumps({"user": user, "time": 5}).encode() for user in users], 0)


def test_events_get_what_feast_reads_in_one_question_of_each_key(store):
    users = ["user-3", "nobody", "é", "user-3", *(f"user-{n}" for n in range(0, 1_400, 2)), "user-15"]
    given_ = FeatureLookup(derivation(*REFERENCES), store).process(0, edits(*users), NOW_US)
    expected = store.get_online_features(features=REFERENCES, entity_rows=[{"user": user} for user in users]).to_dict()
    assert given_.keys == [user.encode() for user in users]
    for row, value in enumerate(given_.values):
        event = json.loads(value)
        assert event == {"user": users[row], "time": 5} | {f"activity_{name}": expected[name][row] for name in FIELDS}
        assert value.startswith(json.dumps({"user": users[row], "time": 5}).encode()[:-1])


def test_a_feature_older_than_the_ttl_of_its_view_is_null(store):
    lookup = FeatureLookup(derivation("recent:edits", "activity:edits"), store)
    found = [json.loads(value) for value in lookup.process(0, edits("user-1", "user-2"), NOW_US).values]
    assert [(event["recent_edits"], event["activity_edits"]) for event in found] == [(1, 1), (None, 2)]


def test_integer_keys(store):
    source = replace(EDITS, schema="device bigint, time timestamp")
    what = replace(derivation("devices:reads", source=source), on="device", key="device")
    batch = RecordBatch.of_values([b'{"device":7,"time":1}', b'{"device":8,"time":1}'], 0)
    given_ = FeatureLookup(what, store).process(0, batch, NOW_US)
    assert given_.values == [
        b'{"device":7,"time":1,"devices_reads":70}',
        b'{"device":8,"time":1,"devices_reads":null}',
    ]
    assert given_.keys == [b"7", b"8"]


def test_unreadable_events_are_dead_and_an_empty_batch_asks_nothing(store, monkeypatch):
    lookup = FeatureLookup(derivation("activity:edits"), store)
    batch = RecordBatch.of_values([b"{", b'{"user":"user-1","time":1}', b'{"user":"a","time":9999999999999999}'], 0)
    given_ = lookup.process(0, batch, NOW_US)
    assert given_.keys == [b"user-1"]
    assert [(reject.kind, reject.offset) for _, reject in given_.rejects] == [("dead", 0), ("dead", 2)]
    monkeypatch.setattr(store, "get_online_features", None)
    assert lookup.process(0, edits(), NOW_US).values == []


def test_a_store_that_is_away_changes_nothing_and_is_asked_again(store, monkeypatch):
    lookup = FeatureLookup(derivation("activity:edits"), store)
    with monkeypatch.context() as away:
        away.setattr(store, "get_online_features", lambda **_: 1 / 0)
        with pytest.raises(OSError, match="The feature store does not answer"):
            lookup.process(0, edits("user-1"), NOW_US)
    assert lookup.clocks_us[0] < 0
    assert json.loads(lookup.process(0, edits("user-1"), NOW_US).values[0])["activity_edits"] == 1


@pytest.mark.parametrize(
    "reference, match",
    [
        ("nothing:edits", "no feature view 'nothing'"),
        ("activity:nothing", "no feature 'nothing'"),
        ("devices:reads", "keyed by device, not by 'user'"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(store, reference, match):
    with pytest.raises(PlanError, match=match):
        FeatureLookup(derivation(reference), store)
