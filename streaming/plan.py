"""What to compute over a topic: a Feast StreamFeatureView compiled into an immutable plan, or refused in a sentence.

Feast takes seconds to import, so it is imported where a view is compiled and not by the workers that run a plan.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    from feast import FeatureStore
    from feast.stream_feature_view import StreamFeatureView

EntityType = Literal["string", "int64"]
Function = Literal["count", "sum", "mean"]
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
_FEAST_HOP_SIZE = timedelta(minutes=5)
_ENTITY_TYPES: dict[str, EntityType] = {"STRING": "string", "INT64": "int64", "INT32": "int64"}
_INTEGERS = {"tinyint", "smallint", "int", "bigint"}


class PlanError(ValueError):
    """A view that does not exist or that cannot be computed, in one sentence."""


@dataclass(frozen=True)
class Column:
    """A field of the events that aggregates read; where not nullable, an event without it is refused."""

    name: str
    type: ColumnType
    nullable: bool


@dataclass(frozen=True)
class Aggregate:
    """A function over the windows [E - window, E) of every E that is a multiple of the slide since 1970 UTC."""

    name: str
    column: str
    function: Function
    window_us: int
    slide_us: int
    kind: Literal["sliding", "session", "last", "lifetime"] = "sliding"
    size: int = 0


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
        delay_us: How far the watermark stays behind the partition clock.
        future_us: Events further ahead of the wall clock than this are refused.
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

    @property
    def fingerprint(self) -> str:
        """A sha256 of everything that changes the state; feature names and the broker's address do not."""
        what = asdict(self)
        for name in ("bootstrap_servers", "future_us"):
            del what[name]
        for aggregate in what["aggregates"]:
            del aggregate["name"]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


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
    aggregates = _aggregates(where, view)
    return Plan(
        view=view.name,
        topic=source.kafka_options.topic,
        bootstrap_servers=source.kafka_options.kafka_bootstrap_servers,
        entity=join_key,
        entity_type=entity_type,
        timestamp=timestamp,
        columns=_columns(where, schema, aggregates, {join_key, timestamp}),
        aggregates=aggregates,
        delay_us=_us(source.kafka_options.watermark_delay_threshold or timedelta()),
    )


def _aggregates(where: str, view: "StreamFeatureView") -> tuple[Aggregate, ...]:
    hop_size = view.tiling_hop_size or (_FEAST_HOP_SIZE if view.enable_tiling else None)
    aggregates: list[Aggregate] = []
    for declared in view.aggregations:
        what = f"{where}, aggregation {declared.function} of '{declared.column}'"
        if declared.function not in get_args(Function):
            raise PlanError(f"{what}: the function must be one of {', '.join(get_args(Function))}.")
        if not declared.time_window:
            raise PlanError(f"{what}: give it a time_window.")
        window = declared.time_window
        slide = declared.slide_interval or window
        if slide == window and hop_size:  # Feast stores the window as the slide where none was declared
            slide = hop_size
        if slide <= timedelta() or window % slide:
            raise PlanError(f"{what}: the slide of {slide} must divide the window of {window}.")
        name = declared.resolved_name(window)
        if name in {aggregate.name for aggregate in aggregates}:
            raise PlanError(f"{what}: another aggregation is called '{name}' already: set its name=.")
        function = cast(Function, declared.function)
        aggregates.append(Aggregate(name, declared.column, function, _us(window), _us(slide)))
    return tuple(aggregates)


def _columns(
    where: str, schema: dict[str, tuple[str, bool]], aggregates: tuple[Aggregate, ...], keys: set[str]
) -> tuple[Column, ...]:
    columns: dict[str, Column] = {}
    for aggregate in aggregates:
        name = aggregate.column
        if name in keys:
            if aggregate.function != "count":
                raise PlanError(f"{where}: '{name}' is the entity or the timestamp: it can be counted only.")
            columns[name] = Column(name, "string", nullable=False)
            continue
        allowed = set(get_args(ColumnType))
        if aggregate.function != "count":
            allowed.remove("string")
        _check_type(where, schema, aggregate.column, f"{aggregate.function} column", allowed)
        declared, nullable = schema[aggregate.column]
        columns[aggregate.column] = Column(aggregate.column, cast(ColumnType, declared), nullable)
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
