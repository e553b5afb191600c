"""What is computed over a topic: an immutable plan, made of a Feast view by `views` and run by `partition`."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

EntityType = Literal["string", "int64"]
WindowKind = Literal["sliding", "session", "last", "lifetime"]
Role = Literal["number", "hash", "text"]
ColumnType = Literal["tinyint", "smallint", "int", "bigint", "float", "double", "boolean", "string"]

FUTURE_US = 3_600_000_000
"""Events further ahead of the wall clock than this are refused."""

FUNCTIONS = (
    *("count", "sum", "mean", "min", "max", "std", "var", "first", "last", "count_distinct"),
    *("p1 to p99", "top_1 to top_100", "decayed_mean"),
)
TEXTUAL = {"count", "first", "last", "count_distinct"}


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

    @cached_property
    def quantile(self) -> float | None:
        """The quantile of p1 to p99."""
        match = re.fullmatch(r"p(\d\d?)", self.function)
        return int(match[1]) / 100 if match and match[1] not in ("0", "00") else None

    @cached_property
    def top(self) -> int | None:
        """The k of top_k."""
        match = re.fullmatch(r"top_(\d{1,3})", self.function)
        return int(match[1]) if match and 1 <= int(match[1]) <= 100 else None

    def fits(self, declared: ColumnType) -> bool:
        """Whether the function is defined for values of a type."""
        if declared == "string":
            return self.top is not None or self.function in TEXTUAL
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
class Model:
    """An online model that adds a column to the events, which aggregates read as they read a field.

    Attributes:
        column: What it adds, a nullable double.
        function: Which of river's models.
        inputs: Fields of the events; one that lacks any of them is not learned.
        every: It learns each so many-th event of a partition, beginning with the first; the others have no value.
        parameters: Of the model, all of them, by name.
    """

    column: str
    function: Literal["half_space_trees", "adwin"]
    inputs: tuple[str, ...]
    every: int
    parameters: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Plan:
    """What one view computes over one topic.

    Attributes:
        view: Name of the StreamFeatureView.
        topic: Of JSON objects, read from `bootstrap_servers`.
        entity: Field that holds the entity, the view's join key.
        timestamp: Field that holds the event time.
        columns: The fields that aggregates and models read, each once, then what the models add, in their order.
        aggregates: In the order of the view; the slide of each divides its window.
        delay_us: How far the watermark stays behind the clock.
        future_us: Events further ahead of the wall clock than this are refused.
        emission: "fresh" windows as they fill, or "final" ones, once when the watermark has passed their end.
        lateness_us: For how long after that events still revise them.
        clocks: Whether event time is that of a partition or of each entity.
        source: All fields of the schema but entity and timestamp, strings as text, where there is a transformation.
        transformation: A function of a `pyarrow.RecordBatch` of these, before its columns are read; None: none.
        transformation_text: What it is, so that a changed one is told from the one before.
        models: Learn from the events, transformed ones where there is a transformation, before they are aggregated.
        changelog: Topic to which changed features are published; none where empty.
        idle_ttl_us: Lifetime and count windows of an entity begin anew with its first event after a longer silence, as
            `idleness` measures it; with clocks of entities all that it holds does. 0: never.
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
    future_us: int = FUTURE_US
    emission: Literal["fresh", "final"] = "fresh"
    lateness_us: int = 0
    clocks: Literal["partition", "key"] = "partition"
    idle_ttl_us: int = 0
    changelog: str = ""
    source: tuple[Column, ...] = ()
    transformation: Callable[..., Any] | None = None
    transformation_text: str = ""
    models: tuple[Model, ...] = ()

    @property
    def essence(self) -> dict[str, Any]:
        """Everything that changes the state, as JSON has it; feature names and the broker's address do not."""
        what = asdict(self)
        for name in ("bootstrap_servers", "future_us", "changelog", "transformation"):
            del what[name]
        for aggregate in what["aggregates"]:
            del aggregate["name"]
        if not self.models:
            del what["models"]
        essence: dict[str, Any] = json.loads(json.dumps(what))
        return essence

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the essence."""
        return digest(self.essence)

    @property
    def fields(self) -> tuple[Column, ...]:
        """The columns that events bring, without those that models add."""
        return self.columns[: len(self.columns) - len(self.models)]

    def at(self, bootstrap_servers: str) -> "Plan":
        """The same at another broker."""
        return replace(self, bootstrap_servers=bootstrap_servers)

    def column_of(self, aggregate: Aggregate) -> int:
        """The number of the column that an aggregate reads."""
        for at, column in enumerate(self.columns):
            if column.name == aggregate.column and column.role == role(aggregate.function, column.type):
                return at
        raise KeyError(aggregate.column)


def digest(essence: Mapping[str, Any]) -> str:
    """A sha256 of JSON that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


def role(function: str, declared: ColumnType) -> Role:
    """What a function needs of a column's values."""
    if declared != "string" or function == "count":
        return "number"
    return "hash" if function == "count_distinct" else "text"
