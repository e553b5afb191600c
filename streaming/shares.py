"""Which worker computes which partitions: even, and with as few moves as can be."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """One partition of one view."""

    view: str
    partition: int


def deal(units: Sequence[Unit], held: Mapping[int, set[Unit]]) -> dict[int, set[Unit]]:
    """Member to its share: sizes differ by one at most, and a unit changes its member only where that demands it.

    Args:
        units: Everything to be dealt, each once.
        held: Member to what it has now; one member at least.
    """
    known = set(units)
    shares = {member: mine & known for member, mine in held.items()}
    least, more = divmod(len(units), len(shares))
    order = {unit: at for at, unit in enumerate(units)}
    taken = set().union(*shares.values())
    free = [unit for unit in units if unit not in taken]
    for rank, member in enumerate(sorted(shares, key=lambda one: -len(shares[one]))):
        size = least + (rank < more)
        kept = sorted(shares[member], key=order.__getitem__)
        shares[member], dropped = set(kept[:size]), kept[size:]
        free += dropped
    free.sort(key=order.__getitem__)
    for unit in free:
        smallest = min(shares, key=lambda one: len(shares[one]))
        shares[smallest].add(unit)
    return shares
