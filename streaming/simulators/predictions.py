"""Generated predictions of the model of edits, and the labels that come for most of them after a while."""

from collections.abc import Iterator

import numpy as np

from streaming.producing.columns import Events
from streaming.records import Ints
from streaming.simulators.arrival import MINUTE_US, SECOND_US, Held
from streaming.simulators.patterns import USUAL, Shape, skewed
from streaming.simulators.render import BOOLEAN, NULL, Moment, Name, Number, Template, Text
from streaming.simulators.sources import scaled

RATE_HZ = 50.0
ENTITIES = 2_000
SKEW = 1.0
LABELLED = 0.85
"""The share of predictions that a label comes for."""
DELAY_US = 10 * MINUTE_US
"""Half of the labels come within it, nearly all within sixteen times of it."""
RIGHT = 0.9
PREDICTIONS_ROUTE, LABELS_ROUTE = 0, 1


def predictions(
    count: int,
    seed: int = 0,
    shape: Shape = USUAL,
) -> Iterator[Events]:
    """Generate `count` predictions (route 0) among the labels of most of them (route 1), in time order.

    A label carries the id of its prediction and its own, later time. Equal arguments give equal bytes.

    Raises:
        ValueError: a number that makes no sense.
    """
    choose = skewed(ENTITIES if shape.entities is None else shape.entities, SKEW if shape.skew is None else shape.skew)
    chunks = shape.times_us(count, RATE_HZ, seed)
    templates = _templates(seed)
    draw = np.random.default_rng([seed, 2])

    def merged() -> Iterator[Events]:
        held = Held()
        done = 0
        for at_us in chunks:
            for events in _made(templates, at_us, choose(len(at_us), draw), done, draw):
                held.add(events.times_us, np.zeros(len(events), dtype=np.int8), events)
            done += len(at_us)
            if (ready := held.release(int(at_us[-1]))) is not None:
                yield ready.events
        if (ready := held.release(None)) is not None:
            yield ready.events

    return merged()


def _templates(seed: int) -> tuple[Template, Template]:
    """Those of predictions and labels; the seed is part of the id, so that two runs in one topic do not mix."""
    identity = Name(f"request-{seed}-", 9)
    prediction = Template(
        {
            "id": identity,
            "time": Moment(),
            "model": Text(["edits"]),
            "version": Number(),
            "variant": Text(["champion", "challenger"]),
            "entity": Name("user-", 6),
            "latency_ms": Number(3),
            "features": {"count_added_1h": Number(), "mean_added_1h": Number(2)},
            "features_at": {"count_added_1h": Moment(), "mean_added_1h": Moment()},
            "output": {"probability": Number(4), "robot": BOOLEAN},
        },
        key="id",
    )
    return prediction, Template({"id": identity, "time": Moment(), "label": Text(["false", "true"])}, key="id")


def _made(
    templates: tuple[Template, Template], at_us: Ints, who: Ints, first: int, draw: np.random.Generator
) -> tuple[Events, Events]:
    count = len(at_us)
    number = np.arange(first, first + count)
    # Beta-shaped: most users are surely people, few are surely robots.
    probability = draw.beta(0.3, 1.2, count)
    robot = probability > 0.5
    edits = draw.poisson(1 + 30 * probability)
    age_us = (draw.standard_exponential(count) * 30 * SECOND_US).astype(np.int64)
    prediction, label = templates
    predicted = prediction.render(
        at_us,
        {
            "id": number,
            "time": at_us,
            "model": np.zeros(count, dtype=np.int64),
            "version": np.where(number % 10 == 0, 2, 1),
            "variant": (number % 10 == 0).astype(np.int64),
            "entity": who,
            "latency_ms": scaled(np.exp(1.2 + 0.5 * draw.standard_normal(count)), 3),
            "features.count_added_1h": edits,
            "features.mean_added_1h": np.where(edits > 0, scaled(draw.standard_exponential(count) * 300, 2), NULL),
            "features_at.count_added_1h": at_us - age_us,
            "features_at.mean_added_1h": at_us - age_us,
            "output.probability": scaled(probability, 4),
            "output.robot": robot.astype(np.int64),
        },
        PREDICTIONS_ROUTE,
    )
    chosen = np.flatnonzero(draw.random(count) < LABELLED)
    delay_us = DELAY_US * np.exp(draw.standard_normal(len(chosen)))
    label_us = at_us[chosen] + delay_us.astype(np.int64) // 1000 * 1000
    truth = np.where(draw.random(len(chosen)) < RIGHT, robot[chosen], ~robot[chosen])
    order = np.argsort(label_us, kind="stable")
    columns = {"id": number[chosen], "time": label_us, "label": truth.astype(np.int64)}
    labels = label.render(label_us[order], {name: column[order] for name, column in columns.items()}, LABELS_ROUTE)
    return predicted, labels
