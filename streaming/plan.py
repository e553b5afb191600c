"""What to compute over a topic: a Feast StreamFeatureView compiled into an immutable plan, or refused in a sentence.

Feast takes seconds to import, so it is imported where a view is compiled and not by the workers that run a plan.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

if TYPE_CHECKING:
    from feast import FeatureStore
    from feast.stream_feature_view import StreamFeatureView

EntityType = Literal["string", "int64"]
WindowKind = Literal["sliding", "session", "last", "lifetime"]
Role = Literal["number", "hash", "text"]
ColumnType = Literal["tinyint", "smallint", "int", "bigint", "float", "double", "boolean", "string"]

_SPARK_NAMES: dict[str, ColumnType] = {
    "byte": "tinyint",
    "short": "smallint",
    "integer": "int",
    "long": "bigint",
    "real": "float",
}
_FIELD = re.compile(
    r"\s*(?:`(?P<quoted>[^`]+)`|(?P<name>\w+))(?:\s*:\s*|\s+)(?P<type>.+?)(?P<required>\s+not\s+null)?\s*",
    re.IGNORECASE,
)
FUNCTIONS = (
    *("count", "sum", "mean", "min", "max", "std", "var", "first", "last", "count_distinct"),
    *("p1 to p99", "top_1 to top_100", "decayed_mean"),
)
_ALIASES = {"avg": "mean", "stddev": "std", "variance": "var", "nunique": "count_distinct"}
_OF_TEXT = {"count", "first", "last", "count_distinct"}
_DURATION = re.compile(r"(\d+) ?(us|ms|s|m|h|d)")
_UNITS_US = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_TAG = "millrace."
_MAX_LAST = 10_000
_MAX_SESSIONS = 1_000
_FEAST_HOP_SIZE = timedelta(minutes=5)
_ENTITY_TYPES: dict[str, EntityType] = {"STRING": "string", "INT64": "int64", "INT32": "int64"}
_INTEGERS = {"tinyint", "smallint", "int", "bigint"}


class PlanError(ValueError):
    """A view that does not exist or that cannot be computed, in one sentence."""


@dataclass(frozen=True)
class Column:
    """A field of the events that aggregates read; where not nullable, an event without it is refused.

    Its value is a number (0.0 where text is only counted), a hash of its text, or the number of its text.
    """

    name: str
    type: ColumnType
    nullable: bool
    role: Role = "number"


@dataclass(frozen=True)
class Aggregate:
    """A function over windows of one column.

    Attributes:
        name: Of the feature.
        column: Its field.
        function: count, sum, mean, min, max, std, var (of the sample), first, last (by event time), count_distinct,
            p1 to p99, top_1 to top_100, decayed_mean.
        window_us: Length of a sliding window, gap of a session, half-life of a decayed mean.
        slide_us: Sliding windows are [E - window, E) for every E that is a multiple of it since 1970 UTC.
        kind: "sliding"; "session", events less than a gap apart; "last", the last `size` events; "lifetime", all.
        size: How many events a window by count holds.
    """

    name: str
    column: str
    function: str
    window_us: int = 0
    slide_us: int = 0
    kind: WindowKind = "sliding"
    size: int = 0

    @property
    def quantile(self) -> float | None:
        """The quantile of p1 to p99."""
        match = re.fullmatch(r"p(\d\d?)", self.function)
        return int(match[1]) / 100 if match and match[1] not in ("0", "00") else None

    @property
    def top(self) -> int | None:
        """The k of top_k."""
        match = re.fullmatch(r"top_(\d{1,3})", self.function)
        return int(match[1]) if match and 1 <= int(match[1]) <= 100 else None

    def fits(self, declared: ColumnType) -> bool:
        """Whether the function is defined for values of a type."""
        if declared == "string":
            return self.top is not None or self.function in _OF_TEXT
        return self.top is None

    @property
    def known(self) -> bool:
        """Whether the function is one that can be computed."""
        return (
            self.function in FUNCTIONS[:10]
            or self.function == "decayed_mean"
            or self.quantile is not None
            or self.top is not None
        )


@dataclass(frozen=True)
class Plan:
    """What one view computes over one topic.

    Attributes:
        view: Name of the StreamFeatureView.
        topic: Of JSON objects, read from `bootstrap_servers`.
        entity: Field that holds the entity, the view's join key.
        timestamp: Field that holds the event time.
        columns: The fields that aggregates read, each once.
        aggregates: In the order of the view; the slide of each divides its window.
        delay_us: How far the watermark stays behind the clock.
        future_us: Events further ahead of the wall clock than this are refused.
        emission: "fresh" windows as they fill, or "final" ones, once when the watermark has passed their end.
        lateness_us: For how long after that events still revise them.
        clocks: Whether event time is that of a partition or of each entity.
        changelog: Topic to which changed features are published; none where empty.
        idle_ttl_us: An entity without events for longer is forgotten; 0 keeps lifetime and count windows for ever.
    """

    view: str
    topic: str
    bootstrap_servers: str
    entity: str
    entity_type: EntityType
    timestamp: str
    columns: tuple[Column, ...]
    aggregates: tuple[Aggregate, ...]
    delay_us: int
    future_us: int = 3_600_000_000
    emission: Literal["fresh", "final"] = "fresh"
    lateness_us: int = 0
    clocks: Literal["partition", "key"] = "partition"
    idle_ttl_us: int = 0
    changelog: str = ""

    @property
    def fingerprint(self) -> str:
        """A sha256 of everything that changes the state; feature names and the broker's address do not."""
        what = asdict(self)
        for name in ("bootstrap_servers", "future_us", "changelog"):
            del what[name]
        for aggregate in what["aggregates"]:
            del aggregate["name"]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def column_of(self, aggregate: Aggregate) -> int:
        """The number of the column that an aggregate reads."""
        for at, column in enumerate(self.columns):
            if column.name == aggregate.column and column.role == role(aggregate.function, column.type):
                return at
        raise KeyError(aggregate.column)


def role(function: str, declared: ColumnType) -> Role:
    """What a function needs of a column's values."""
    if declared != "string" or function == "count":
        return "number"
    return "hash" if function == "count_distinct" else "text"


def plans(store: "FeatureStore", views: Sequence[str] | None = None) -> list[Plan]:
    """The plans of the named StreamFeatureViews of a registry, or of all of them, by name.

    Raises:
        PlanError: A view is unknown or cannot be computed.
    """
    known = {view.name: view for view in store.list_stream_feature_views()}
    compiled = []
    for name in sorted(known) if views is None else views:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"did you mean '{near[0]}'?" if near else "it holds none; declare one and run `feast apply`."
            raise PlanError(f"There is no stream feature view '{name}' in the registry; {hint}")
        view = known[name]
        if len(view.entities) != 1:
            raise PlanError(f"View '{name}' has {len(view.entities)} entities: give it exactly one.")
        entity = store.get_entity(view.entities[0])
        if entity.value_type.name not in _ENTITY_TYPES:
            raise PlanError(
                f"View '{name}': entity '{entity.name}' is of type {entity.value_type.name}: use STRING or INT64."
            )
        compiled.append(compile_view(view, entity.join_key, _ENTITY_TYPES[entity.value_type.name]))
    return compiled


def compile_view(view: "StreamFeatureView", join_key: str, entity_type: EntityType) -> Plan:
    """Compiles one view.

    Raises:
        PlanError: Names what is not supported.
    """
    from feast.data_format import JsonFormat
    from feast.data_source import KafkaSource

    where = f"View '{view.name}'"
    source = view.stream_source
    if not isinstance(source, KafkaSource):
        raise PlanError(f"{where} reads a {type(source).__name__}: only a KafkaSource can be computed.")
    if not isinstance(source.kafka_options.message_format, JsonFormat):
        raise PlanError(f"{where}: the message_format of source '{source.name}' must be a JsonFormat.")
    if source.field_mapping:
        raise PlanError(f"{where}: source '{source.name}' has a field_mapping, which is not supported: remove it.")
    if view.udf or view.feature_transformation:
        raise PlanError(
            f"{where} has a transformation (udf), which is not supported: aggregate the events' own fields."
        )
    if not view.aggregations:
        raise PlanError(f"{where} has no aggregations: give it at least one.")
    schema = _schema(where, source.kafka_options.message_format.schema_json)
    timestamp = view.timestamp_field or source.timestamp_field
    _check_type(where, schema, timestamp, "timestamp", {"timestamp", "timestamp_ntz", "string", "bigint"})
    _check_type(where, schema, join_key, "entity", {"string"} if entity_type == "string" else _INTEGERS)
    tags = _tags(where, view)
    aggregates = _aggregates(where, view, tags)
    plan = Plan(
        view=view.name,
        topic=source.kafka_options.topic,
        bootstrap_servers=source.kafka_options.kafka_bootstrap_servers,
        entity=join_key,
        entity_type=entity_type,
        timestamp=timestamp,
        columns=_columns(where, schema, aggregates, {join_key, timestamp}),
        aggregates=aggregates,
        delay_us=_us(source.kafka_options.watermark_delay_threshold or timedelta()),
        emission=_choice(where, tags, "emission", ("fresh", "final")),
        lateness_us=_duration_us(where, "allowed_lateness", tags.get("allowed_lateness", "0s")),
        clocks=_choice(where, tags, "clocks", ("partition", "key")),
        idle_ttl_us=_duration_us(where, "idle_ttl", tags.get("idle_ttl", "0s")),
        changelog=tags.get("changelog", ""),
    )
    check_together(where, plan)
    return plan


def _tags(where: str, view: "StreamFeatureView") -> dict[str, str]:
    """The tags that are ours, without their prefix."""
    tags = {name.removeprefix(_TAG): text for name, text in view.tags.items() if name.startswith(_TAG)}
    features = {aggregate.resolved_name(aggregate.time_window) for aggregate in view.aggregations}
    for name in tags:
        known = {"emission", "allowed_lateness", "clocks", "idle_ttl", "changelog"}
        known |= {f"window.{feature}" for feature in features}
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise PlanError(f"{where}: there is no tag '{_TAG}{name}'; did you mean '{_TAG}{near}'?")
    return tags


def _choice(where: str, tags: dict[str, str], name: str, choices: tuple[str, str]) -> Any:
    chosen = tags.get(name, choices[0])
    if chosen not in choices:
        raise PlanError(f"{where}: the tag '{_TAG}{name}' is '{chosen}': write {' or '.join(choices)}.")
    return chosen


def _duration_us(where: str, name: str, text: str) -> int:
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise PlanError(f"{where}: the tag '{_TAG}{name}' is '{text}': write a duration as 30s, 10m, 2h or 7d.")
    return int(match[1]) * _UNITS_US[match[2]]


def check_together(where: str, plan: Plan) -> None:
    """Makes sure that a plan's windows, emission and clocks go together.

    Raises:
        PlanError: Says what does not.
    """
    kinds = {aggregate.kind for aggregate in plan.aggregates}
    if plan.emission == "final":
        if kinds & {"last", "lifetime"}:
            raise PlanError(f"{where}: final values need windows that end: leave out those by count and of a lifetime.")
        if len(kinds) > 1:
            raise PlanError(
                f"{where}: final values of sessions and of sliding windows do not end together: make two views."
            )
        if len({aggregate.window_us for aggregate in plan.aggregates if aggregate.kind == "session"}) > 1:
            raise PlanError(
                f"{where}: final values of sessions with different gaps do not end together: make two views."
            )
        if plan.clocks == "key":
            raise PlanError(f"{where}: final values follow the clock of the partition: leave out '{_TAG}clocks: key'.")
    for aggregate in plan.aggregates:
        if aggregate.kind == "session" and (plan.delay_us + plan.lateness_us) // aggregate.window_us > _MAX_SESSIONS:
            raise PlanError(
                f"{where}: the gap of '{aggregate.name}' is so much shorter than the watermark's delay that more than"
                f" {_MAX_SESSIONS} sessions of an entity can be open: make the gap longer or the delay shorter."
            )


def _aggregates(where: str, view: "StreamFeatureView", tags: dict[str, str]) -> tuple[Aggregate, ...]:
    hop_size = view.tiling_hop_size or (_FEAST_HOP_SIZE if view.enable_tiling else None)
    aggregates: list[Aggregate] = []
    for declared in view.aggregations:
        what = f"{where}, aggregation {declared.function} of '{declared.column}'"
        name = declared.resolved_name(declared.time_window)
        function = _ALIASES.get(declared.function, declared.function)
        window = tags.get(f"window.{name}")
        if window is not None:
            aggregate = _tagged(where, Aggregate(name, declared.column, function), window)
        elif declared.time_window is None or function == "decayed_mean":
            length_us = _us(declared.time_window or timedelta())
            aggregate = Aggregate(name, declared.column, function, length_us, kind="lifetime")
        else:
            length, slide = declared.time_window, declared.slide_interval or declared.time_window
            if slide == length and hop_size:  # Feast stores the window as the slide where none was declared
                slide = hop_size
            if slide <= timedelta() or length % slide:
                raise PlanError(f"{what}: the slide of {slide} must divide the window of {length}.")
            aggregate = Aggregate(name, declared.column, function, _us(length), _us(slide))
        if not aggregate.known:
            raise PlanError(f"{what}: the function must be one of {', '.join(FUNCTIONS)}.")
        if function == "decayed_mean" and (aggregate.kind != "lifetime" or not aggregate.window_us):
            raise PlanError(f"{what}: it decays over its time_window, the half-life: give it that and no other window.")
        if name in {aggregate.name for aggregate in aggregates}:
            raise PlanError(f"{what}: another aggregation is called '{name}' already: set its name=.")
        aggregates.append(aggregate)
    return tuple(aggregates)


def _tagged(where: str, aggregate: Aggregate, text: str) -> Aggregate:
    """An aggregate with the window that a tag gives it."""
    kind, _, argument = text.strip().partition(" ")
    name = f"window.{aggregate.name}"
    if kind == "session":
        gap_us = _duration_us(where, name, argument)
        if gap_us:
            return replace(aggregate, kind="session", window_us=gap_us)
    if kind == "last" and argument.strip().isdigit() and 1 <= int(argument) <= _MAX_LAST:
        return replace(aggregate, kind="last", size=int(argument))
    raise PlanError(
        f"{where}: the tag '{_TAG}{name}' is '{text}': write 'session 30m', or 'last 50' up to {_MAX_LAST}."
    )


def _columns(
    where: str, schema: dict[str, tuple[str, bool]], aggregates: tuple[Aggregate, ...], keys: set[str]
) -> tuple[Column, ...]:
    columns: dict[tuple[str, Role], Column] = {}
    for aggregate in aggregates:
        name = aggregate.column
        if name in keys:
            if aggregate.function != "count":
                raise PlanError(f"{where}: '{name}' is the entity or the timestamp: it can be counted only.")
            columns[name, "number"] = Column(name, "string", nullable=False)
            continue
        allowed = {declared for declared in get_args(ColumnType) if aggregate.fits(declared)}
        _check_type(where, schema, aggregate.column, f"{aggregate.function} column", allowed)
        declared, nullable = schema[aggregate.column]
        column_type = cast(ColumnType, declared)
        needed = role(aggregate.function, column_type)
        columns[name, needed] = Column(aggregate.column, column_type, nullable, needed)
    return tuple(columns.values())


def _check_type(where: str, schema: dict[str, tuple[str, bool]], name: str, role: str, allowed: set[str]) -> None:
    if name not in schema:
        raise PlanError(f"{where}: the {role} '{name}' is not in the JsonFormat schema ({', '.join(schema)}).")
    if schema[name][0] not in allowed:
        choice = ", ".join(sorted(allowed))
        raise PlanError(f"{where}: the {role} '{name}' is declared {schema[name][0]}, which is not one of {choice}.")


def _schema(where: str, ddl: str) -> dict[str, tuple[str, bool]]:
    """Name to (type, nullable) of a schema in Spark's DDL, the format of Feast's JsonFormat."""
    schema = {}
    for text in _split(ddl):
        match = _FIELD.fullmatch(text)
        if not match:
            raise PlanError(f'{where}: cannot read "{text.strip()}" in the JsonFormat schema: write "name type, ...".')
        declared = match["type"].lower()
        schema[match["quoted"] or match["name"]] = (_SPARK_NAMES.get(declared, declared), match["required"] is None)
    return schema


def _split(ddl: str) -> list[str]:
    parts, depth = [""], 0
    for character in ddl:
        depth += (character in "<(") - (character in ">)")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _us(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)
