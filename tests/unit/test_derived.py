"""Declarations of derived topics: what comes out of them, what the registry keeps, and what is refused."""

from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat, ProtoFormat
from feast.stream_feature_view import StreamFeatureView
from feast.types import Int64, String

from streaming.ddl import read_schema, write_schema
from streaming.derived import as_of_join, feature_lookup, interval_join, rekeyed, table_lookup
from streaming.deriving.derivation import TAG, Derivation
from streaming.deriving.topology import SupervisorError, check_partitions, stages
from streaming.plan import Plan, PlanError
from streaming.views import derivations, plans

MINUTE_US = 60_000_000


def source(name: str, schema: str, delay_s: int = 60, **options) -> KafkaSource:
    return KafkaSource(
        **{
            "name": name,
            "topic": name,
            "kafka_bootstrap_servers": "here:9092",
            "message_format": JsonFormat(schema_json=schema),
            "timestamp_field": "time",
            "watermark_delay_threshold": timedelta(seconds=delay_s),
        }
        | options
    )


EDITS = source("edits", "time timestamp, user string, page string not null, added bigint")
PREDICTIONS = source("predictions", "id string, time timestamp, score double", delay_s=10)
LABELS = source("labels", "id string, time timestamp, label string", delay_s=90)
LOG = FileSource(
    name="log",
    path="log/*.parquet",
    file_format=ParquetFormat(),
    timestamp_field="event_timestamp",
    created_timestamp_column="created_timestamp",
)


def spec(made: KafkaSource) -> Derivation:
    return Derivation.from_json(made.name, made.tags[TAG])


def fields(made: KafkaSource) -> dict:
    return read_schema("", made.kafka_options.message_format.schema_json)


def test_a_rekeyed_source_is_the_old_one_under_another_name_and_key():
    made = rekeyed("by_page", EDITS, key="page", batch_source=LOG)
    assert (made.kafka_options.topic, made.kafka_options.kafka_bootstrap_servers) == ("by_page", "here:9092")
    assert fields(made) == fields(EDITS)
    assert (made.timestamp_field, made.batch_source) == ("time", LOG)
    assert spec(made).key == "page"
    # Several partitions meet in one: it waits for what they may be apart, as long as for what is out of order.
    assert made.kafka_options.watermark_delay_threshold == timedelta(minutes=2)
    assert spec(made).drift_us == MINUTE_US


def test_an_interval_join_waits_for_the_last_partner_of_either_side():
    made = interval_join(
        "labelled", PREDICTIONS, LABELS, on="id", earliest=timedelta(seconds=-5), latest=timedelta(hours=1)
    )
    assert fields(made) == fields(PREDICTIONS) | {
        "labels_id": ("string", True),
        "labels_time": ("timestamp", True),
        "labels_label": ("string", True),
    }
    assert made.kafka_options.watermark_delay_threshold == timedelta(hours=1, seconds=95)
    found = spec(made)
    assert (found.key, found.earliest_us, found.latest_us, found.unmatched) == ("id", -5_000_000, 3_600_000_000, False)
    assert [each.topic for each in found.inputs] == ["predictions", "labels"]
    assert found.drift_us == 0  # the same key: what comes out lies in the partition of what came in


def test_a_join_under_another_key_waits_for_the_drift_too():
    made = as_of_join("priced", EDITS, source("prices", "time timestamp, page string"), on="page", key="user")
    assert (spec(made).drift_us, spec(made).delay_us) == (MINUTE_US, 2 * MINUTE_US)
    assert spec(made).tolerance_us is None


def test_a_table_gives_its_columns_that_a_view_can_read(tmp_path):
    columns = {
        "user": pa.array(["a"]),
        "valid_from": pa.array([0], pa.timestamp("us", "UTC")),
        "age": pa.array([1], pa.int32()),
        "tags": pa.array([["x"]]),
    }
    pq.write_table(pa.table(columns), tmp_path / "accounts.parquet")
    table = FileSource(name="accounts", path=str(tmp_path / "*.parquet"), timestamp_field="valid_from")
    made = table_lookup("described", EDITS, table, on="user")
    assert {name: kind for name, kind in fields(made).items() if name not in fields(EDITS)} == {
        "accounts_user": ("string", True),
        "accounts_valid_from": ("timestamp", True),
        "accounts_age": ("int", True),
    }
    with pytest.raises(PlanError, match="has no column 'page'"):
        table_lookup("described", EDITS, table, on="page")
    with pytest.raises(PlanError, match="cannot be read"):
        table_lookup(
            "x", EDITS, FileSource(name="t", path=str(tmp_path / "no.parquet"), timestamp_field="t"), on="user"
        )


def test_looked_up_features_are_doubles_unless_said_otherwise():
    made = feature_lookup("enriched", EDITS, ["activity:sum_1h", "activity:country string"], on="user")
    assert fields(made)["activity_sum_1h"] == ("double", True)
    assert fields(made)["activity_country"] == ("string", True)
    assert spec(made).features == (
        ("activity_sum_1h", "activity:sum_1h"),
        ("activity_country", "activity:country"),
    )
    with pytest.raises(PlanError, match="write the feature 'sum_1h' as 'view:feature'"):
        feature_lookup("enriched", EDITS, ["sum_1h"], on="user")


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: rekeyed("x", EDITS, key="pages"), r"the field 'pages' is not in the schema of what comes out \(time"),
        (lambda: rekeyed("x", EDITS, key="time"), "'time' of what comes out is declared timestamp: a key must be"),
        (lambda: rekeyed("x", LOG, key="page"), "reads a FileSource: only a KafkaSource"),
        (
            lambda: rekeyed("x", source("p", "", message_format=ProtoFormat("")), key="page"),
            "message_format of source 'p' must be a JsonFormat",
        ),
        (lambda: rekeyed("x", source("p", "a string"), key="a"), "timestamp 'time' is not in the schema of 'p'"),
        (
            lambda: interval_join("x", EDITS, LABELS, "user", timedelta(0), timedelta(1)),
            "the field 'user' is not in the schema of source 'labels'",
        ),
        (
            lambda: interval_join("x", PREDICTIONS, LABELS, "id", timedelta(1), timedelta(0)),
            r"earliest \(1 day, 0:00:00\) must not be after latest",
        ),
        (
            lambda: as_of_join("x", EDITS, source("p", "time timestamp, user bigint"), on="user"),
            "'user' is a string on one side and an integer on the other",
        ),
        (
            lambda: as_of_join(
                "x",
                source("l", "time timestamp, u string, p_time string"),
                source("p", "time timestamp, u string"),
                on="u",
            ),
            "both sides give a field 'p_time'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(declare, words):
    with pytest.raises(PlanError, match=words):
        declare()


def view(name: str, read: KafkaSource, entity: Entity) -> StreamFeatureView:
    return StreamFeatureView(
        name=name,
        entities=[entity],
        source=read,
        timestamp_field="time",
        aggregations=[Aggregation(name="edits", column="added", function="count", time_window=timedelta(hours=1))],
        schema=[Field(name=entity.join_key, dtype=String), Field(name="edits", dtype=Int64)],
    )


def applied(folder, *objects) -> FeatureStore:
    (folder / "feature_store.yaml").write_text(
        "project: derived\nprovider: local\nregistry: registry.db\nonline_store:\n  path: online.db\n"
        "entity_key_serialization_version: 3\n"
    )
    store = FeatureStore(repo_path=str(folder))
    store.apply(list(objects))
    return FeatureStore(repo_path=str(folder))


def test_the_registry_keeps_what_a_view_needs_derived_and_in_which_order(tmp_path):
    user, page = (Entity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in ("user", "page"))
    accounts = source("accounts", "time timestamp, user string, age bigint")
    joined = as_of_join("aged", EDITS, accounts, on="user", batch_source=LOG)
    by_page = rekeyed("by_page", joined, key="page", batch_source=LOG)
    edits = source("edits", EDITS.kafka_options.message_format.schema_json, batch_source=LOG)
    store = applied(
        tmp_path, user, page, view("pages", by_page, page), view("users", joined, user), view("plain", edits, user)
    )
    names = ["pages", "plain", "users"]
    found = derivations(store, names)
    assert [one.name for one in found] == ["aged", "by_page"]
    assert found[0] == spec(joined)
    assert found[1].inputs[0].schema == joined.kafka_options.message_format.schema_json
    assert derivations(store, ["plain"]) == []
    everything = [*found, *plans(store, names)]
    assert [[one.view for one in stage] for stage in stages(everything)] == [
        ["aged", "plain"],
        ["by_page", "users"],
        ["pages"],
    ]
    moved = [one.at("there:1") for one in everything]
    assert {each.bootstrap_servers for each in moved} == {"there:1"}
    assert [one.fingerprint for one in moved] == [one.fingerprint for one in everything]


def test_two_meanings_of_a_name_are_refused(tmp_path):
    user, page = (Entity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in ("user", "page"))
    one = rekeyed("again", rekeyed("by_page", EDITS, key="page"), key="user", batch_source=LOG)
    two = rekeyed("by_page", EDITS, key="user", batch_source=LOG)
    store = applied(tmp_path, user, page, view("one", one, user), view("two", two, user))
    with pytest.raises(PlanError, match="'by_page' is declared in two ways"):
        derivations(store, ["one", "two"])
    same = applied(tmp_path, user, view("again", one, user))
    with pytest.raises(PlanError, match="view and a derived topic are both called 'again'"):
        derivations(same, ["again"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "cannot be read"),
        ("[", "cannot be read"),
        (spec(rekeyed("x", EDITS, key="page")).to_json().replace('"rekeyed"', '"shuffled"'), "derived by 'shuffled'"),
    ],
)
def test_a_tag_of_something_else_is_refused(text, words):
    with pytest.raises(PlanError, match=words):
        Derivation.from_json("x", text)


def test_joined_topics_need_equally_many_partitions():
    joined = spec(interval_join("labelled", PREDICTIONS, LABELS, "id", timedelta(0), timedelta(1)))
    check_partitions(joined, {"predictions": 2, "labels": 2})
    with pytest.raises(SupervisorError, match="'predictions' with 2 partitions and 'labels' with 1"):
        check_partitions(joined, {"predictions": 2, "labels": 1})
    plan = Plan("v", "t", "", "e", "string", "time", (), (), 0)
    check_partitions(plan, {"t": 3})


def test_a_schema_is_written_as_it_is_read():
    ddl = "a string, `b c` bigint not null, d map<string, double>"
    assert read_schema("", write_schema(read_schema("", ddl))) == read_schema("", ddl)
