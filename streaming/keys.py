"""Dense ids for entities: the first entity seen is 0, the next new one 1, so that state can live in plain arrays."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from streaming.compile_kernels import inlined, kernel
from streaming.memory import LINE_BYTES, address, byte, lines, prefetch, word
from streaming.plan import EntityType
from streaming.records import Bools, Bytes, Floats, Ints

T = TypeVar("T", bound=np.generic)

_EMPTY = -1
_ID_BITS = 32
_ID = (1 << _ID_BITS) - 1
_SLOT_BYTES = 32
_SHORT = 24
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_FINAL_PRIME = np.uint64(0xFF51AFD7ED558CCD)
_HALF = np.uint64(32)
_AHEAD = 16
_POSITIVE = np.uint64(0x7FFFFFFFFFFFFFFF)


class Places(NamedTuple):
    """The numbers of texts in an array of floats: `array[at]`."""

    array: Floats
    at: tuple[Ints, ...]


class KeyIndex:
    """A hash table (open addressing) from the bytes of an entity to its id; an int64 entity is its 8 bytes.

    A slot is four words, half a cache line: the length of the text above the id, or -1; then the text itself, zeros
    behind it, or of one of more than 24 bytes where it starts, its hash and nothing.
    """

    def __init__(self) -> None:
        self._text = np.empty(1024, dtype=np.uint8)
        self._starts = np.zeros(65, dtype=np.int64)
        self._slots = _empty_slots(128)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def ids(self, text: Bytes, spans: Ints, wanted: Bools) -> Ints:
        """The id of each wanted span [N, 2] of `text`, new ids in the order of first sight; -1 for the others."""
        self._reserve(len(spans), len(text))
        ids = np.full(len(spans), _EMPTY, dtype=np.int64)
        self._count = _assign(text, spans, wanted, self._text, self._starts, self._slots, self._count, ids)
        return ids

    def find(self, text: Bytes, spans: Ints, wanted: Bools) -> Ints:
        """The id of each wanted span [N, 2] of `text` that is known; -1 for the others."""
        return _find(text, spans, wanted, self._text, self._slots)

    def entities(self, ids: Ints, entity_type: EntityType) -> pa.Array:
        """The entities of some ids, as strings or int64."""
        starts = self._starts
        lengths = starts[ids + 1] - starts[ids]
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        text = np.empty(offsets[-1], dtype=np.uint8)
        _gather(self._text, starts, ids, offsets, text)
        if entity_type == "int64":
            return pa.array(text.view(np.int64))
        buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text)]
        return pa.Array.from_buffers(pa.string(), len(ids), buffers)

    def lookup(self, ids: Ints) -> pa.Array:
        """The texts of some ids as strings, null for -1."""
        missing = ids < 0
        texts = self.entities(np.where(missing, 0, ids), "string") if self._count else pa.nulls(len(ids), pa.string())
        return pc.if_else(pa.array(missing), pa.scalar(None, pa.string()), texts)

    @property
    def nbytes(self) -> int:
        """Memory that the index takes."""
        return self._text.nbytes + self._starts.nbytes + self._slots.nbytes

    def state(self, first: int = 0) -> tuple[Bytes, Ints]:
        """The bytes of the entities from `first` on and where each starts in them ([K + 1]), for `extend`."""
        starts = self._starts[first : self._count + 1]
        return self._text[starts[0] : starts[-1]], starts - starts[0]

    def extend(self, text: Bytes, starts: Ints) -> None:
        """Adds the entities of a `state`, none of which is known."""
        spans = np.stack([starts[:-1], starts[1:]], axis=1)
        self.ids(text.copy(), spans, np.ones(len(spans), dtype=np.bool_))

    def kept(self, ids: Ints) -> "KeyIndex":
        """An index of some entities, which become 0, 1, ... in this order."""
        index = KeyIndex()
        lengths = self._starts[ids + 1] - self._starts[ids]
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        text = np.empty(offsets[-1], dtype=np.uint8)
        _gather(self._text, self._starts, ids, offsets, text)
        index.extend(text, offsets)
        return index

    def without_unused(self, places: Sequence[Places]) -> "KeyIndex":
        """An index of the texts that some places name, whose numbers there are changed; this one where most are."""
        used = np.zeros(self._count, dtype=np.bool_)
        for array, at in places:
            used[array[at].astype(np.int64)] = True
        ids = np.flatnonzero(used)
        if 2 * len(ids) >= self._count:
            return self
        numbers = np.cumsum(used) - 1
        for array, at in places:
            array[at] = numbers[array[at].astype(np.int64)]
        return self.kept(ids)

    def _reserve(self, more: int, more_bytes: int) -> None:
        """Makes room for new entities: the table stays at most half full."""
        count = self._count + more
        if count + 1 > len(self._starts):
            self._starts = _grown(self._starts, count + 1)
        needed = int(self._starts[self._count]) + more_bytes
        if needed > len(self._text):
            self._text = _grown(self._text, needed)
        if 2 * count > len(self._slots):
            size = len(self._slots)
            while size < 2 * count:
                size *= 2
            self._slots = _empty_slots(size)
            _reinsert(self._text, self._starts, self._slots, self._count)


def _empty_slots(size: int) -> Ints:
    slots = lines(size, _SLOT_BYTES // 8)
    slots[:, 0] = _EMPTY
    return slots


def _grown(array: npt.NDArray[T], needed: int) -> npt.NDArray[T]:
    grown = np.zeros(max(needed, 2 * len(array)), dtype=array.dtype)
    grown[: len(array)] = array
    return grown


@kernel
def _hash(start: int, end: int) -> int:
    """Multiplies and folds 8 bytes at a time; the last 8 overlap the ones before."""
    code = np.uint64(end - start) * _PRIME
    if end - start < 8:
        for i in range(start, end):
            code = (code ^ np.uint64(byte(i))) * _PRIME
    else:
        for i in range(start, end - 8, 8):
            code = (code ^ word(i)) * _PRIME
            code ^= code >> _HALF
        code = (code ^ word(end - 8)) * _PRIME
    code ^= code >> _HALF
    code *= _FINAL_PRIME  # spreads the last bytes, which sit in the highest bits, over those that choose the slot
    code ^= code >> _HALF
    return int(code & _POSITIVE)


def texts_of(text: Bytes, spans: Ints) -> pa.Array:
    """The spans [N, 2] of `text` as strings."""
    offsets = np.zeros(len(spans) + 1, dtype=np.int64)
    np.cumsum(spans[:, 1] - spans[:, 0], out=offsets[1:])
    found = np.empty(offsets[-1], dtype=np.uint8)
    _gather(text, np.ascontiguousarray(spans[:, 0]), np.arange(len(spans)), offsets, found)
    return pa.Array.from_buffers(
        pa.string(), len(spans), [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(found)]
    )


@kernel
def hash_texts(text: Bytes, spans: Ints) -> Floats:
    """A hash of each span [N, 2], an integer below 2**53, so that it is exact as a float."""
    hashes = np.empty(len(spans))
    base = address(text)
    for row in range(len(spans)):
        hashes[row] = _hash(base + spans[row, 0], base + spans[row, 1]) >> 10
    return hashes


@kernel
def _equal(one: int, other: int, length: int) -> bool:
    i = 0
    while i + 8 <= length:
        if word(one + i) != word(other + i):
            return False
        i += 8
    while i < length:
        if byte(one + i) != byte(other + i):
            return False
        i += 1
    return True


@inlined
def _words(start: int, length: int, hashed: int, first: int) -> tuple[int, int, int]:
    """The last three words of the slot of a text at an address, which starts at `first` in the index."""
    if length > _SHORT:
        return first, hashed, 0
    if length < 8:
        short = np.uint64(0)
        for i in range(length):
            short |= np.uint64(byte(start + i)) << np.uint64(8 * i)
        return int(np.int64(short)), 0, 0
    end = np.uint64(0) if length % 8 == 0 else word(start + length - 8) >> np.uint64(64 - 8 * (length % 8))
    second = word(start + 8) if length >= 16 else end
    third = word(start + 16) if length == _SHORT else end if length >= 16 else np.uint64(0)
    return int(np.int64(word(start))), int(np.int64(second)), int(np.int64(third))


@inlined
def _place(hashed: int, step: int) -> int:
    """Where a text may be that is in none of `step` places before: the other slot of each cache line comes first."""
    return ((hashed >> 1) + (step >> 1)) << 1 | (hashed ^ step) & 1


@inlined
def _probe(start: int, length: int, hashed: int, known_base: int, slots: Ints) -> int:
    """The slot of a text, or the empty one where it belongs."""
    one, two, three = _words(start, length, hashed, 0)
    mask = len(slots) - 1
    step, slot = 0, hashed & mask
    while slots[slot, 0] != _EMPTY:
        if slots[slot, 0] >> _ID_BITS == length and slots[slot, 2] == two:
            if length > _SHORT:
                if _equal(known_base + slots[slot, 1], start, length):
                    break
            elif slots[slot, 1] == one and slots[slot, 3] == three:
                break
        step += 1
        slot = _place(hashed, step) & mask
    return slot


@kernel
def _assign(
    text: Bytes, spans: Ints, wanted: Bools, known: Bytes, starts: Ints, slots: Ints, count: int, ids: Ints
) -> int:
    mask = len(slots) - 1
    base, known_base, slots_base = address(text), address(known), address(slots)
    hashes = np.empty(len(spans), dtype=np.int64)
    for ahead in range(len(spans) + 2 * _AHEAD):
        # Two steps that each wait for memory are begun for later rows: the slot, then the text if it is elsewhere.
        row = ahead
        if row < len(spans) and wanted[row]:
            hashes[row] = _hash(base + spans[row, 0], base + spans[row, 1])
            slot_at = slots_base + _SLOT_BYTES * (hashes[row] & mask)
            prefetch(slot_at)
            prefetch(slot_at + LINE_BYTES)  # one in ten is in the next line
        row -= _AHEAD
        if 0 <= row < len(spans) and wanted[row] and spans[row, 1] - spans[row, 0] > _SHORT:
            prefetch(known_base + slots[hashes[row] & mask, 1])
        row -= _AHEAD
        if row < 0 or not wanted[row]:
            continue
        start, length = spans[row, 0], spans[row, 1] - spans[row, 0]
        slot = _probe(base + start, length, hashes[row], known_base, slots)
        if slots[slot, 0] == _EMPTY:
            first = starts[count]
            known[first : first + length] = text[start : start + length]
            starts[count + 1] = first + length
            slots[slot, 0] = length << _ID_BITS | count
            slots[slot, 1], slots[slot, 2], slots[slot, 3] = _words(base + start, length, hashes[row], first)
            count += 1
        ids[row] = slots[slot, 0] & _ID
    return count


@kernel
def _find(text: Bytes, spans: Ints, wanted: Bools, known: Bytes, slots: Ints) -> Ints:
    base, known_base = address(text), address(known)
    ids = np.full(len(spans), _EMPTY, dtype=np.int64)
    for row in range(len(spans)):
        if not wanted[row]:
            continue
        start, end = base + spans[row, 0], base + spans[row, 1]
        slot = _probe(start, end - start, _hash(start, end), known_base, slots)
        if slots[slot, 0] != _EMPTY:
            ids[row] = slots[slot, 0] & _ID
    return ids


@kernel
def _reinsert(text: Bytes, starts: Ints, slots: Ints, count: int) -> None:
    mask = len(slots) - 1
    base = address(text)
    for entity in range(count):
        first, length = starts[entity], starts[entity + 1] - starts[entity]
        hashed = _hash(base + first, base + first + length)
        step, slot = 0, hashed & mask
        while slots[slot, 0] != _EMPTY:
            step += 1
            slot = _place(hashed, step) & mask
        slots[slot, 0] = length << _ID_BITS | entity
        slots[slot, 1], slots[slot, 2], slots[slot, 3] = _words(base + first, length, hashed, first)


@kernel
def _gather(text: Bytes, starts: Ints, ids: Ints, offsets: Ints, out: Bytes) -> None:
    for row in range(len(ids)):
        start = starts[ids[row]]
        for k in range(offsets[row + 1] - offsets[row]):
            out[offsets[row] + k] = text[start + k]
