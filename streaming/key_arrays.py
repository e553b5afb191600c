"""Whole numbers that are kept of each entity, reserved, renumbered and saved together."""

from typing import Any

import numpy as np
import numpy.typing as npt

from streaming.records import Ints


class KeyArrays:
    """Arrays [K], a number for each entity; `blanks` are those of an entity of which nothing is known."""

    def __init__(self, *blanks: int) -> None:
        self._blanks = np.array(blanks, dtype=np.int64)
        self._arrays: Ints = np.zeros((len(blanks), 0), dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Memory that an entity takes."""
        return int(self._blanks.nbytes)

    def reserve(self, keys: int) -> None:
        """Makes room for so many entities."""
        before, self._arrays = self._arrays, np.repeat(self._blanks[:, np.newaxis], keys, axis=1)
        self._arrays[:, : before.shape[1]] = before

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self._arrays = self._arrays.take(ids, axis=1)

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """The arrays of some entities, for `restore`."""
        return list(self._arrays.take(ids, axis=1))

    def restore(self, ids: Ints, arrays: list[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room."""
        self._arrays[:, ids] = arrays
