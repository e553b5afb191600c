"""Reads slices of CT volumes in the layout of Kaggle's 'modaresimr/medical-image-segmentation'.

`Task00X_*/CT.zip` holds `<case>.nii` or `<case>.nii.gz`, and `Task00X_*/GroundTruth/<case>.pkl` the labels of a case as
a sparse volume. All slices of a case are one group, so no patient is in two splits.
"""

import gzip
import io
import json
import logging
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.segmentation.config import KaggleConfig
from models.segmentation.pickles import MAX_VOXELS, load_volume
from models.segmentation.scans import DataError, Image, Scan

logger = logging.getLogger(__name__)

MAX_BYTES = 4 * 2**30
_ENDINGS = (".nii.gz", ".nii")


def read_cases(folder: Path, config: KaggleConfig) -> tuple[list[Scan], int]:
    """The chosen slices of all cases of a task, and how many cases had to be skipped.

    Raises:
        DataError: no such task, no case that can be used, or nibabel isn't installed.
    """
    task = folder / config.task
    archive, truths = task / "CT.zip", sorted((task / "GroundTruth").glob("*.pkl"))
    if not archive.is_file() or not truths:
        raise DataError(f"{task}: expected CT.zip and GroundTruth/*.pkl; correct data.folder or data.kaggle.task.")
    scans: list[Scan] = []
    skipped = 0
    try:
        with zipfile.ZipFile(archive) as volumes:
            members = {_case(name): name for name in volumes.namelist() if name.endswith(_ENDINGS)}
            for truth in truths:
                try:
                    scans += _slices(volumes, members, truth, config)
                except DataError as error:
                    skipped += 1
                    logger.warning(json.dumps({"event": "case skipped", "path": str(truth), "reason": str(error)}))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: can't be read as a zip archive ({error}).") from None
    if not scans:
        raise DataError(f"{task}: no case can be used ({skipped} skipped).")
    return scans, skipped


def _slices(volumes: zipfile.ZipFile, members: dict[str, str], truth: Path, config: KaggleConfig) -> list[Scan]:
    case = truth.stem
    if case not in members:
        raise DataError(f"CT.zip holds no volume of case {case}")
    labels = load_volume(truth.read_bytes())
    masks = np.isin(labels, config.labels) if config.labels else labels != 0
    volume = _volume(volumes, members[case])
    if volume.shape != masks.shape or masks.ndim != 3:
        raise DataError(f"the volume of case {case} is {volume.shape}, its labels are {masks.shape}")
    low, high = config.window_hu
    return [
        Scan(
            id=f"{config.task}/{case}-{depth:04d}",
            image=_window(volume[:, :, depth], low, high),
            mask=np.ascontiguousarray(masks[:, :, depth].T),
            kind=config.task if masks[:, :, depth].any() else "empty",
            group=case,
        )
        for depth in _chosen(masks, config.slices_per_case)
    ]


def _chosen(masks: NDArray[np.bool_], count: int) -> list[int]:
    """Depths evenly spread over those with foreground, and the first one without."""
    filled = masks.any(axis=(0, 1))
    some, none = np.flatnonzero(filled), np.flatnonzero(~filled)
    places = np.linspace(0, len(some) - 1, min(count, len(some))).round().astype(int)
    return sorted({*some[places].tolist(), *none[:1].tolist()})


def _window(values: NDArray[np.float32], low: float, high: float) -> Image:
    return np.ascontiguousarray(np.clip((values.T - low) / (high - low), 0, 1), np.float32)


def _volume(volumes: zipfile.ZipFile, name: str) -> NDArray[np.float32]:
    """Hounsfield units [X, Y, Z] of a NIfTI file in the archive."""
    try:
        import nibabel
    except ImportError:
        raise DataError("NIfTI volumes need the package nibabel: pip install 'millrace[segmentation]'.") from None
    if volumes.getinfo(name).file_size > MAX_BYTES:
        raise DataError(f"{name} has more than {MAX_BYTES} bytes")
    try:
        data = volumes.read(name)
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MAX_BYTES)
        image: Any = nibabel.Nifti1Image.from_bytes(data)
        if not 3 <= len(image.shape) <= 4 or np.prod(image.shape, dtype=np.float64) > MAX_VOXELS:
            raise DataError(f"{name} is no volume of three dimensions: {image.shape}")
        values = np.asarray(image.dataobj, np.float32)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} can't be read as NIfTI ({type(error).__name__})") from None
    return values[..., 0] if values.ndim == 4 else values


def _case(name: str) -> str:
    base = PurePosixPath(name).name
    return next(base.removesuffix(ending) for ending in _ENDINGS if base.endswith(ending))
