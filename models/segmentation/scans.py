"""What every source of images gives: pictures with masks, split so that nothing leaks."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


class DataError(ValueError):
    """Images that are missing, damaged or can't be split, in one sentence."""


@dataclass(frozen=True)
class Scan:
    """One picture, [H, W] in [0, 1], and what is to be found in it.

    `kind` is its class (`benign`, ...); no two splits share a `group` (near-duplicates, or one patient).
    """

    id: str
    image: Image
    mask: Mask
    kind: str
    group: str

    def grouped(self, name: str) -> "Scan":
        """The same scan in another group."""
        return replace(self, group=name)


def digest(scans: Sequence[Scan]) -> str:
    """Identify scans by what they hold; two results over scans with the same digest can be compared."""
    total = hashlib.sha256()
    for scan in scans:
        total.update(f"{scan.id}\0{scan.kind}\0{scan.image.shape}\0".encode())
        total.update(np.ascontiguousarray(scan.image, "<f4").tobytes())
        total.update(np.packbits(scan.mask).tobytes())
    return total.hexdigest()[:16]


def divide(
    scans: Sequence[Scan], shares: Sequence[float], seed: int
) -> tuple[tuple[Scan, ...], tuple[Scan, ...], tuple[Scan, ...]]:
    """Train, validation and test; `shares` are those of validation and test among the groups of each kind.

    A group goes into one part as a whole, and counts as the kind of its first scan. Every part has each kind of which
    there are three groups or more.

    Raises:
        DataError: fewer than three groups.
    """
    kinds = {scan.group: scan.kind for scan in reversed(scans)}
    if len(kinds) < 3:
        raise DataError(f"A split needs 3 groups of images or more, found {len(kinds)}.")
    rng = np.random.default_rng([seed, 271])
    parts: dict[str, int] = {}
    for kind in sorted(set(kinds.values())):
        names = sorted(name for name, of in kinds.items() if of == kind)
        rng.shuffle(names)
        least = 1 if len(names) >= 3 else 0
        sizes = [max(least, round(share * len(names))) for share in shares]
        cuts = np.cumsum([0, *sizes])
        parts |= {name: part for part in (1, 2) for name in names[cuts[part - 1] : cuts[part]]}
    found = [tuple(scan for scan in scans if parts.get(scan.group, 0) == part) for part in range(3)]
    if not all(found):
        raise DataError(f"{len(kinds)} groups of images are too few for the shares of the split; give more images.")
    return found[0], found[1], found[2]
