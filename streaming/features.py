"""From merged cells to feature columns: the last arithmetic of each function, and texts for their numbers."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from streaming.keys import KeyIndex
from streaming.plan import Aggregate, Plan
from streaming.records import Bools, Floats
from streaming.windows import Reading


def column(plan: Plan, aggregate: Aggregate, reading: Reading, out: Floats, texts: Mapping[int, KeyIndex]) -> pa.Array:
    """The feature [M] of an aggregate.

    Args:
        plan: Of the aggregate.
        aggregate: What is wanted.
        reading: Where it stands in `out`.
        out: [M, O] from the frame's `merge`.
        texts: For each column of role text, what its numbers mean.
    """
    counts, values = out[:, reading.counts], out[:, reading.values]
    empty = counts == 0.0
    index = texts.get(plan.column_of(aggregate))
    if aggregate.top is not None and index is not None:
        return _lists(out[:, reading.values : reading.values + aggregate.top], index)
    match aggregate.function:
        case "count":
            return pa.array(counts.astype(np.int64))
        case "count_distinct":
            return pa.array(np.where(empty, 0.0, values).astype(np.int64))
        case "sum":
            return pa.array(np.ascontiguousarray(values))
        case "mean":
            return _nullable(values / np.where(empty, 1.0, counts), empty)
        case "std" | "var":
            variances = out[:, reading.values + 1] / np.maximum(counts - 1.0, 1.0)
            return _nullable(np.sqrt(variances) if aggregate.function == "std" else variances, counts < 2.0)
        case "first" | "last":
            chosen = out[:, reading.values + 1]
            return _nullable(chosen, empty) if index is None else index.lookup(_numbers(chosen, empty))
        case "decayed_mean":
            weights = out[:, reading.values + 1]
            return _nullable(values / np.where(empty, 1.0, weights), empty)
        case _:
            return _nullable(values, empty)


def _nullable(values: Floats, missing: Bools) -> pa.Array:
    return pa.array(np.ascontiguousarray(values), mask=missing)


def _numbers(values: Floats, missing: Bools) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.where(missing | np.isnan(values), -1.0, values).astype(np.int64)


def _lists(numbers: Floats, index: KeyIndex) -> pa.Array:
    """Lists of the texts of the numbers [M, k] before the first NaN."""
    present = ~np.isnan(numbers)
    offsets = np.zeros(len(numbers) + 1, dtype=np.int32)
    np.cumsum(present.sum(axis=1), out=offsets[1:])
    texts = index.lookup(numbers[present].astype(np.int64))
    return pa.ListArray.from_arrays(pa.array(offsets), texts)
