"""The partial aggregates of all entities as one array of cells, with the sketches that some of the cells name."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from streaming import partials, sketches
from streaming.compile_kernels import kernel
from streaming.plan import Aggregate
from streaming.records import Floats, Ints
from streaming.sketches import Pools

T = TypeVar("T", bound=np.generic)


class Cells:
    """R parts (panes of a ring, sessions) of S cells for each of K entities.

    Args:
        aggregates: What the parts hold, each with its column of the plan.
        parts: R.

    Attributes:
        layout: Of a part.
        array: float64 [K * R * S].
        pools: The sketches.
    """

    def __init__(self, aggregates: Sequence[tuple[int, Aggregate]], parts: int) -> None:
        self.layout = partials.layout(aggregates)
        self.pools = sketches.empty_pools(self.layout.top_k)
        self.array: Floats = np.zeros(0)
        self._parts = parts

    @property
    def has_sketches(self) -> bool:
        """Whether the cells of an entity are not its whole state."""
        return any(self.layout.blocks)

    @property
    def bytes_per_key(self) -> int:
        """Memory that one entity takes, sketches not counted."""
        return 8 * self._width

    @property
    def pool_bytes(self) -> int:
        """Memory of the sketches."""
        return sum(array.nbytes for array in self.pools)

    def reserve(self, keys: int) -> None:
        """Makes room for exactly so many entities, not fewer than there are."""
        self.array = grown(self.array, keys * self._width, 0)

    def reserve_sketches(self, events: int) -> None:
        """Makes room for what so many events can need."""
        if self.has_sketches:
            one, two, three = (events * blocks for blocks in self.layout.blocks)
            self.pools = sketches.reserve(self.pools, (one, two, three))

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        if self.has_sketches:
            gone = np.setdiff1d(np.arange(len(self._rows)), ids)
            _clear(gone, self._parts, self.layout.size, self.layout.operations, self.pools, self.array)
        self.array = self._rows[ids].reshape(-1)

    def state(self, ids: Ints | slice) -> list[npt.NDArray[Any]]:
        """The cells of some entities, and all sketches where there are any, for `restore`."""
        return [self._rows[ids], *(self.pools if self.has_sketches else ())]

    def restore(self, ids: Ints | slice, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes copies of the arrays of `state` for these entities, for which there is room."""
        self._rows[ids] = arrays[0]
        if self.has_sketches:
            self.pools = sketches.restored(arrays[1:])

    @property
    def _width(self) -> int:
        return self._parts * self.layout.size

    @property
    def _rows(self) -> Floats:
        return self.array.reshape(-1, self._width)


def grown(array: npt.NDArray[T], rows: int, fill: int) -> npt.NDArray[T]:
    """A copy with so many rows, the new ones filled."""
    larger = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    larger[: len(array)] = array
    if fill:
        larger[len(array) :] = fill
    return larger


@kernel
def _clear(ids: Ints, parts: int, size: int, operations: Ints, pools: Pools, cells: Floats) -> None:
    for key in ids:
        for part in range(parts):
            partials.clear(cells, (key * parts + part) * size, size, operations, pools, True)
