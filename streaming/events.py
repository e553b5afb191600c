"""The versioned types of the topics: what each one is called, how it is keyed and what its events hold."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A topic of JSON objects.

    Attributes:
        name: Of the topic in Kafka.
        version: Rises when a field changes its meaning; new fields may come without.
        key: The field whose UTF-8 text is the message key.
        timestamp: The field with the event time, ISO 8601 or integer epoch milliseconds.
        fields: Name to type, in the words of Feast's JsonFormat; other fields may be present and are not read.
        partitions: How many a new topic gets.
    """

    name: str
    version: int
    key: str
    timestamp: str
    fields: Mapping[str, str]
    partitions: int = 1

    @property
    def schema(self) -> str:
        """The fields as Feast's JsonFormat declares them: "time timestamp, user string"."""
        return ", ".join(f"{name} {kind}" for name, kind in self.fields.items())


def dead(topic: str) -> str:
    """The topic that takes the records of `topic` that cannot be read."""
    return f"{topic}.dead"


def late(topic: str) -> str:
    """The topic that takes the records of `topic` that came after their windows had closed."""
    return f"{topic}.late"


EDITS = Topic(
    name="edits",
    version=1,
    key="user",
    timestamp="time",
    fields={
        "seq": "bigint",
        "time": "timestamp",
        "channel": "string",
        "page": "string",
        "user": "string",
        "namespace": "string",
        "isAnonymous": "boolean",
        "isRobot": "boolean",
        "isNew": "boolean",
        "isMinor": "boolean",
        "isUnpatrolled": "boolean",
        "country": "string",
        "delta": "bigint",
        "added": "bigint",
        "deleted": "bigint",
    },
    partitions=2,
)

UTTERANCES = Topic(
    name="utterances",
    version=1,
    key="speaker",
    timestamp="time",
    fields={
        "id": "string",
        "time": "timestamp",
        "speaker": "string",
        "device": "string",
        "noise": "string",
        "snr_db": "double",
        "duration_s": "double",
        "words": "bigint",
        "confidence": "double",
        "text": "string",
    },
    partitions=2,
)
"""Dictations as a recogniser hands them on, keyed by who speaks."""

SCANS = Topic(
    name="scans",
    version=1,
    key="patient",
    timestamp="time",
    fields={
        "id": "string",
        "time": "timestamp",
        "patient": "string",
        "device": "string",
        "depth_mm": "double",
        "gain_db": "double",
        "brightness": "double",
        "speckle": "double",
        "lesion_mm": "double",
    },
    partitions=2,
)
"""Ultrasound images with what was measured of them, keyed by patient; `lesion_mm` is null where none was found."""

INSPECTIONS = Topic(
    name="inspections",
    version=1,
    key="line",
    timestamp="time",
    fields={
        "id": "string",
        "time": "timestamp",
        "line": "string",
        "camera": "string",
        "brightness": "double",
        "sharpness": "double",
        "score": "double",
        "good": "boolean",
    },
    partitions=2,
)
"""Screws before a camera with their anomaly score, keyed by production line."""

PROMPTS = Topic(
    name="prompts",
    version=1,
    key="user",
    timestamp="time",
    fields={
        "id": "string",
        "time": "timestamp",
        "user": "string",
        "model": "string",
        "tokens": "bigint",
        "max_tokens": "bigint",
        "temperature": "double",
        "text": "string",
    },
    partitions=2,
)
"""Requests to a language model, keyed by user."""

DIAGRAMS = Topic(
    name="diagrams",
    version=1,
    key="user",
    timestamp="time",
    fields={
        "id": "string",
        "time": "timestamp",
        "user": "string",
        "kind": "string",
        "width": "bigint",
        "height": "bigint",
        "lines": "bigint",
        "compiled": "boolean",
    },
    partitions=2,
)
"""Pictures turned into Asymptote code, keyed by user."""

MEASUREMENTS = Topic(
    name="measurements",
    version=1,
    key="series",
    timestamp="time",
    fields={
        "series": "string",
        "time": "timestamp",
        "value": "double",
        "anomaly": "boolean",
    },
    partitions=2,
)
"""Points of series, keyed by series; `anomaly` is the truth where it is known, for evaluation, never an input."""

PREDICTIONS = Topic(
    name="predictions",
    version=1,
    key="id",
    timestamp="time",
    fields={
        "id": "string",
        "time": "timestamp",
        "model": "string",
        "version": "bigint",
        "variant": "string",
        "entity": "string",
        "latency_ms": "double",
        "features": "map<string, double>",
        "features_at": "map<string, timestamp>",
        "output": "string",
    },
)

LABELS = Topic(
    name="labels",
    version=1,
    key="id",
    timestamp="time",
    fields={"id": "string", "time": "timestamp", "label": "string"},
)

CONTROL = Topic(
    name="control",
    version=1,
    key="model",
    timestamp="time",
    fields={"model": "string", "time": "timestamp", "action": "string", "reason": "string"},
)
