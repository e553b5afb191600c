"""The order of samples: decided by the seed alone, so that the state of the data is one number."""

from functools import lru_cache
from typing import Any

import numpy as np

Sample = tuple[int, int]
"""Epoch and index within it."""


def pick(first: int, count: int, size: int, seed: int) -> list[Sample]:
    """Samples first .. first + count - 1 of a run, across the ends of epochs; none is skipped or repeated."""
    numbers = range(first, first + count)
    return [(number // size, int(_permutation(seed, number // size, size)[number % size])) for number in numbers]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(size)
