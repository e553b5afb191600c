"""What becomes of a StreamFeatureView: the plan it means, or one sentence about what cannot be computed."""

import dataclasses
from datetime import timedelta
from types import SimpleNamespace

import pytest
from feast import Entity, FileSource, KafkaSource, PushSource
from feast.aggregation import Aggregation
from feast.data_format import AvroFormat, JsonFormat
from feast.stream_feature_view import StreamFeatureView
from feast.value_type import ValueType

from streaming.plan import Aggregate, Column, PlanError
from streaming.views import compile_view, plans

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
SCHEMA = "time timestamp, user string, added BIGINT NOT NULL, size: double, `odd name` int, tags map<string,array<int>>"
SUM = Aggregation(column="added", function="sum", time_window=HOUR)


def view(aggregations=(SUM,), schema=SCHEMA, source=None, **options) -> StreamFeatureView:
    files = FileSource(name="log", path="log/*.parquet", timestamp_field="time")
    source = source or KafkaSource(
        name="edits",
        topic="edits",
        kafka_bootstrap_servers="broker:9092",
        message_format=JsonFormat(schema_json=schema),
        timestamp_field="time",
        batch_source=files,
        watermark_delay_threshold=5 * MINUTE,
    )
    entity = Entity(name="editor", join_keys=["user"], value_type=ValueType.STRING)
    options = {"name": "activity", "entities": [entity], "timestamp_field": "time"} | options
    return StreamFeatureView(source=source, aggregations=list(aggregations), **options)


def test_compiles_windows_names_columns_and_delay():
    declared = [
        SUM,
        Aggregation(column="added", function="mean", time_window=HOUR, slide_interval=5 * MINUTE, name="pace"),
        Aggregation(column="odd name", function="count", time_window=10 * MINUTE, slide_interval=MINUTE),
        Aggregation(column="user", function="count", time_window=HOUR),
    ]
    plan = compile_view(view(declared), "user", "string")
    assert plan.aggregates == (
        Aggregate("sum_added_3600s", "added", "sum", 3_600_000_000, 3_600_000_000),
        Aggregate("pace", "added", "mean", 3_600_000_000, 300_000_000),
        Aggregate("count_odd name_600s", "odd name", "count", 600_000_000, 60_000_000),
        Aggregate("count_user_3600s", "user", "count", 3_600_000_000, 3_600_000_000),
    )
    assert plan.columns == (
        Column("added", "bigint", nullable=False),
        Column("odd name", "int", nullable=True),
        Column("user", "string", nullable=False),
    )
    assert (plan.view, plan.topic, plan.bootstrap_servers) == ("activity", "edits", "broker:9092")
    assert (plan.entity, plan.entity_type, plan.timestamp, plan.delay_us) == ("user", "string", "time", 300_000_000)


def test_the_hop_size_of_a_view_is_the_slide_of_what_declares_none():
    declared = [SUM, Aggregation(column="added", function="count", time_window=HOUR, slide_interval=30 * MINUTE)]
    plan = compile_view(view(declared, tiling_hop_size=10 * MINUTE), "user", "string")
    assert [aggregate.slide_us for aggregate in plan.aggregates] == [600_000_000, 1_800_000_000]


def test_fingerprint_changes_with_the_state_only():
    plan = compile_view(view(), "user", "string")
    renamed = dataclasses.replace(plan.aggregates[0], name="other")
    shorter = dataclasses.replace(plan.aggregates[0], slide_us=60_000_000)
    same = [dataclasses.replace(plan, bootstrap_servers="elsewhere"), dataclasses.replace(plan, aggregates=(renamed,))]
    different = [dataclasses.replace(plan, aggregates=(shorter,)), dataclasses.replace(plan, delay_us=0)]
    assert {other.fingerprint for other in same} == {plan.fingerprint}
    assert plan.fingerprint not in {other.fingerprint for other in different}


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        (Aggregation(column="added", function="median", time_window=HOUR), "must be one of count, sum, mean"),
        (Aggregation(column="added", function="decayed_mean"), "the half-life"),
        (
            Aggregation(column="added", function="top_3", time_window=HOUR),
            "declared bigint, which is not one of string",
        ),
        (
            Aggregation(column="added", function="sum", time_window=HOUR, slide_interval=7 * MINUTE),
            "must divide the window",
        ),
        (Aggregation(column="removed", function="sum", time_window=HOUR), "'removed' is not in the JsonFormat schema"),
        (Aggregation(column="tags", function="count", time_window=HOUR), "declared map<string,array<int>>"),
        (Aggregation(column="user", function="sum", time_window=HOUR), "can be counted only"),
        (Aggregation(column="added", function="sum", time_window=HOUR, slide_interval=MINUTE), "set its name="),
    ],
)
def test_refuses_what_it_cannot_compute(declared, sentence):
    with pytest.raises(PlanError, match=sentence) as caught:
        compile_view(view([SUM, declared]), "user", "string")
    assert "'activity'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_other_sources_and_formats():
    files = FileSource(name="log", path="log/*.parquet", timestamp_field="time")
    avro = KafkaSource(name="k", timestamp_field="time", message_format=AvroFormat("{}"), topic="t", batch_source=files)
    with pytest.raises(PlanError, match="only a KafkaSource"):
        compile_view(view(source=PushSource(name="pushed", batch_source=files)), "user", "string")
    with pytest.raises(PlanError, match="must be a JsonFormat"):
        compile_view(view(source=avro), "user", "string")
    with pytest.raises(PlanError, match="no aggregations"):
        compile_view(view([]), "user", "string")
    with pytest.raises(PlanError, match="entity 'user' is declared string"):
        compile_view(view(), "user", "int64")
    with pytest.raises(PlanError, match='cannot read "time"'):
        compile_view(view(schema="time, user string"), "user", "string")
    with pytest.raises(PlanError, match="timestamp 'time' is declared double"):
        compile_view(view(schema="time double, user string, added bigint"), "user", "string")


def test_tags_say_what_feast_has_no_place_for():
    declared = [
        SUM,
        Aggregation(column="added", function="avg", time_window=HOUR, name="visit"),
        Aggregation(column="added", function="p95", time_window=HOUR, name="recent"),
        Aggregation(column="added", function="count"),
        Aggregation(column="added", function="decayed_mean", time_window=HOUR),
    ]
    tags = {
        "millrace.clocks": "key",
        "millrace.allowed_lateness": "10m",
        "millrace.idle_ttl": "7d",
        "millrace.changelog": "activity.features",
        "millrace.window.visit": "session 30m",
        "millrace.window.recent": "last 50",
        "team": "growth",
    }
    plan = compile_view(view(declared, tags=tags), "user", "string")
    assert (plan.clocks, plan.lateness_us, plan.idle_ttl_us) == ("key", 600_000_000, 604_800_000_000)
    assert plan.changelog == "activity.features"
    assert [(each.kind, each.function, each.window_us, each.size) for each in plan.aggregates[1:]] == [
        ("session", "mean", 1_800_000_000, 0),
        ("last", "p95", 0, 50),
        ("lifetime", "count", 0, 0),
        ("lifetime", "decayed_mean", 3_600_000_000, 0),
    ]
    assert compile_view(view(tags={"millrace.emission": "final"}), "user", "string").emission == "final"


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"millrace.emision": "final"}, "did you mean 'millrace.emission'"),
        ({"millrace.emission": "sometimes"}, "write fresh or final"),
        ({"millrace.allowed_lateness": "soon"}, "write a duration"),
        ({"millrace.window.visits": "session 30m"}, "did you mean 'millrace.window.visit'"),
        ({"millrace.window.visit": "session"}, "write a duration"),
        ({"millrace.window.visit": "session 0s"}, "write 'session 30m'"),
        ({"millrace.window.visit": "last 0"}, "write 'session 30m'"),
        ({"millrace.window.visit": "last 9", "millrace.emission": "final"}, "windows that end"),
        ({"millrace.window.visit": "session 30m", "millrace.emission": "final"}, "make two views"),
        ({"millrace.clocks": "key", "millrace.emission": "final"}, "leave out 'millrace.clocks: key'"),
        ({"millrace.window.visit": "session 10ms"}, "sessions of an entity can be open"),
    ],
)
def test_refuses_tags_that_make_no_sense(tags, sentence):
    declared = [SUM, Aggregation(column="added", function="sum", time_window=HOUR, name="visit")]
    with pytest.raises(PlanError, match=sentence):
        compile_view(view(declared, tags=tags), "user", "string")


class Registry:
    """Stands for a Feast store: applying a repository takes a second and needs files."""

    def __init__(self, *views: StreamFeatureView, value_type: ValueType = ValueType.STRING) -> None:
        self._views = views
        self._value_type = value_type

    def list_stream_feature_views(self) -> list[StreamFeatureView]:
        return list(self._views)

    def get_entity(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, join_key="user", value_type=self._value_type)


def test_plans_of_a_registry():
    store = Registry(view(name="b_view"), view(name="a_view"))
    assert [plan.view for plan in plans(store)] == ["a_view", "b_view"]
    assert [plan.view for plan in plans(store, ["b_view"])] == ["b_view"]
    with pytest.raises(PlanError, match="'c_view'.*did you mean '[ab]_view'"):
        plans(store, ["c_view"])
    with pytest.raises(PlanError, match="feast apply"):
        plans(Registry(), ["c_view"])
    with pytest.raises(PlanError, match="use STRING or INT64"):
        plans(Registry(view(), value_type=ValueType.BYTES))
