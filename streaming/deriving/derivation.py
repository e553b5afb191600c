"""How a derived topic is computed: what the tag `millrace.derivation` of its source says, as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from streaming.plan import PlanError, digest

Kind = Literal["rekeyed", "interval_join", "as_of_join", "table_lookup", "feature_lookup"]

TAG = "millrace.derivation"


@dataclass(frozen=True)
class Input:
    """A topic of JSON objects that a derivation reads.

    Attributes:
        name: Of the Feast source.
        topic: In Kafka, at `bootstrap_servers`.
        schema: "name type, ..." as in Feast's JsonFormat.
        timestamp: Field with the event time.
        delay_us: How far its watermark stays behind its clock.
        derivation: How it is computed itself, as JSON; empty where somebody else writes it.
    """

    name: str
    topic: str
    bootstrap_servers: str
    schema: str
    timestamp: str
    delay_us: int
    derivation: str = ""


@dataclass(frozen=True)
class Table:
    """A table with the history of its rows, in Parquet.

    Attributes:
        name: Of the Feast source.
        path: As Feast has it: a file, a folder or a glob, relative to the feature repository, or a URI.
        timestamp: Column that says from when on a row holds.
        schema: "name type, ..." of the columns that can be looked up.
    """

    name: str
    path: str
    timestamp: str
    schema: str


@dataclass(frozen=True)
class Derivation:
    """How a derived topic is computed.

    Attributes:
        name: Of the topic, and of its Feast source.
        kind: What is done.
        inputs: The left one, and the right one of a join.
        key: Field of what comes out whose text keys the records.
        schema: "name type, ..." of what comes out.
        delay_us: How far the watermark of what comes out must stay behind its clock.
        drift_us: How far apart in event time partitions of the left input may be read; 0: as far as they like, because
            the events of each come out in a partition of their own.
        on: Field by which both sides of a join or a look-up meet.
        earliest_us: Of an interval join, the least time of the right less that of the left.
        latest_us: The greatest.
        unmatched: Whether left events without a partner come out too.
        tolerance_us: How old the right side of an as-of join may be; None: of any age.
        table: What a table look-up reads.
        features: Names of the fields that come out, each with its "view:feature".
    """

    name: str
    kind: Kind
    inputs: tuple[Input, ...]
    key: str
    schema: str
    delay_us: int
    drift_us: int = 0
    on: str = ""
    earliest_us: int = 0
    latest_us: int = 0
    unmatched: bool = False
    tolerance_us: int | None = None
    table: Table | None = None
    features: tuple[tuple[str, str], ...] = ()

    @property
    def view(self) -> str:
        """The name under which a stream knows it."""
        return self.name

    @property
    def topic(self) -> str:
        """The topic whose partitions are dealt to workers: the left input's."""
        return self.inputs[0].topic

    @property
    def bootstrap_servers(self) -> str:
        """Where what comes out is written: where the left input is."""
        return self.inputs[0].bootstrap_servers

    @property
    def essence(self) -> dict[str, Any]:
        """Everything that changes what comes out, as JSON has it; broker's address and left's schema do not."""
        what = dataclasses.asdict(self)
        del what["schema"], what["delay_us"], what["drift_us"], what["inputs"][0]["schema"]
        for each in what["inputs"]:
            del each["bootstrap_servers"], each["derivation"]
        essence: dict[str, Any] = json.loads(json.dumps(what))
        return essence

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the essence."""
        return digest(self.essence)

    def at(self, bootstrap_servers: str) -> "Derivation":
        """The same with all its topics at another broker."""
        moved = tuple(dataclasses.replace(each, bootstrap_servers=bootstrap_servers) for each in self.inputs)
        return dataclasses.replace(self, inputs=moved)

    def to_json(self) -> str:
        """What the tag of its source holds."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, name: str, text: str) -> "Derivation":
        """What `to_json` wrote for the source `name`.

        Raises:
            PlanError: it is of another version, or something else.
        """
        try:
            read = json.loads(text)
            inputs = tuple(Input(**each) for each in read.pop("inputs"))
            table = read.pop("table")
            features = tuple((field, reference) for field, reference in read.pop("features"))
            derivation = cls(inputs=inputs, table=table and Table(**table), features=features, **read)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"The tag '{TAG}' of source '{name}' cannot be read ({error!r}): declare the source by a function of"
                " streaming.derived and run `feast apply` again."
            ) from None
        if derivation.kind not in get_args(Kind):
            raise PlanError(
                f"Source '{name}' is derived by '{derivation.kind}', which is none of {', '.join(get_args(Kind))}."
            )
        return derivation
