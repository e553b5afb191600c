"""Generated edits with the schema of the real ones: one day of several thousand editors, from a seed.

Activity is skewed as in the real sample: by Zipf's law a few robots make a large part of all edits. Robots have habits
that windows of activity show: one run a day at a steady pace, edits of nearly equal size, hardly a deletion. People
edit in short sessions around their evening, with sizes over orders of magnitude.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from streaming.producing.columns import Events
from streaming.records import Ints
from streaming.simulators.arrival import SECOND_US
from streaming.simulators.render import BOOLEAN, Moment, Name, Number, Template, Text

CHUNK = 50_000
DAY_MS = 86_400_000
HOUR_MS = 3_600_000
SESSION_MS = 20 * 60_000
CHANNELS = ("#en", "#vi", "#de", "#fr", "#ru", "#it", "#es", "#zh", "#uz", "#ja", "#pl", "#ko")
NAMESPACES = ("Main", "Wikipedia", "User talk", "Talk", "Category")
NAMESPACE_SHARES = (0.82, 0.06, 0.05, 0.04, 0.03)
COUNTRIES = ("US", "DE", "GB", "FR", "IT", "RU", "JP", "BR")
ROBOT_SHARE = 0.05
ANONYMOUS_SHARE = 0.2


@dataclass(frozen=True)
class Population:
    """Habits, one entry an editor, sorted by activity."""

    user: list[str]
    robot: NDArray[np.bool_]
    anonymous: NDArray[np.bool_]
    share: NDArray[np.float64]
    """Share of all edits; sums to 1."""
    start_ms: NDArray[np.int64]
    """Begin of a robot's run, or middle of a person's day, within the day."""
    length_ms: NDArray[np.int64]
    """Length of a robot's run, or spread of a person's sessions."""
    log_size: NDArray[np.float64]
    """Natural logarithm of the typical number of characters added."""
    size_spread: NDArray[np.float64]
    deleting: NDArray[np.float64]
    """Probability that an edit deletes text."""
    channel: NDArray[np.int64]


def population(count: int, seed: int) -> Population:
    """Draw the editors; with the seed also their names are fixed."""
    draw = np.random.default_rng([seed, 1])
    share = 1.0 / np.arange(1, count + 1) ** 1.05
    # Robots are rare among editors and common among the busy ones.
    robot = draw.random(count) < np.clip(12.0 / np.arange(1, count + 1) ** 0.8, ROBOT_SHARE / 4, 0.75)
    return Population(
        user=["u" + sha256(f"{seed}/{index}".encode()).hexdigest()[:12] for index in range(count)],
        robot=robot,
        anonymous=~robot & (draw.random(count) < ANONYMOUS_SHARE),
        share=share / share.sum(),
        start_ms=np.where(robot, draw.integers(0, DAY_MS, count), draw.normal(15, 4, count) * HOUR_MS).astype(np.int64),
        length_ms=(np.where(robot, draw.uniform(1, 12, count), 3.0) * HOUR_MS).astype(np.int64),
        log_size=np.where(robot, draw.normal(3.2, 0.8, count), draw.normal(3.6, 1.0, count)),
        size_spread=np.where(robot, draw.uniform(0.02, 0.4, count), draw.uniform(1.0, 1.8, count)),
        deleting=np.where(robot, draw.uniform(0.0, 0.05, count), draw.uniform(0.1, 0.5, count)),
        channel=draw.integers(0, len(CHANNELS), count),
    )


def edits(
    count: int = 40_000, seed: int = 0, editors: int = 5_000, day: datetime = datetime(2015, 9, 12, tzinfo=UTC)
) -> Iterator[Events]:
    """Generate `count` edits of one UTC day in time order, keyed by user; no two at the same millisecond.

    Equal arguments give equal bytes. More than a few million edits outlast the day by the milliseconds they need.
    """
    people = population(editors, seed)
    template = _template(people)
    draw = np.random.default_rng([seed, 2])
    who = draw.choice(editors, size=count, p=people.share)
    when_ms = _times(people, who, draw)
    order = np.argsort(when_ms, kind="stable")
    step = np.arange(count)
    when_ms = np.maximum.accumulate(when_ms[order] - step) + step
    who = who[order]
    day_us = int(day.timestamp()) * SECOND_US
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        times_us = day_us + when_ms[part] * 1000
        columns = _columns(people, who[part], draw)
        yield template.render(times_us, columns | {"seq": step[part], "time": times_us})


def _template(people: Population) -> Template:
    return Template(
        {
            "seq": Number(),
            "time": Moment(),
            "channel": Text([f"{channel}.wikipedia" for channel in CHANNELS]),
            "page": Name("Page ", 1),
            "user": Text(people.user),
            "namespace": Text(NAMESPACES),
            "isAnonymous": BOOLEAN,
            "isRobot": BOOLEAN,
            "isNew": BOOLEAN,
            "isMinor": BOOLEAN,
            "isUnpatrolled": BOOLEAN,
            "country": Text([*COUNTRIES, None]),
            "delta": Number(),
            "added": Number(),
            "deleted": Number(),
        },
        key="user",
    )


def _times(people: Population, who: Ints, draw: np.random.Generator) -> Ints:
    """Milliseconds in the day: a steady run for robots, sessions for people."""
    run_ms = draw.random(len(who)) * people.length_ms[who]
    # A person has one session for every handful of edits, and always the same ones: its number seeds its middle.
    session = draw.integers(0, np.maximum(people.share[who] * len(who) / 6, 1).astype(np.int64) + 1)
    middle = np.sin(who * 12.9898 + session * 78.233) * people.length_ms[who] * 2
    session_ms = middle + draw.normal(0, SESSION_MS, len(who))
    offset_ms = np.where(people.robot[who], run_ms, session_ms)
    return ((people.start_ms[who] + offset_ms) % DAY_MS).astype(np.int64)


def _columns(people: Population, who: Ints, draw: np.random.Generator) -> dict[str, Ints]:
    count = len(who)
    robot, anonymous = people.robot[who], people.anonymous[who]
    size = np.exp(people.log_size[who] + people.size_spread[who] * draw.normal(size=count)).clip(0, 200_000)
    deletes = draw.random(count) < people.deleting[who]
    added = np.where(deletes, 0, size).astype(np.int64)
    deleted = np.where(deletes, size.clip(1, 500), 0).astype(np.int64)
    return {
        "namespace": draw.choice(len(NAMESPACES), size=count, p=NAMESPACE_SHARES),
        "page": draw.zipf(1.3, count).clip(max=1_000_000),
        "isMinor": (draw.random(count) < np.where(robot, 0.78, 0.22)).astype(np.int64),
        "isNew": (draw.random(count) < np.where(robot, 0.02, 0.08)).astype(np.int64),
        "isUnpatrolled": (draw.random(count) < np.where(robot, 0.22, 0.1)).astype(np.int64),
        "isAnonymous": anonymous.astype(np.int64),
        "isRobot": robot.astype(np.int64),
        "user": who,
        "channel": people.channel[who],
        "country": np.where(anonymous, who % len(COUNTRIES), len(COUNTRIES)),
        "delta": added - deleted,
        "added": added,
        "deleted": deleted,
    }
