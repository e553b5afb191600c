"""Feast's StreamFeatureViews compiled into plans, or refused in a sentence.

Feast takes seconds to import, so it is imported where a view is compiled and not by the workers that run a plan.
"""

import difflib
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from streaming.ddl import INTEGERS, read_schema
from streaming.deriving.derivation import TAG, Derivation
from streaming.model_tags import PREFIX, models
from streaming.plan import (
    FUNCTIONS,
    TEXTUAL,
    Aggregate,
    Column,
    ColumnType,
    EntityType,
    Model,
    Plan,
    PlanError,
    Role,
    role,
)

if TYPE_CHECKING:
    from feast import FeatureStore
    from feast.stream_feature_view import StreamFeatureView

log = logging.getLogger(__name__)

_ALIASES = {"avg": "mean", "stddev": "std", "variance": "var", "nunique": "count_distinct"}
_DURATION = re.compile(r"(\d+) ?(us|ms|s|m|h|d)")
_UNITS_US = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_TAG = "millrace."
_MAX_LAST = 10_000
_MAX_SESSIONS = 1_000
_FEAST_HOP_SIZE = timedelta(minutes=5)
_ENTITY_TYPES: dict[str, EntityType] = {"STRING": "string", "INT64": "int64", "INT32": "int64"}
_NUMBERS = INTEGERS | {"float", "double", "boolean"}


class LogPlace(NamedTuple):
    """Where the offline log of a view is: folder or URI of its Parquet parts, and the columns of the two times."""

    folder: str
    event_timestamp: str
    created_timestamp: str


def plans(
    store: "FeatureStore", views: Sequence[str] | None = None, bootstrap_servers: str | None = None
) -> list[Plan]:
    """The plans of the named StreamFeatureViews of a registry, or of all of them, by name.

    Args:
        store: Of the registry.
        views: Names; None for all.
        bootstrap_servers: The broker to read from instead of the one that the views name.

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
        plan = compile_view(view, entity.join_key, _ENTITY_TYPES[entity.value_type.name])
        compiled.append(plan.at(bootstrap_servers or plan.bootstrap_servers))
    return compiled


def derivations(store: "FeatureStore", views: Sequence[str], bootstrap_servers: str | None = None) -> list[Derivation]:
    """What must be derived for the named StreamFeatureViews, each after those that it reads.

    Args:
        store: Of the registry.
        views: Names.
        bootstrap_servers: The broker to use instead of the one that the sources name.

    Raises:
        PlanError: A derivation cannot be read, or two are called the same.
    """
    found: dict[str, Derivation] = {}
    for name in views:
        source = store.get_stream_feature_view(name).stream_source
        if source is not None and TAG in source.tags:
            _add(Derivation.from_json(source.name, source.tags[TAG]), found)
    for name in found:
        if name in views:
            raise PlanError(f"A view and a derived topic are both called '{name}': rename one.")
    return [each.at(bootstrap_servers or each.bootstrap_servers) for each in found.values()]


def log_place(store: "FeatureStore", view: str, home: Path) -> LogPlace:
    """The folder of a view's batch source, which must be a glob of Parquet files; else one under `home`, warned.

    A relative path is one in the Feast repository.
    """
    from feast import FileSource

    source = store.get_stream_feature_view(view).batch_source
    path = source.path if isinstance(source, FileSource) else ""
    folder, _, pattern = str(FileSource.get_uri_for_file_path(store.repo_path, path)).rpartition("/")
    if source is None or pattern != "*.parquet":
        folder = str(home / "features" / "offline" / view)
        log.warning(
            "the batch source is no glob of Parquet files (folder/*.parquet): the offline rows are elsewhere",
            extra={"view": view, "batch_source": path, "folder": folder},
        )
        return LogPlace(folder, "event_timestamp", "created_timestamp")
    return LogPlace(
        folder, source.timestamp_field or "event_timestamp", source.created_timestamp_column or "created_timestamp"
    )


def _add(derivation: Derivation, found: dict[str, Derivation]) -> None:
    for each in derivation.inputs:
        if each.derivation:
            _add(Derivation.from_json(each.name, each.derivation), found)
    if found.setdefault(derivation.name, derivation) != derivation:
        raise PlanError(
            f"The derived topic '{derivation.name}' is declared in two ways: import one declaration where it is used"
            " and run `feast apply` again."
        )


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
    if not view.aggregations:
        raise PlanError(f"{where} has no aggregations: give it at least one.")
    schema = read_schema(where, source.kafka_options.message_format.schema_json)
    timestamp = view.timestamp_field or source.timestamp_field
    _check_type(where, schema, timestamp, "timestamp", {"timestamp", "timestamp_ntz", "string", "bigint"})
    _check_type(where, schema, join_key, "entity", {"string"} if entity_type == "string" else INTEGERS)
    tags = _tags(where, view)
    fields, transformation, text = schema, *_transformation(where, view, tags)
    if transformation is not None:
        schema = _transformed(where, view, fields, transformation, (join_key, timestamp), entity_type)
    aggregates = _aggregates(where, view, tags)
    declared = models(where, tags)
    plan = Plan(
        view=view.name,
        topic=source.kafka_options.topic,
        bootstrap_servers=source.kafka_options.kafka_bootstrap_servers,
        entity=join_key,
        entity_type=entity_type,
        timestamp=timestamp,
        columns=_columns(where, schema, aggregates, declared, {join_key, timestamp}),
        aggregates=aggregates,
        delay_us=_us(source.kafka_options.watermark_delay_threshold or timedelta()),
        emission=_choice(where, tags, "emission", ("fresh", "final")),
        lateness_us=_duration_us(where, "allowed_lateness", tags.get("allowed_lateness", "0s")),
        clocks=_choice(where, tags, "clocks", ("partition", "key")),
        idle_ttl_us=_duration_us(where, "idle_ttl", tags.get("idle_ttl", "0s")),
        changelog=tags.get("changelog", ""),
        source=_source(fields, {join_key, timestamp}) if transformation is not None else (),
        transformation=transformation,
        transformation_text=text,
        models=declared,
    )
    check_together(where, plan)
    return plan


def _tags(where: str, view: "StreamFeatureView") -> dict[str, str]:
    """The tags that are ours, without their prefix."""
    tags = {name.removeprefix(_TAG): text for name, text in view.tags.items() if name.startswith(_TAG)}
    features = {aggregate.resolved_name(aggregate.time_window) for aggregate in view.aggregations}
    for name in tags:
        known = {"emission", "allowed_lateness", "clocks", "idle_ttl", "transformation", "changelog"}
        known |= {f"window.{feature}" for feature in features}
        if name not in known and not name.startswith(PREFIX):
            near = difflib.get_close_matches(name, sorted({*known, f"{PREFIX}COLUMN"}), n=1, cutoff=0.0)[0]
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


def _transformation(
    where: str, view: "StreamFeatureView", tags: dict[str, str]
) -> tuple[Callable[..., Any] | None, str]:
    """What the tag and the view's own udf do, one after the other, and their texts."""
    from streaming import transformations

    functions, texts = [], []
    if "transformation" in tags:
        try:
            functions.append(transformations.named(tags["transformation"]))
        except transformations.TransformationError as error:
            raise PlanError(f"{where}: {error}") from None
        texts.append(inspect.getsource(functions[0]))
    if view.udf is not None:
        mode = getattr(view.mode, "value", view.mode)
        if mode not in ("pandas", "python"):
            raise PlanError(f"{where}: the mode of its udf is '{mode}': use pandas or python.")
        functions.append((transformations.of_pandas if mode == "pandas" else transformations.of_python)(view.udf))
        texts.append(f"{mode}: {view.udf_string}")
    return (transformations.chained(functions) if functions else None), "\n".join(texts)


def _source(fields: dict[str, tuple[str, bool]], keys: set[str]) -> tuple[Column, ...]:
    """The fields of a schema that can be decoded."""
    types = get_args(ColumnType)
    return tuple(
        Column(name, cast(ColumnType, declared), nullable, "text" if declared == "string" else "number")
        for name, (declared, nullable) in fields.items()
        if declared in types and name not in keys
    )


def _transformed(
    where: str,
    view: "StreamFeatureView",
    fields: dict[str, tuple[str, bool]],
    transformation: Callable[..., Any],
    keys: tuple[str, str],
    entity_type: EntityType,
) -> dict[str, tuple[str, bool]]:
    """The schema of what a transformation gives; its own columns are nullable."""
    import pyarrow as pa

    from streaming import transformations

    arrow_types = {column.name: transformations.ARROW_TYPES[column.type] for column in _source(fields, set(keys))}
    entity, timestamp = keys
    own = {entity: pa.string() if entity_type == "string" else pa.int64(), timestamp: pa.timestamp("us", tz="UTC")}
    try:
        given = transformations.output_types(transformation, arrow_types | own)
    except transformations.TransformationError as error:
        raise PlanError(f"{where}: {error}") from None
    read_as_text = {each.column for each in view.aggregations if each.function in TEXTUAL}
    found = {name: declared or ("string" if name in read_as_text else "double") for name, declared in given.items()}
    own_fields = {name: fields[name] for name in keys if name in fields}
    return {name: (declared, True) for name, declared in found.items()} | own_fields


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
    where: str,
    schema: dict[str, tuple[str, bool]],
    aggregates: tuple[Aggregate, ...],
    models: tuple[Model, ...],
    keys: set[str],
) -> tuple[Column, ...]:
    columns: dict[tuple[str, Role], Column] = {}
    for model in models:
        what = f"{where}: the model of the column '{model.column}'"
        if model.column in schema:
            raise PlanError(f"{what} would hide the field of that name: give its tag another name.")
        for name in model.inputs:
            if name in keys:
                raise PlanError(f"{what} cannot learn from '{name}', the entity or the timestamp.")
            _check_type(where, schema, name, f"input of '{model.column}'", _NUMBERS)
            columns[name, "number"] = Column(name, cast(ColumnType, schema[name][0]), schema[name][1])
    added = {model.column: Column(model.column, "double", nullable=True) for model in models}
    schema = schema | {name: ("double", True) for name in added}
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
    return (*(column for (name, _), column in columns.items() if name not in added), *added.values())


def _check_type(where: str, schema: dict[str, tuple[str, bool]], name: str, role: str, allowed: set[str]) -> None:
    if name not in schema:
        raise PlanError(f"{where}: the {role} '{name}' is not in the JsonFormat schema ({', '.join(schema)}).")
    if schema[name][0] not in allowed:
        choice = ", ".join(sorted(allowed))
        raise PlanError(f"{where}: the {role} '{name}' is declared {schema[name][0]}, which is not one of {choice}.")


def _us(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)
