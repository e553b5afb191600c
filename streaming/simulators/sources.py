"""Generated events of the sources that have no stream of real ones, from a seed.

Each source gives every entity habits of its own (a speaker's noise, a line's wear), so that windows of an entity's
events differ from those of another, and draws the events around them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from streaming.events import DIAGRAMS, INSPECTIONS, MEASUREMENTS, PROMPTS, SCANS, UTTERANCES, Topic
from streaming.producing.columns import Events
from streaming.records import Floats, Ints
from streaming.simulators.arrival import HOUR_US
from streaming.simulators.patterns import DAY_US, USUAL, Draw, Shape, skewed
from streaming.simulators.render import BOOLEAN, NULL, Moment, Name, Number, Template, Text

HABITS = 4

NOISES = ("clean", "wind", "traffic", "crowd")
SENTENCES = tuple(
    f"{action} the {part} at {place}{end}"
    for action, part, place, end in product(
        ("check", "replace", "tighten", "photograph", "measure"),
        ("coupling", "relief valve", "gasket", "torque plate", "bearing housing", "flange"),
        ("station four", "pump two", "the north gate", "rack seven"),
        ("", " and log it", " before the shift ends"),
    )
)
QUESTIONS = tuple(
    f"{verb} {topic} {form}"
    for verb, topic, form in product(
        ("Explain", "Summarise", "Compare the kinds of", "List the risks of"),
        ("tumbling windows", "event time", "gradient clipping", "low-rank adapters", "quantisation"),
        ("in two sentences.", "for a beginner.", "with an example.", "as a table."),
    )
)
KINDS = ("geometry", "graph", "coordinates", "chart", "number line", "solid")


@dataclass(frozen=True)
class Moments:
    """N events to be made: when, of whom, and what to draw from.

    Attributes:
        times_us: [N].
        who: [N] entities.
        habits: [N, HABITS] uniform draws in [0, 1), always the same ones for an entity.
        draw: For everything else.
    """

    times_us: Ints
    who: Ints
    habits: Floats
    draw: np.random.Generator

    def __len__(self) -> int:
        return len(self.times_us)

    def normal(self, mean: Floats | float, spread: Floats | float, decimals: int, low: float = -np.inf) -> Ints:
        """Normal draws of at least `low`, as a column of that many decimals."""
        drawn = np.maximum(mean + spread * self.draw.standard_normal(len(self)), low)
        return scaled(drawn, decimals)

    def chosen(self, count: int) -> Ints:
        """Indices below `count`, all equally likely."""
        return self.draw.integers(0, count, len(self))

    def habit(self, number: int, count: int) -> Ints:
        """Indices below `count`, always the same one for an entity."""
        return scaled(np.floor(self.habits[:, number] * count), 0)


@dataclass(frozen=True)
class Source:
    """A stream that can be generated.

    Attributes:
        topic: Its type.
        template: How an event is written.
        columns: The fields of some events, but for `id`, the time and the key.
        rate_hz: Usual rate, in events a second of event time.
        entities: Usual number of keys.
        skew: Usual exponent of Zipf's law over them.
    """

    topic: Topic
    template: Template
    columns: Callable[[Moments], dict[str, Ints]]
    rate_hz: float
    entities: int
    skew: float


def generate(
    source: Source,
    count: int,
    seed: int = 0,
    shape: Shape = USUAL,
) -> Iterator[Events]:
    """Generate `count` events in time order.

    Equal arguments give equal bytes.

    Raises:
        ValueError: a number that makes no sense.
    """
    people = source.entities if shape.entities is None else shape.entities
    choose = skewed(people, source.skew if shape.skew is None else shape.skew)
    times = shape.times_us(count, source.rate_hz, seed)
    habits = np.random.default_rng([seed, 3]).random((people, HABITS))
    return _chunks(source, times, np.random.default_rng([seed, 2]), choose, habits)


def _chunks(
    source: Source, times: Iterator[Ints], draw: np.random.Generator, choose: Draw, habits: Floats
) -> Iterator[Events]:
    done = 0
    for at_us in times:
        who = choose(len(at_us), draw)
        columns = source.columns(Moments(at_us, who, habits[who], draw))
        given = {"id": np.arange(done, done + len(at_us)), source.topic.timestamp: at_us, source.topic.key: who}
        yield source.template.render(at_us, given | columns)
        done += len(at_us)


def scaled(values: Floats, decimals: int) -> Ints:
    """Numbers as a column of that many decimals."""
    column: Ints = np.rint(values * 10**decimals).astype(np.int64)
    return column


def _utterances(events: Moments) -> dict[str, Ints]:
    noise = events.chosen(len(NOISES))
    snr_db = np.where(noise == 0, 35.0, 5 + 10 * events.habits[:, 0])
    text = events.chosen(len(SENTENCES))
    words = np.array([len(sentence.split()) for sentence in SENTENCES])[text]
    a_word_s = 0.25 + 0.3 * events.habits[:, 1]
    return {
        "device": events.habit(2, 3),
        "noise": noise,
        "snr_db": events.normal(snr_db, 2.0, 1),
        "duration_s": events.normal(words * a_word_s, 0.3, 2, low=0.2),
        "words": words,
        "confidence": scaled(1 / (1 + np.exp(-snr_db / 8 + events.draw.standard_normal(len(events)))), 3),
        "text": text,
    }


def _scans(events: Moments) -> dict[str, Ints]:
    found = events.draw.random(len(events)) < 0.1 + 0.5 * events.habits[:, 0]
    return {
        "device": events.habit(1, 3),
        "depth_mm": events.normal(30 + 60 * events.habits[:, 2], 4.0, 1, low=10.0),
        "gain_db": events.normal(50.0, 6.0, 1, low=0.0),
        "brightness": events.normal(0.2 + 0.3 * events.habits[:, 3], 0.05, 3, low=0.0),
        "speckle": events.normal(0.5, 0.1, 3, low=0.0),
        "lesion_mm": np.where(found, events.normal(4 + 16 * events.habits[:, 0], 2.0, 1, low=1.0), NULL),
    }


def _inspections(events: Moments) -> dict[str, Ints]:
    # A tool wears over a shift of eight hours, at an hour of its own for each line, and is then changed.
    wear = (events.times_us / (8 * HOUR_US) + events.habits[:, 0]) % 1.0
    score = 0.1 + 0.25 * wear**3 + 0.08 * np.abs(events.draw.standard_normal(len(events)))
    return {
        "camera": events.habit(1, 2),
        "brightness": events.normal(0.5 + 0.2 * events.habits[:, 2], 0.02, 3, low=0.0),
        "sharpness": events.normal(0.8 - 0.2 * wear, 0.05, 3, low=0.0),
        "score": scaled(score, 4),
        "good": (score < 0.4).astype(np.int64),
    }


def _prompts(events: Moments) -> dict[str, Ints]:
    return {
        "model": events.habit(0, 2),
        "tokens": np.exp(3 + 3 * events.habits[:, 1] + 0.7 * events.draw.standard_normal(len(events))).astype(np.int64),
        "max_tokens": 128 << events.habit(2, 4),
        "temperature": scaled(np.round(events.habits[:, 3], 1), 1),
        "text": events.chosen(len(QUESTIONS)),
    }


def _diagrams(events: Moments) -> dict[str, Ints]:
    lines = np.exp(2 + 1.2 * events.habits[:, 0] + 0.5 * events.draw.standard_normal(len(events))).astype(np.int64) + 1
    return {
        "kind": events.chosen(len(KINDS)),
        "width": 200 + 40 * events.chosen(16),
        "height": 200 + 40 * events.chosen(12),
        "lines": lines,
        "compiled": (events.draw.random(len(events)) < 0.97 - 0.004 * lines.clip(max=100)).astype(np.int64),
    }


def _measurements(events: Moments) -> dict[str, Ints]:
    # One in fifty hours of a series is anomalous: its level is shifted by many times the noise.
    hour = events.times_us // HOUR_US
    lot = np.abs(np.sin(hour * 12.9898 + events.who * 78.233) * 43758.5453) % 1.0
    anomalous = lot < 0.02
    swing = np.sin(2 * np.pi * (events.times_us % DAY_US / DAY_US + events.habits[:, 0]))
    level = 20 + 60 * events.habits[:, 1] + 10 * events.habits[:, 2] * swing
    spread = 0.2 + events.habits[:, 3]
    return {
        "value": events.normal(level + np.where(anomalous, 8 * spread, 0.0), spread, 4),
        "anomaly": anomalous.astype(np.int64),
    }


SOURCES = {
    "utterances": Source(
        UTTERANCES,
        Template(
            {
                "id": Name("utterance-", 9),
                "time": Moment(),
                "speaker": Name("speaker-", 5),
                "device": Text(["helmet", "glasses", "headset"]),
                "noise": Text(NOISES),
                "snr_db": Number(1),
                "duration_s": Number(2),
                "words": Number(),
                "confidence": Number(3),
                "text": Text(SENTENCES),
            },
            key="speaker",
        ),
        _utterances,
        rate_hz=20.0,
        entities=500,
        skew=0.8,
    ),
    "scans": Source(
        SCANS,
        Template(
            {
                "id": Name("scan-", 9),
                "time": Moment(),
                "patient": Name("patient-", 6),
                "device": Text(["linear", "convex", "phased"]),
                "depth_mm": Number(1),
                "gain_db": Number(1),
                "brightness": Number(3),
                "speckle": Number(3),
                "lesion_mm": Number(1),
            },
            key="patient",
        ),
        _scans,
        rate_hz=5.0,
        entities=2_000,
        skew=0.3,
    ),
    "inspections": Source(
        INSPECTIONS,
        Template(
            {
                "id": Name("screw-", 9),
                "time": Moment(),
                "line": Name("line-", 2),
                "camera": Text(["top", "side"]),
                "brightness": Number(3),
                "sharpness": Number(3),
                "score": Number(4),
                "good": BOOLEAN,
            },
            key="line",
        ),
        _inspections,
        rate_hz=50.0,
        entities=12,
        skew=0.0,
    ),
    "prompts": Source(
        PROMPTS,
        Template(
            {
                "id": Name("prompt-", 9),
                "time": Moment(),
                "user": Name("user-", 6),
                "model": Text(["language", "language-int8"]),
                "tokens": Number(),
                "max_tokens": Number(),
                "temperature": Number(1),
                "text": Text(QUESTIONS),
            },
            key="user",
        ),
        _prompts,
        rate_hz=20.0,
        entities=5_000,
        skew=1.1,
    ),
    "diagrams": Source(
        DIAGRAMS,
        Template(
            {
                "id": Name("diagram-", 9),
                "time": Moment(),
                "user": Name("user-", 6),
                "kind": Text(KINDS),
                "width": Number(),
                "height": Number(),
                "lines": Number(),
                "compiled": BOOLEAN,
            },
            key="user",
        ),
        _diagrams,
        rate_hz=5.0,
        entities=1_000,
        skew=0.9,
    ),
    "measurements": Source(
        MEASUREMENTS,
        Template(
            {"series": Name("series-", 4), "time": Moment(), "value": Number(4), "anomaly": BOOLEAN},
            key="series",
        ),
        _measurements,
        rate_hz=100.0,
        entities=200,
        skew=0.0,
    ),
}
