"""The inputs of joins and look-ups: records read by the rules of every view, and what is kept of them."""

from typing import NamedTuple, cast, get_args

import numpy as np

from streaming.ddl import INTEGERS, read_schema
from streaming.decode import Columns, Decoder
from streaming.deriving.derivation import Input, Table
from streaming.deriving.raw_json import Tails, decimal_texts, last_braces, read_only
from streaming.plan import Column, ColumnType, EntityType, Plan, PlanError
from streaming.records import Bools, Bytes, Ints, RecordBatch, Reject, RejectKind, iso

READ, FUTURE, LATE = range(3)

_REASONS = {FUTURE: "is from the future: the clock says", LATE: "is late: the watermark of the join stood at"}


class Events(NamedTuple):
    """N records of one side.

    Attributes:
        readable: [N]; of other records nothing below holds.
        times: [N] microseconds since 1970 UTC.
        text: Holds the join keys; an integer is its 8 bytes, little end first.
        entities: [N, 2] spans into `text`.
        keys_text: Holds the keys that derived records get.
        keys: [N, 2] spans into `keys_text`; empty on the right.
        body: Holds what derived records take of the values.
        bodies: [N, 2] spans into `body`: of the left side the object without its last brace, of the right side what
            follows on that.
    """

    readable: Bools
    times: Ints
    text: Bytes
    entities: Ints
    keys_text: Bytes
    keys: Ints
    body: Bytes
    bodies: Ints


class LeftInput:
    """Reads the events that derived records begin with.

    Args:
        source: Where they come from.
        on: Field by which they are joined.
        key: Field whose text becomes the key of the derived records.

    Raises:
        PlanError: A field is no key.
    """

    def __init__(self, source: Input, on: str, key: str) -> None:
        self._decoder = _decoder(source, on, ())
        self._keys = None if key == on else _decoder(source, key, ())
        self._key_type = key_type(source, key)

    def read(self, batch: RecordBatch) -> tuple[Events, list[Reject]]:
        """The records of a batch, and the unreadable ones in offset order."""
        columns, rejects = self._decoder.decode(batch)
        keyed, readable = columns, columns.readable
        if self._keys is not None:
            keyed, more = self._keys.decode(batch)
            readable = readable & keyed.readable
            rejects = list({reject.offset: reject for reject in [*more, *rejects]}.values())
            rejects.sort(key=lambda reject: reject.offset)
        text, keys = keyed.text, keyed.entities
        if self._key_type == "int64":
            text, keys = decimal_texts(text, keys, readable)
        bodies = last_braces(read_only(batch.buffer), read_only(batch.values), readable)
        return _events(columns, readable, text, keys, batch.buffer, bodies), rejects


class RightInput:
    """Reads the events whose fields are added.

    Args:
        source: Where they come from.
        on: Field by which they are joined.

    Attributes:
        nulls: What takes the place of their fields where there is none.

    Raises:
        PlanError: A field is no key.
    """

    def __init__(self, source: Input, on: str) -> None:
        schema = read_schema(f"Source '{source.name}'", source.schema)
        self._tails = Tails([(name, f"{source.name}_{name}") for name in schema])
        self.nulls = self._tails.nulls
        columns = tuple(
            Column(name, cast(ColumnType, declared), nullable)
            for name, (declared, nullable) in schema.items()
            if name not in (on, source.timestamp) and declared in get_args(ColumnType)
        )
        self._decoder = _decoder(source, on, columns)

    def read(self, batch: RecordBatch) -> tuple[Events, list[Reject]]:
        """The records of a batch, and the unreadable ones in offset order."""
        columns, rejects = self._decoder.decode(batch)
        body, bodies = self._tails.of(batch, columns.readable)
        return _events(columns, columns.readable, columns.text, np.zeros_like(bodies), body, bodies), rejects


def key_type(source: Input | Table, name: str) -> EntityType:
    """How the field or column of a key is read.

    Raises:
        PlanError: It is not declared as text or an integer.
    """
    where = f"Source '{source.name}'"
    declared = read_schema(where, source.schema).get(name, ("missing", True))[0]
    if declared != "string" and declared not in INTEGERS:
        raise PlanError(f"{where}: the key '{name}' is {declared}: it must be declared as a string or an integer.")
    return "string" if declared == "string" else "int64"


def refused(batch: RecordBatch, times: Ints, verdicts: Ints, than_us: Ints, unread: list[Reject]) -> list[Reject]:
    """Those of a batch that cannot be read, are from the future, or late by a kernel's verdicts [N], in offset order.

    Args:
        batch: The records.
        times: [N] their event times.
        verdicts: [N] READ, FUTURE or LATE.
        than_us: [N] the clock or watermark that they did not fit.
        unread: Those that cannot be read.
    """
    kinds: dict[int, RejectKind] = {FUTURE: "dead", LATE: "late"}
    found = [
        Reject(
            kinds[verdict],
            batch.partition,
            int(batch.offsets[row]),
            f"event time {iso(int(times[row]))} {_REASONS[verdict]} {iso(int(than_us[row]))}",
            batch.key(row),
            batch.value(row),
        )
        for row in np.flatnonzero(verdicts != READ).tolist()
        for verdict in [int(verdicts[row])]
    ]
    return sorted([*found, *unread], key=lambda reject: reject.offset)


def _decoder(source: Input, key: str, columns: tuple[Column, ...]) -> Decoder:
    return Decoder(
        Plan(
            view=source.name,
            topic=source.topic,
            bootstrap_servers=source.bootstrap_servers,
            entity=key,
            entity_type=key_type(source, key),
            timestamp=source.timestamp,
            columns=columns,
            aggregates=(),
            delay_us=source.delay_us,
        )
    )


def _events(columns: Columns, readable: Bools, keys_text: Bytes, keys: Ints, body: Bytes, bodies: Ints) -> Events:
    return Events(
        readable,
        columns.times,
        columns.text,
        columns.entities,
        read_only(keys_text),
        keys,
        read_only(body),
        bodies,
    )
