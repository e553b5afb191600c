"""Which windows of which shape a plan needs: those of one slide, gap or count share a frame."""

from typing import Any, Protocol

import numpy.typing as npt

from streaming.keys import Places
from streaming.last_events import LastEvents
from streaming.plan import Aggregate, Plan
from streaming.records import Bools, Floats, Ints
from streaming.sessions import Sessions
from streaming.windows import Panes, Reading

_LIFETIME_GRAIN_US = 60_000_000


class Frame(Protocol):
    """Windows of one shape over all entities: `Panes`, `Sessions` or `LastEvents`; `lasting` ones never end."""

    readings: tuple[Reading, ...]
    lasting: bool

    @property
    def held(self) -> int: ...  # noqa: D102
    def nbytes(self, keys: int, events: int = 0) -> int: ...  # noqa: D102
    def reserve(self, keys: int, events: int) -> None: ...  # noqa: D102
    def closed(self, times: Ints, marks: Ints) -> Bools: ...  # noqa: D102
    def add(  # noqa: D102
        self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, anew: Bools, due_us: Ints
    ) -> None: ...
    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats: ...  # noqa: D102
    def empty(self, keys: int, mark_us: int) -> Bools: ...  # noqa: D102
    def keep(self, ids: Ints) -> None: ...  # noqa: D102
    def texts(self, column: int) -> list[Places]: ...  # noqa: D102
    def state(self, ids: Ints) -> list[npt.NDArray[Any]]: ...  # noqa: D102
    def restore(self, ids: Ints, arrays: list[npt.NDArray[Any]]) -> None: ...  # noqa: D102


def frames(plan: Plan) -> tuple[list[Frame], list[tuple[int, Reading]]]:
    """The frames of a plan, shortest slide first, and the frame and reading of each aggregate."""
    groups: dict[tuple[str, int], list[tuple[int, Aggregate]]] = {}
    for aggregate in sorted(plan.aggregates, key=lambda each: (each.kind, each.slide_us)):
        shape = {"sliding": aggregate.slide_us, "session": aggregate.window_us, "last": aggregate.size, "lifetime": 0}
        group = groups.setdefault((aggregate.kind, shape[aggregate.kind]), [])
        group.append((plan.column_of(aggregate), aggregate))
    final = plan.emission == "final"
    history_us = plan.delay_us + plan.lateness_us
    frames: list[Frame] = []
    found: dict[str, tuple[int, Reading]] = {}
    for (kind, _), group in groups.items():
        if kind == "last":
            frames.append(LastEvents(group))
        elif kind == "session":
            frames.append(Sessions(group, plan.lateness_us, history_us, final))
        else:
            frames.append(Panes(group, plan.lateness_us, history_us if final else 0, final))
        for (_, aggregate), reading in zip(group, frames[-1].readings, strict=True):
            found[aggregate.name] = (len(frames) - 1, reading)
    return frames, [found[aggregate.name] for aggregate in plan.aggregates]


def grain_us(aggregate: Aggregate) -> int:
    """How often at least the values of an aggregate are logged."""
    if aggregate.kind == "session":
        return aggregate.window_us
    return aggregate.slide_us if aggregate.kind == "sliding" else _LIFETIME_GRAIN_US
