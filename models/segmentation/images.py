"""Reads ultrasound images and their masks in the layout of BUSI, and finds the frames that show nearly the same.

`<class>/<name>.png` is an image and `<class>/<name>_mask.png`, `<name>_mask_1.png`, ... are its lesions, together its
mask; class `normal` has empty ones (Al-Dhabyani et al., 2020).

Frames of one examination are so alike that a network which saw one in training knows the other: split by file,
validation would measure memory. BUSI doesn't say which frames belong to one patient, so frames that look alike are
joined into groups, and a group is never divided. Two frames look alike where their difference hashes (256 bits: is a
cell of a 16 x 16 grid brighter than its left neighbour) differ in at most `HASH_BITS`, or where their thumbnails of
32 x 32 pixels correlate by at least `CORRELATION`; the second finds frames that differ in brightness or by a small
shift. Both limits err on the side of joining: two strangers in one group cost nothing, two twins in two splits spoil
the figures.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pictures

from models.segmentation.scans import DataError, Image, Mask, Scan

logger = logging.getLogger(__name__)

HASH_BITS = 48
CORRELATION = 0.93
MAX_PIXELS = 50_000_000
_MASK = re.compile(r"(.+)_mask(?:_\d+)?")


def read_image(path: Path) -> Image:
    """An image file as grey float32[H, W] in [0, 1]; 16-bit ones keep their depth.

    Raises:
        DataError: it can't be read as an image, or has more than `MAX_PIXELS`.
    """
    try:
        with Pictures.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: has {picture.width} x {picture.height} pixels; at most {MAX_PIXELS} are read."
                )
            if picture.mode.startswith("I"):
                return np.asarray(picture, np.float32) / np.float32(65535)
            return np.asarray(picture.convert("L"), np.float32) / np.float32(255)
    except (OSError, SyntaxError, ValueError, Pictures.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: can't be read as an image ({' '.join(str(error).split())}).") from None


def is_mask(path: Path) -> bool:
    """Whether a file is the mask of another one, by its name."""
    return _MASK.fullmatch(path.stem) is not None


def read_folder(folder: Path) -> tuple[list[Scan], int]:
    """The scans of a folder by the order of their names, and how many images had to be skipped.

    Raises:
        DataError: no image of the folder can be used.
    """
    scans: list[Scan] = []
    skipped = 0
    for path in sorted(folder.glob("*/*.png"), key=_natural):
        if is_mask(path):
            continue
        try:
            scans.append(_scan(path))
        except DataError as error:
            skipped += 1
            logger.warning(json.dumps({"event": "image skipped", "path": str(path), "reason": str(error)}))
    if not scans:
        raise DataError(
            f"{folder}: no image can be used ({skipped} skipped); expected <class>/<name>.png beside <name>_mask.png."
        )
    groups = group([scan.image for scan in scans])
    return [scan.grouped(f"g{number:04d}") for scan, number in zip(scans, groups, strict=True)], skipped


def group(images: Sequence[Image]) -> list[int]:
    """The number of each image's group of near-duplicates; the first image of a group gives it its number."""
    hashes = np.array([_difference_hash(image) for image in images])
    thumbnails = np.array([_thumbnail(image) for image in images])
    alike = thumbnails @ thumbnails.T >= CORRELATION
    found = list(range(len(images)))
    for first in range(len(images)):
        near = (hashes[first] != hashes[first + 1 :]).sum(axis=1) <= HASH_BITS
        for second in first + 1 + np.flatnonzero(near | alike[first, first + 1 :]):
            low, high = sorted((_root(found, first), _root(found, int(second))))
            found[high] = low
    return [_root(found, number) for number in range(len(images))]


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        number = parents[number]
    return number


def _scan(path: Path) -> Scan:
    image = read_image(path)
    masks = [path.with_name(f"{path.stem}_mask.png"), *path.parent.glob(f"{_literal(path.stem)}_mask_*.png")]
    found = [one for one in masks if one.is_file()]
    if not found:
        raise DataError(f"{path}: has no {path.stem}_mask.png.")
    mask: Mask = np.zeros(image.shape, bool)
    for one in found:
        part = read_image(one) > 0.5
        if part.shape != image.shape:
            raise DataError(f"{one}: has another size than its image.")
        mask |= part
    return Scan(f"{path.parent.name}/{path.stem}", image, mask, path.parent.name, path.stem)


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _natural(path: Path) -> list[tuple[int, str]]:
    """`benign (9)` before `benign (10)`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _small(image: Image, width: int, height: int) -> NDArray[np.float64]:
    return np.asarray(Pictures.fromarray(image).resize((width, height), Pictures.Resampling.BOX), np.float64)


def _difference_hash(image: Image) -> NDArray[np.bool_]:
    cells = _small(image, 17, 16)
    return np.asarray(cells[:, 1:] > cells[:, :-1]).ravel()


def _thumbnail(image: Image) -> NDArray[np.float64]:
    """32 x 32 pixels as a vector of mean 0 and length 1, so that a product of two is their correlation."""
    cells = _small(image, 32, 32).ravel()
    cells = cells - cells.mean()
    return np.asarray(cells / max(float(np.linalg.norm(cells)), 1e-12))
