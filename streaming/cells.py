"""The partial aggregates of all entities: rows of cells in a pool, with the sketches that some of the cells name."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from streaming import partials, sketches
from streaming.compile_kernels import inlined, kernel
from streaming.keys import Places
from streaming.memory import LINE_BYTES, address, lines, prefetch
from streaming.partials import CELL, CODE, COLUMN, COUNT_CELL, FIRST, LAST, SKETCH
from streaming.plan import Aggregate
from streaming.records import Floats, Ints
from streaming.sketches import Pools

T = TypeVar("T", bound=np.generic)

_AHEAD = 16


class CellArrays(NamedTuple):
    """What `Cells` holds, for kernels that take rows or give them back."""

    operations: Ints
    has_sketches: bool
    pools: Pools
    rows: Floats
    free: Ints
    n_free: Ints


class Cells:
    """Rows of a pool, each a pane's or a session's: so an entity takes memory for what it holds and no more.

    Args:
        aggregates: What the rows hold, each with its column of the plan.
        heads: Cells at the start of a row that are its owner's.

    Attributes:
        layout: Of a row behind the heads.
        rows: float64 [B, heads + S and up to 3 more]; row 0 is nobody's, so that 0 can stand for none.
        free: [B] numbers of free rows, in `n_free` [1] first ones; the last of them is taken next.
        pools: The sketches.
    """

    def __init__(self, aggregates: Sequence[tuple[int, Aggregate]], heads: int) -> None:
        self.layout = partials.layout(aggregates)
        self.pools = sketches.empty_pools(self.layout.top_k)
        self._heads = heads
        self._end = heads + self.layout.size
        self.rows: Floats = lines(1, -(-self._end // 4) * 4).view(np.float64)
        self.free: Ints = np.zeros(1, dtype=np.int64)
        self.n_free: Ints = np.zeros(1, dtype=np.int64)

    @property
    def has_sketches(self) -> bool:
        """Whether the cells of a row are not all that it holds."""
        return any(self.layout.blocks)

    @property
    def held(self) -> int:
        """How many rows are not free."""
        return len(self.rows) - 1 - int(self.n_free[0])

    @property
    def arrays(self) -> CellArrays:
        """What kernels are called with; `reserve` and `restore` replace it."""
        return CellArrays(self.layout.operations, self.has_sketches, self.pools, self.rows, self.free, self.n_free)

    def nbytes(self, events: int = 0) -> int:
        """Memory that is taken once there is room for so many events."""
        rows: int = self._size(events) * 8 * (1 + self.rows.shape[1])
        return rows + sketches.nbytes(self.pools, self._blocks(events))

    def reserve(self, events: int) -> None:
        """Makes room for what so many events can need."""
        self._reserve_rows(events)
        self.pools = sketches.reserve(self.pools, self._blocks(events))

    def state(self, rows: Ints) -> list[npt.NDArray[Any]]:
        """The cells of some rows, without the heads, and their sketches, for `restore`."""
        cells = self.rows[rows, self._heads : self._end]
        arrays: list[npt.NDArray[Any]] = [cells]
        for kind, cell in self._sketches:
            taken = cells[:, cell] > 0.0
            arrays += sketches.packed(self.pools, kind, cells[taken, cell].astype(np.int64))
            cells[taken, cell] = 1.0
        return arrays

    def restore(self, arrays: Sequence[npt.NDArray[Any]]) -> Ints:
        """The numbers of rows that were free and now hold copies of the arrays of `state`; their heads are zero."""
        cells = arrays[0].copy() if self.has_sketches else arrays[0]
        needed = [0, 0, 0]
        for kind, cell in self._sketches:
            needed[kind] += int((cells[:, cell] > 0.0).sum())
        self.pools = sketches.reserve(self.pools, needed)
        for (kind, cell), contents in zip(self._sketches, zip(arrays[1::2], arrays[2::2], strict=True), strict=True):
            taken = cells[:, cell] > 0.0
            cells[taken, cell] = sketches.unpack(self.pools, kind, int(taken.sum()), contents)
        self._reserve_rows(len(cells))
        self.n_free -= len(cells)
        rows = self.free[self.n_free[0] :][: len(cells)][::-1].copy()
        self.rows[rows, : self._heads] = 0.0
        self.rows[rows, self._heads : self._end] = cells
        return rows

    def texts(self, rows: Ints, column: int) -> list[Places]:
        """Where some rows, each given once, name texts of a column."""
        places = []
        for operation in self.layout.operations.tolist():
            if operation[COLUMN] != column:
                continue
            cell = self._heads + operation[CELL]
            if operation[CODE] in (FIRST, LAST):
                holding = rows[self.rows[rows, self._heads + operation[COUNT_CELL]] > 0.0]
                places.append(Places(self.rows, (holding, np.full(len(holding), cell + 1))))
            elif operation[SKETCH] == sketches.TOP:
                blocks = self.rows[rows, cell].astype(np.int64)
                places.append(sketches.top_values(self.pools.top, blocks[blocks > 0]))
        return places

    @property
    def _sketches(self) -> list[tuple[int, int]]:
        """The kind of each sketch of a row, and the cell that names its block."""
        return [(row[SKETCH], row[CELL]) for row in self.layout.operations.tolist() if row[SKETCH] >= 0]

    def _blocks(self, events: int) -> list[int]:
        return [events * blocks for blocks in self.layout.blocks]

    def _size(self, wanted: int) -> int:
        return sketches.grown_size(len(self.rows), int(self.n_free[0]), wanted)

    def _reserve_rows(self, wanted: int) -> None:
        before, size = len(self.rows), self._size(wanted)
        if size > before:
            free = sketches.grown_stack(self.free[: self.n_free[0]], before, size)
            rows, self.rows = self.rows, lines(size, self.rows.shape[1]).view(np.float64)
            self.rows[:before] = rows
            self.free, self.n_free = grown(free, size, 0), np.array([len(free)])


def grown(array: npt.NDArray[T], rows: int, fill: int) -> npt.NDArray[T]:
    """A copy with so many rows, the new ones filled."""
    larger = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    larger[: len(array)] = array
    if fill:
        larger[len(array) :] = fill
    return larger


@inlined
def prefetch_row(rows: Floats, row: int) -> None:
    """Asks for the memory of a row."""
    start, size = address(rows) + 8 * row * rows.shape[1], 8 * rows.shape[1]
    for line in range(0, size, LINE_BYTES):
        prefetch(start + line)


@inlined
def take_row(cells: CellArrays, heads: int) -> int:
    """A free row, its cells behind the heads zero; the memory of one that is taken soon is asked for."""
    rows, free, n_free = cells.rows, cells.free, cells.n_free
    n_free[0] -= 1
    row, width = free[n_free[0]], rows.shape[1]
    if n_free[0] >= _AHEAD:
        prefetch_row(rows, free[n_free[0] - _AHEAD])
    for cell in range(heads, width):
        rows[row, cell] = 0.0
    return int(row)


@kernel
def give_row(row: int, heads: int, cells: CellArrays) -> None:
    """Gives a row back, and its sketches."""
    operations, rows, n_free = cells.operations, cells.rows, cells.n_free
    if cells.has_sketches:
        for number in range(len(operations)):
            kind, cell = operations[number, SKETCH], heads + operations[number, CELL]
            if kind >= 0 and rows[row, cell] != 0.0:
                sketches.give_block(cells.pools, kind, int(rows[row, cell]))
    cells.free[n_free[0]] = row
    n_free[0] += 1
