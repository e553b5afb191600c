"""Mergeable sketches in blocks of fixed size: distinct values, quantiles, most frequent values.

A pane that needs a sketch takes a block of a pool when its first value comes and gives it back when it is cleared, so
entities without events cost nothing. Everything is deterministic: equal values in equal order give equal blocks.

Distinct values: HyperLogLog (Flajolet et al. 2007) with 1,024 registers and the estimator of Ertl, "New cardinality
estimation algorithms for HyperLogLog sketches" (2017), algorithm 6: standard error 1.04 / sqrt(1024) = 3.3%, for few
values near 0. Quantiles: the merging t-digest of Dunning and Ertl, "Computing extremely accurate quantiles using
t-digests" (2019), with the scale function k1 and compression 100: exact up to 100 values a pane, beyond that within
1% of rank in the middle and less towards both ends. Most frequent: Space-Saving (Metwally et al. 2005): a count is at
most n / capacity too high for the n values of a pane.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.compile_kernels import kernel
from streaming.keys import Places
from streaming.memory import float_bits, leading_zeros
from streaming.records import Bytes, Floats, Ints

HLL, DIGEST, TOP = range(3)
HLL_BYTES = 1024

_HLL_BITS = 10
_HLL_RANKS = 64 - _HLL_BITS + 2
_COMPRESSION = 100.0
_CENTROIDS = 110
_BUFFER = 100
_N_CENTROIDS, _N_BUFFER, _LOWEST, _HIGHEST, _MEANS = range(5)
_WEIGHTS = _MEANS + _CENTROIDS
_VALUES = _WEIGHTS + _CENTROIDS
DIGEST_CELLS = _VALUES + _BUFFER
_GATHERED = _CENTROIDS + _BUFFER


class Pools(NamedTuple):
    """Blocks of the three kinds of sketches; block 0 of each is for scratch, a cell holds 0 where there is no block.

    Attributes:
        hll: [B, 1024] registers.
        digest: [B, DIGEST_CELLS] number of centroids and of buffered values, minimum, maximum, means, weights, buffer.
        top: [B, 1 + 2 * capacity] number of entries, then value and count of each.
        free: [3, max B] numbers of free blocks, in `n_free` [3] first ones.
    """

    hll: Bytes
    digest: Floats
    top: Floats
    free: Ints
    n_free: Ints


def top_capacity(k: int) -> int:
    """How many values Space-Saving follows to name the k most frequent."""
    return max(64, 8 * k)


def empty_pools(k: int) -> Pools:
    """Pools with the scratch blocks only; `k` is that of the largest top_k."""
    return Pools(
        hll=np.zeros((1, HLL_BYTES), dtype=np.uint8),
        digest=np.zeros((1, DIGEST_CELLS)),
        top=np.zeros((1, 1 + 2 * top_capacity(k))),
        free=np.zeros((3, 0), dtype=np.int64),
        n_free=np.zeros(3, dtype=np.int64),
    )


def grown_size(size: int, free: int, wanted: int) -> int:
    """How large a pool becomes in which so many are to be free: it doubles at least."""
    missing = wanted - free
    return size + max(missing, size) if missing > 0 else size


def grown_stack(free: Ints, size: int, larger: int) -> Ints:
    """The stack of a pool that has grown: the old free numbers are taken first, then the new ones as they rise."""
    return np.concatenate([np.arange(larger - 1, size - 1, -1), free])


def nbytes(pools: Pools, blocks: Sequence[int]) -> int:
    """Memory that the pools take once so many blocks of each kind are free."""
    arrays: list[Any] = [pools.hll, pools.digest, pools.top]
    return sum(
        size * array.itemsize * array.shape[1] for size, array in zip(_sizes(pools, blocks), arrays, strict=True)
    )


def _sizes(pools: Pools, blocks: Sequence[int]) -> list[int]:
    return [grown_size(len(pools[kind]), int(pools.n_free[kind]), blocks[kind]) for kind in (HLL, DIGEST, TOP)]


def reserve(pools: Pools, blocks: Sequence[int]) -> Pools:
    """Pools with at least so many free blocks of each kind; the same ones where that is so already."""
    if all(pools.n_free[kind] >= blocks[kind] for kind in (HLL, DIGEST, TOP)):
        return pools
    arrays: list[Any] = [pools.hll, pools.digest, pools.top]
    stacks = [pools.free[kind, : pools.n_free[kind]] for kind in (HLL, DIGEST, TOP)]
    for kind, larger in enumerate(_sizes(pools, blocks)):
        array, size = arrays[kind], len(arrays[kind])
        if larger > size:
            arrays[kind] = np.zeros((larger, array.shape[1]), dtype=array.dtype)
            arrays[kind][:size] = array
            stacks[kind] = grown_stack(stacks[kind], size, larger)
    free = np.zeros((3, max(len(array) for array in arrays)), dtype=np.int64)
    for kind, stack in enumerate(stacks):
        free[kind, : len(stack)] = stack
    hll, digest, top = arrays
    return Pools(hll, digest, top, free, np.array([len(stack) for stack in stacks], dtype=np.int64))


def packed(pools: Pools, kind: int, blocks: Ints) -> list[npt.NDArray[Any]]:
    """What some blocks hold, for `unpack`: which of their cells are not zero, as bits, and those."""
    contents: npt.NDArray[Any] = pools[kind][blocks]
    if kind == DIGEST:
        _blank(contents[:, _MEANS:_WEIGHTS], contents[:, _N_CENTROIDS])
        _blank(contents[:, _WEIGHTS:_VALUES], contents[:, _N_CENTROIDS])
        _blank(contents[:, _VALUES:], contents[:, _N_BUFFER])
    elif kind == TOP:
        _blank(contents[:, 1:], 2 * contents[:, 0])
    held = contents.view(f"u{contents.itemsize}") != 0  # -0.0 is not zero
    return [np.packbits(held), contents[held]]


def unpack(pools: Pools, kind: int, count: int, arrays: Sequence[npt.NDArray[Any]]) -> Ints:
    """The numbers of `count` free blocks, which now hold what was `packed`."""
    contents: npt.NDArray[Any] = np.zeros((count, pools[kind].shape[1]), dtype=pools[kind].dtype)
    contents[np.unpackbits(arrays[0], count=contents.size).view(np.bool_).reshape(contents.shape)] = arrays[1]
    pools.n_free[kind] -= count
    blocks = pools.free[kind, pools.n_free[kind] :][:count].copy()
    pools[kind][blocks] = contents
    return blocks


def top_values(top: Floats, blocks: Ints) -> Places:
    """Where some blocks of most frequent values, each given once, hold these."""
    held = np.arange(top.shape[1] // 2) < top[blocks, :1]
    block, entry = np.nonzero(held)
    return Places(top, (blocks[block], 1 + 2 * entry))


def _blank(cells: Floats, counts: Floats) -> None:
    """Sets what lies behind the first cells of each row to zero: what blocks held before they were given back."""
    cells[np.arange(cells.shape[1]) >= counts[:, None]] = 0.0


@kernel
def take_block(pools: Pools, kind: int) -> int:
    """A free block of a kind, emptied."""
    pools.n_free[kind] -= 1
    block = pools.free[kind, pools.n_free[kind]]
    clear_block(pools, kind, block)
    return int(block)


@kernel
def clear_block(pools: Pools, kind: int, block: int) -> None:
    """Empties a block."""
    if kind == HLL:
        pools.hll[block] = 0
    elif kind == DIGEST:
        pools.digest[block, _N_CENTROIDS] = 0.0
        pools.digest[block, _N_BUFFER] = 0.0
    else:
        pools.top[block, 0] = 0.0


@kernel
def give_block(pools: Pools, kind: int, block: int) -> None:
    """Gives a block back."""
    pools.free[kind, pools.n_free[kind]] = block
    pools.n_free[kind] += 1


@kernel
def add_to_sketch(pools: Pools, kind: int, block: int, value: float) -> None:
    """Adds one value to a block."""
    if kind == HLL:
        _hll_add(pools.hll, block, value)
    elif kind == DIGEST:
        _digest_add(pools.digest, block, value)
    else:
        _top_add(pools.top, block, value)


@kernel
def merge_sketches(pools: Pools, kind: int, into: int, block: int) -> None:
    """Adds what one block has seen to another, which has seen what came before."""
    if kind == HLL:
        hll_merge(pools.hll, into, block)
    elif kind == DIGEST:
        _digest_merge(pools.digest, into, block)
    else:
        _top_merge(pools.top, into, block)


@kernel
def _hll_add(hll: Bytes, block: int, value: float) -> None:
    bits = float_bits(value + 0.0)  # -0.0 is 0.0
    bits ^= bits >> np.uint64(33)  # the finaliser of MurmurHash3
    bits *= np.uint64(0xFF51AFD7ED558CCD)
    bits ^= bits >> np.uint64(33)
    bits *= np.uint64(0xC4CEB9FE1A85EC53)
    bits ^= bits >> np.uint64(33)
    register = np.int64(bits >> np.uint64(64 - _HLL_BITS))
    rest = (bits << np.uint64(_HLL_BITS)) | np.uint64(1 << (_HLL_BITS - 1))
    rank = leading_zeros(rest) + 1
    if rank > hll[block, register]:
        hll[block, register] = rank


@kernel
def hll_merge(hll: Bytes, into: int, block: int) -> None:
    """The union of two blocks."""
    for register in range(HLL_BYTES):
        if hll[block, register] > hll[into, register]:
            hll[into, register] = hll[block, register]


@kernel
def hll_estimate(hll: Bytes, block: int) -> float:
    """How many different values a block has seen, rounded."""
    counts = np.zeros(_HLL_RANKS)
    for register in range(HLL_BYTES):
        counts[hll[block, register]] += 1.0
    size = float(HLL_BYTES)
    z = size * _tau(1.0 - counts[_HLL_RANKS - 1] / size)
    for rank in range(_HLL_RANKS - 2, 0, -1):
        z = 0.5 * (z + counts[rank])
    z += size * _sigma(counts[0] / size)
    return float(np.round(0.5 / np.log(2.0) * size * size / z))


@kernel
def _sigma(x: float) -> float:
    if x == 1.0:
        return np.inf
    y, z, before = 1.0, x, -1.0
    while z != before:
        x *= x
        before = z
        z += x * y
        y += y
    return z


@kernel
def _tau(x: float) -> float:
    if x == 0.0 or x == 1.0:
        return 0.0
    y, z, before = 1.0, 1.0 - x, -1.0
    while z != before:
        x = np.sqrt(x)
        before = z
        y *= 0.5
        z -= (1.0 - x) ** 2 * y
    return z / 3.0


@kernel
def _digest_add(digest: Floats, block: int, value: float) -> None:
    if digest[block, _N_CENTROIDS] + digest[block, _N_BUFFER] == 0.0:
        digest[block, _LOWEST] = digest[block, _HIGHEST] = value
    digest[block, _LOWEST] = min(digest[block, _LOWEST], value)
    digest[block, _HIGHEST] = max(digest[block, _HIGHEST], value)
    buffered = int(digest[block, _N_BUFFER])
    if buffered == _BUFFER:
        _compress(digest, block)
        buffered = 0
    digest[block, _VALUES + buffered] = value
    digest[block, _N_BUFFER] = buffered + 1.0


@kernel
def _scale_limit(q: float) -> float:
    """The largest quantile that one centroid from `q` on may reach: one step of k1(q) = c / (2 pi) asin(2 q - 1)."""
    angle = np.arcsin(2.0 * q - 1.0) + 2.0 * np.pi / _COMPRESSION
    return 1.0 if angle >= np.pi / 2.0 else (np.sin(angle) + 1.0) / 2.0


@kernel
def _compress(digest: Floats, block: int) -> None:
    means, weights = np.empty(_GATHERED), np.empty(_GATHERED)
    count = digest_gather(digest, block, means, weights, 0)
    _write_compressed(digest, block, means[:count], weights[:count])


@kernel
def _write_compressed(digest: Floats, block: int, means: Floats, weights: Floats) -> None:
    order = np.argsort(means, kind="mergesort")
    total = 0.0
    for weight_at in weights:
        total += weight_at
    centroids, done, mean, weight = 0, 0.0, means[order[0]], weights[order[0]]
    limit = _scale_limit(0.0)
    for at in order[1:]:
        more = weights[at]
        if (done + weight + more) / total <= limit:
            weight += more
            mean += (means[at] - mean) * more / weight
        else:
            digest[block, _MEANS + centroids], digest[block, _WEIGHTS + centroids] = mean, weight
            centroids += 1
            done += weight
            limit = _scale_limit(done / total)
            mean, weight = means[at], more
    digest[block, _MEANS + centroids], digest[block, _WEIGHTS + centroids] = mean, weight
    digest[block, _N_CENTROIDS] = centroids + 1.0
    digest[block, _N_BUFFER] = 0.0


@kernel
def _digest_merge(digest: Floats, into: int, block: int) -> None:
    means, weights = np.empty(2 * _GATHERED), np.empty(2 * _GATHERED)
    own = digest_gather(digest, into, means, weights, 0)
    count = digest_gather(digest, block, means, weights, own)
    if own == 0:
        digest[into] = digest[block]
        return
    digest[into, _LOWEST] = min(digest[into, _LOWEST], digest[block, _LOWEST])
    digest[into, _HIGHEST] = max(digest[into, _HIGHEST], digest[block, _HIGHEST])
    if digest[into, _N_CENTROIDS] + digest[block, _N_CENTROIDS] == 0.0 and count <= _BUFFER:
        digest[into, _VALUES + own : _VALUES + count] = means[own:count]
        digest[into, _N_BUFFER] = count
    else:
        _write_compressed(digest, into, means[:count], weights[:count])


@kernel
def digest_gather(digest: Floats, block: int, means: Floats, weights: Floats, at: int) -> int:
    """Appends a block's centroids and buffered values to `means` and `weights` from `at`; returns the end."""
    for centroid in range(int(digest[block, _N_CENTROIDS])):
        means[at], weights[at] = digest[block, _MEANS + centroid], digest[block, _WEIGHTS + centroid]
        at += 1
    for buffered in range(int(digest[block, _N_BUFFER])):
        means[at], weights[at] = digest[block, _VALUES + buffered], 1.0
        at += 1
    return at


@kernel
def digest_bounds(digest: Floats, block: int) -> tuple[float, float]:
    """The smallest and the largest value of a block."""
    return float(digest[block, _LOWEST]), float(digest[block, _HIGHEST])


@kernel
def digest_room(blocks: int) -> int:
    """How many centroids and values so many blocks hold at most."""
    return blocks * _GATHERED


@kernel
def quantile(q: float, means: Floats, weights: Floats, order: Ints, lowest: float, highest: float) -> float:
    """A quantile of weighted values, visited in `order`; linear between values, as numpy's, where all weigh 1."""
    count = len(order)
    total = 0.0
    for at in range(count):
        total += weights[order[at]]
    if total == count:
        position = q * (count - 1)
        below = int(position)
        above = min(below + 1, count - 1)
        return float(means[order[below]] + (means[order[above]] - means[order[below]]) * (position - below))
    target, done = q * total, 0.0
    centre, mean = 0.0, lowest
    for at in range(count):
        weight = weights[order[at]]
        here = done + weight / 2.0
        if target <= here:
            return float(mean + (means[order[at]] - mean) * (target - centre) / (here - centre))
        centre, mean = here, means[order[at]]
        done += weight
    return mean + (highest - mean) * (target - centre) / (total - centre)


@kernel
def _top_add(top: Floats, block: int, value: float) -> None:
    count = int(top[block, 0])
    smallest = 1
    for at in range(1, 1 + 2 * count, 2):
        if top[block, at] == value:
            top[block, at + 1] += 1.0
            return
        if top[block, at + 1] < top[block, smallest + 1]:
            smallest = at
    if 1 + 2 * count < top.shape[1]:
        top[block, 1 + 2 * count], top[block, 2 + 2 * count] = value, 1.0
        top[block, 0] = count + 1.0
    else:
        top[block, smallest] = value
        top[block, smallest + 1] += 1.0


@kernel
def _top_merge(top: Floats, into: int, block: int) -> None:
    width = top.shape[1]
    values, counts = np.empty(width), np.empty(width)
    n = top_gather(top, into, values, counts, 0)
    n = top_gather(top, block, values, counts, n)
    kept = min(n, width // 2)
    for rank in range(kept):
        best = 0
        for at in range(n):
            if counts[at] > counts[best]:
                best = at
        top[into, 1 + 2 * rank], top[into, 2 + 2 * rank] = values[best], counts[best]
        counts[best] = 0.0
    top[into, 0] = kept


@kernel
def top_gather(top: Floats, block: int, values: Floats, counts: Floats, n: int) -> int:
    """Adds a block's counts to the `n` gathered ones; returns how many there are now."""
    for at in range(1, 1 + 2 * int(top[block, 0]), 2):
        found = 0
        while found < n and values[found] != top[block, at]:
            found += 1
        if found == n:
            values[n], counts[n] = top[block, at], 0.0
            n += 1
        counts[found] += top[block, at + 1]
    return n


@kernel
def top_write(values: Floats, counts: Floats, n: int, out: Floats) -> None:
    """Writes the most frequent gathered values, NaN behind them; of equal counts the one gathered first."""
    for rank in range(len(out)):
        best = -1
        for at in range(n):
            if counts[at] > 0.0 and (best < 0 or counts[at] > counts[best]):
                best = at
        out[rank] = values[best] if best >= 0 else np.nan
        if best >= 0:
            counts[best] = 0.0
