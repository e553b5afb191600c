"""The partial aggregates of all entities as one array of cells, with the sketches that some of the cells name."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from streaming import partials, sketches
from streaming.compile_kernels import kernel
from streaming.partials import CELL, SKETCH
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.sketches import Pools

T = TypeVar("T", bound=np.generic)


class Cells:
    """R parts (panes of a ring, sessions) of S cells for each of K entities, part by part.

    What is written at a time lies together so, and parts that no entity has used take no memory.

    Args:
        aggregates: What the parts hold, each with its column of the plan.
        parts: R.

    Attributes:
        layout: Of a part.
        array: float64 [R, K, S].
        pools: The sketches.
    """

    def __init__(self, aggregates: Sequence[tuple[int, Aggregate]], parts: int) -> None:
        self.layout = partials.layout(aggregates)
        self.pools = sketches.empty_pools(self.layout.top_k)
        self.array: Floats = np.zeros((parts, 0, self.layout.size))

    @property
    def has_sketches(self) -> bool:
        """Whether the cells of an entity are not its whole state."""
        return any(self.layout.blocks)

    @property
    def bytes_per_key(self) -> int:
        """Memory that one entity takes, sketches not counted."""
        return 8 * len(self.array) * self.layout.size

    @property
    def pool_bytes(self) -> int:
        """Memory of the sketches."""
        return sum(array.nbytes for array in self.pools)

    def reserve(self, keys: int) -> None:
        """Makes room for exactly so many entities, not fewer than there are."""
        before, self.array = self.array, np.zeros((len(self.array), keys, self.layout.size))
        self.array[:, : before.shape[1]] = before

    def reserve_sketches(self, events: int) -> None:
        """Makes room for what so many events can need."""
        if self.has_sketches:
            self.pools = sketches.reserve(self.pools, [events * blocks for blocks in self.layout.blocks])

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        if self.has_sketches:
            gone = np.setdiff1d(np.arange(self.array.shape[1]), ids)
            _clear(gone, self.layout.operations, self.pools, self.array)
        self.array = np.take(self.array, ids, axis=1)

    def state(self, ids: Ints, held: Bools) -> list[npt.NDArray[Any]]:
        """The cells of those parts of M entities that are held [R, M], and their sketches, for `restore`."""
        ends = np.cumsum(held.sum(axis=1)).tolist()
        cells = np.empty((ends[-1], self.layout.size))
        for part, (start, end) in enumerate(pairwise([0, *ends])):
            np.take(self.array[part], ids[held[part]], axis=0, out=cells[start:end], mode="clip")
        arrays: list[npt.NDArray[Any]] = [cells]
        for kind, cell in self._sketches:
            taken = cells[:, cell] > 0.0
            arrays += sketches.packed(self.pools, kind, cells[taken, cell].astype(np.int64))
            cells[taken, cell] = 1.0
        return arrays

    def restore(self, ids: Ints, held: Bools, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes copies of the arrays of `state` for these parts of M entities, for which there is room.

        Other parts of these entities must not be read before they are emptied.
        """
        if any(len(pool) > 1 for pool in self.pools[:3]):
            _clear(ids, self.layout.operations, self.pools, self.array)
        cells = arrays[0].copy() if self.has_sketches else arrays[0]
        needed = [0, 0, 0]
        for kind, cell in self._sketches:
            needed[kind] += int((cells[:, cell] > 0.0).sum())
        self.pools = sketches.reserve(self.pools, needed)
        for (kind, cell), contents in zip(self._sketches, zip(arrays[1::2], arrays[2::2], strict=True), strict=True):
            taken = cells[:, cell] > 0.0
            cells[taken, cell] = sketches.unpack(self.pools, kind, int(taken.sum()), contents)
        start = 0
        for part in range(len(self.array)):
            rows = ids[held[part]]
            self.array[part, rows] = cells[start : start + len(rows)]
            start += len(rows)

    @property
    def _sketches(self) -> list[tuple[int, int]]:
        """The kind of each sketch of a part, and the cell that names its block."""
        return [(row[SKETCH], row[CELL]) for row in self.layout.operations.tolist() if row[SKETCH] >= 0]


def grown(array: npt.NDArray[T], rows: int, fill: int) -> npt.NDArray[T]:
    """A copy with so many rows, the new ones filled."""
    larger = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    larger[: len(array)] = array
    if fill:
        larger[len(array) :] = fill
    return larger


@kernel
def _clear(ids: Ints, operations: Ints, pools: Pools, cells: Floats) -> None:
    parts, keys, size = cells.shape
    for key in ids:
        for part in range(parts):
            partials.clear(cells.reshape(-1), (part * keys + key) * size, size, operations, pools, True)
