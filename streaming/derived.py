"""Topics that the stream writes itself: joins, look-ups and re-keying, declared in a feature repository.

    by_page = rekeyed("edits_by_page", edits, key="page", batch_source=offline_log("page_activity"))

Each function returns a Feast `KafkaSource` whose tag `millrace.derivation` says how its topic is computed, so that the
registry holds it and a view reads it as any other source; `streaming.deriving` writes the topic. Feast takes seconds to
import, so it is imported where a declaration is made or looked up, not by the workers.
"""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from glob import glob
from typing import TYPE_CHECKING, NamedTuple, Protocol

from streaming.ddl import INTEGERS, read_schema, write_schema
from streaming.deriving.derivation import TAG, Derivation, Input, Table
from streaming.plan import PlanError
from streaming.records import RecordBatch, Reject

LEAST_DRIFT_US = 60_000_000

if TYPE_CHECKING:
    from feast import FileSource, KafkaSource
    from feast.data_source import DataSource


class Derived(NamedTuple):
    """What an operator gives: derived records in their order, and what it refused.

    Attributes:
        keys: of the records.
        values: of the records, JSON objects.
        rejects: which side each came from (0 left, 1 right), and the reject.
    """

    keys: list[bytes]
    values: list[bytes]
    rejects: list[tuple[int, Reject]]


class Operator(Protocol):
    """Derives the records of one partition; its state is all that it was given, so a copy goes on from a snapshot.

    An OSError of `process` says that something it looks up is away: it has then changed nothing, and is called again.
    """

    @property
    def clocks_us(self) -> tuple[int, ...]:
        """The greatest event time of each side."""
        ...

    @property
    def buffered_bytes(self) -> int:
        """Memory held by what waits."""
        ...

    def process(self, side: int, batch: RecordBatch, now_us: int) -> Derived:
        """Take records of one side, 0 the left and 1 the right, in offset order."""
        ...

    def tick(self, now_us: int, side: int) -> Derived:
        """Let the clock of a side that is read to its end follow the wall clock."""
        ...

    def leave_out(self, side: int, wall_us: int) -> None:
        """Let `tick` not count a step of the wall clock since the last event of a side; below zero: back."""
        ...

    def drain(self) -> Derived:
        """Give what waits, because nothing more will come."""
        ...

    def snapshot(self) -> bytes:
        """The state, for the operator's own function that restores it; empty where there is none."""
        ...

    def delta(self) -> bytes | None:
        """What has changed since the last snapshot or delta, for the same; None where only a snapshot says it."""
        ...


def rekeyed(name: str, source: "KafkaSource", key: str, batch_source: "DataSource | None" = None) -> "KafkaSource":
    """The events of a source under another key: one for one, unchanged, in the order of their partition.

    Args:
        name: of the derived topic and source.
        source: what to read.
        key: field that becomes the key, a string or an integer; events without it are dead.
        batch_source: where the offline rows of views over it go; default `data/<name>/*.parquet` in the repository.

    Raises:
        PlanError: says what does not fit.
    """
    left = _input(name, source)
    derivation = Derivation(name, "rekeyed", (left,), key, left.schema, left.delay_us)
    return _source(derivation, source.timestamp_field, batch_source)


def interval_join(
    name: str,
    left: "KafkaSource",
    right: "KafkaSource",
    on: str,
    earliest: timedelta,
    latest: timedelta,
    unmatched: bool = False,
    key: str | None = None,
    batch_source: "DataSource | None" = None,
) -> "KafkaSource":
    """Every pair of a left and a right event of equal `on` whose times differ by so much, once.

    A pair is the left event, its time included, with the fields of the right one as `<right name>_<field>`.

    Args:
        name: of the derived topic and source.
        left: keyed by `on`.
        right: keyed by `on`, with as many partitions.
        on: field that both have.
        earliest: least time of the right less that of the left; negative where the right may come first.
        latest: the greatest.
        unmatched: give left events without a partner too, with null for the fields of the right, once none can come.
        key: field that keys what comes out; default `on`.
        batch_source: where the offline rows of views over it go; default `data/<name>/*.parquet` in the repository.

    Raises:
        PlanError: says what does not fit.
    """
    one, two = _input(name, left), _input(name, right)
    earliest_us, latest_us = _us(earliest), _us(latest)
    if earliest_us > latest_us:
        raise PlanError(f"Derived topic '{name}': earliest ({earliest}) must not be after latest ({latest}).")
    # The right may be read this much later than the left, and a left event waits for its last possible partner.
    delay_us = max(one.delay_us, two.delay_us - earliest_us) + max(latest_us, 0)
    derivation = Derivation(
        name,
        "interval_join",
        (one, two),
        key or on,
        _joined(name, one.schema, two.name, two.schema),
        delay_us,
        on=on,
        earliest_us=earliest_us,
        latest_us=latest_us,
        unmatched=unmatched,
    )
    return _source(derivation, left.timestamp_field, batch_source)


def as_of_join(
    name: str,
    left: "KafkaSource",
    right: "KafkaSource",
    on: str,
    tolerance: timedelta | None = None,
    key: str | None = None,
    batch_source: "DataSource | None" = None,
) -> "KafkaSource":
    """Each left event once, with the last right event of equal `on` that is not later, as `<right name>_<field>`.

    Args:
        name: of the derived topic and source.
        left: keyed by `on`.
        right: keyed by `on`, with as many partitions.
        on: field that both have.
        tolerance: how old the right event may be; else its fields are null, as where there is none.
        key: field that keys what comes out; default `on`.
        batch_source: where the offline rows of views over it go; default `data/<name>/*.parquet` in the repository.

    Raises:
        PlanError: says what does not fit.
    """
    one, two = _input(name, left), _input(name, right)
    derivation = Derivation(
        name,
        "as_of_join",
        (one, two),
        key or on,
        _joined(name, one.schema, two.name, two.schema),
        one.delay_us,
        on=on,
        tolerance_us=None if tolerance is None else _us(tolerance),
    )
    return _source(derivation, left.timestamp_field, batch_source)


def table_lookup(
    name: str,
    left: "KafkaSource",
    table: "FileSource",
    on: str,
    key: str | None = None,
    batch_source: "DataSource | None" = None,
) -> "KafkaSource":
    """Each event with the row of a table that was valid at its time, as `<table name>_<column>`; nulls without one.

    Args:
        name: of the derived topic and source.
        left: the events.
        table: Parquet with a timestamp_field that says from when on a row holds; it must be there when this is called.
        on: field of the events and column of the table.
        key: field that keys what comes out; default `on`.
        batch_source: where the offline rows of views over it go; default `data/<name>/*.parquet` in the repository.

    Raises:
        PlanError: says what does not fit.
    """
    one, looked_up = _input(name, left), _table(name, table, on)
    derivation = Derivation(
        name,
        "table_lookup",
        (one,),
        key or on,
        _joined(name, one.schema, looked_up.name, looked_up.schema),
        one.delay_us,
        on=on,
        table=looked_up,
    )
    return _source(derivation, left.timestamp_field, batch_source)


def feature_lookup(
    name: str,
    left: "KafkaSource",
    features: Sequence[str],
    on: str,
    key: str | None = None,
    batch_source: "DataSource | None" = None,
) -> "KafkaSource":
    """Each event with features of Feast's online store as they are when it is read, as `<view>_<feature>`.

    Args:
        name: of the derived topic and source.
        left: the events.
        features: "view:feature", a double, or "view:feature type" with a type of Feast's JsonFormat.
        on: field of the events that is the join key of the views.
        key: field that keys what comes out; default `on`.
        batch_source: where the offline rows of views over it go; default `data/<name>/*.parquet` in the repository.

    Raises:
        PlanError: says what does not fit.
    """
    one = _input(name, left)
    fields, types = [], []
    for feature in features:
        reference, _, declared = feature.partition(" ")
        view, colon, column = reference.partition(":")
        if not (view and colon and column):
            raise PlanError(f"Derived topic '{name}': write the feature {feature!r} as 'view:feature'.")
        fields.append((f"{view}_{column}", reference))
        types.append(f"{view}_{column} {declared or 'double'}")
    derivation = Derivation(
        name,
        "feature_lookup",
        (one,),
        key or on,
        ", ".join([one.schema, *types]),
        one.delay_us,
        on=on,
        features=tuple(fields),
    )
    return _source(derivation, left.timestamp_field, batch_source)


def _source(derivation: Derivation, timestamp: str, batch_source: "DataSource | None") -> "KafkaSource":
    """The source that stands for a derivation, whose fields are checked first.

    Under another key, events of several partitions meet in one, so its watermark must also wait for their drift. Only
    of joins it is known that their inputs are keyed by what they are joined on.
    """
    from feast import FileSource, KafkaSource
    from feast.data_format import JsonFormat, ParquetFormat

    if derivation.key != derivation.on or len(derivation.inputs) == 1:
        drift_us = max(derivation.inputs[0].delay_us, LEAST_DRIFT_US)
        derivation = dataclasses.replace(derivation, drift_us=drift_us, delay_us=derivation.delay_us + drift_us)
    where = f"Derived topic '{derivation.name}'"
    named = [(derivation.key, derivation.schema, "what comes out")]
    if derivation.on:
        named += [(derivation.on, each.schema, f"source '{each.name}'") for each in derivation.inputs]
    kinds = set()
    for field, ddl, whose in named:
        schema = read_schema(where, ddl)
        if field not in schema:
            raise PlanError(f"{where}: the field '{field}' is not in the schema of {whose} ({', '.join(schema)}).")
        kind = schema[field][0]
        if kind != "string" and kind not in INTEGERS:
            raise PlanError(f"{where}: '{field}' of {whose} is declared {kind}: a key must be a string or an integer.")
        kinds.add("string" if kind == "string" else "integer")
    if len(derivation.inputs) == 2 and len(kinds) > 1 and derivation.key == derivation.on:
        raise PlanError(f"{where}: '{derivation.on}' is a string on one side and an integer on the other.")
    return KafkaSource(
        name=derivation.name,
        topic=derivation.name,
        kafka_bootstrap_servers=derivation.bootstrap_servers,
        message_format=JsonFormat(schema_json=derivation.schema),
        timestamp_field=timestamp,
        watermark_delay_threshold=timedelta(microseconds=derivation.delay_us),
        batch_source=batch_source
        or FileSource(
            name=f"{derivation.name}_log",
            path=f"data/{derivation.name}/*.parquet",
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        ),
        tags={TAG: derivation.to_json()},
    )


def _input(name: str, source: "KafkaSource") -> Input:
    from feast import KafkaSource
    from feast.data_format import JsonFormat

    where = f"Derived topic '{name}'"
    if not isinstance(source, KafkaSource):
        raise PlanError(f"{where} reads a {type(source).__name__}: only a KafkaSource can be read.")
    options = source.kafka_options
    if not isinstance(options.message_format, JsonFormat):
        raise PlanError(f"{where}: the message_format of source '{source.name}' must be a JsonFormat.")
    if not source.timestamp_field:
        raise PlanError(f"{where}: source '{source.name}' needs a timestamp_field.")
    schema = options.message_format.schema_json
    if source.timestamp_field not in read_schema(where, schema):
        raise PlanError(f"{where}: the timestamp '{source.timestamp_field}' is not in the schema of '{source.name}'.")
    return Input(
        name=source.name,
        topic=options.topic,
        bootstrap_servers=options.kafka_bootstrap_servers,
        schema=schema,
        timestamp=source.timestamp_field,
        delay_us=_us(options.watermark_delay_threshold or timedelta()),
        derivation=source.tags.get(TAG, ""),
    )


def _table(name: str, source: "FileSource", on: str) -> Table:
    """The table with those of its columns that a view can read."""
    import pyarrow as pa
    import pyarrow.dataset

    where = f"Derived topic '{name}'"
    if not source.timestamp_field:
        raise PlanError(f"{where}: table '{source.name}' needs a timestamp_field that says from when on a row holds.")
    try:
        files = sorted(glob(source.path)) if "*" in source.path else source.path
        schema = pyarrow.dataset.dataset(files, format="parquet").schema
    except (OSError, ValueError) as error:
        raise PlanError(f"{where}: table '{source.name}' cannot be read at {source.path!r}: {error}") from None
    types = {pa.bool_(): "boolean", pa.float32(): "float", pa.float64(): "double"}
    types |= {pa.int8(): "tinyint", pa.int16(): "smallint", pa.int32(): "int", pa.int64(): "bigint"}
    types |= {pa.string(): "string", pa.large_string(): "string"}
    fields = {}
    for field in schema:
        if field.type in types or pa.types.is_timestamp(field.type):
            fields[field.name] = (types.get(field.type, "timestamp"), True)
    for column in (on, source.timestamp_field):
        if column not in fields:
            raise PlanError(f"{where}: table '{source.name}' has no column '{column}' ({', '.join(schema.names)}).")
    return Table(source.name, source.path, source.timestamp_field, write_schema(fields))


def _joined(name: str, left: str, right_name: str, right: str) -> str:
    """The schema of the left's fields and the right's, renamed and nullable."""
    where = f"Derived topic '{name}'"
    fields = {f"{right_name}_{field}": (kind, True) for field, (kind, _) in read_schema(where, right).items()}
    clash = sorted(fields.keys() & read_schema(where, left).keys())
    if clash:
        raise PlanError(f"{where}: both sides give a field '{clash[0]}': rename the source '{right_name}'.")
    return f"{left}, {write_schema(fields)}"


def _us(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)
