"""Scans for training, validation and test: real ones split by group, or phantoms split by their number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.segmentation import images, kaggle
from models.segmentation.config import DataConfig
from models.segmentation.phantoms import phantom
from models.segmentation.scans import DataError, Scan, digest, divide

TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True)
class Splits:
    """Real scans for training, to which the task adds phantoms, and whole scans for the other two parts.

    `hash` identifies the test split by what it holds: two results with the same hash can be compared.
    """

    train: tuple[Scan, ...]
    validation: tuple[Scan, ...]
    test: tuple[Scan, ...]
    source: str
    hash: str
    skipped: int


def splits(config: DataConfig, data: Path | None) -> Splits:
    """Load what the configuration names and split it; the same values give the same splits.

    Raises:
        DataError: the data folder or its images are missing, or too few to split.
    """
    if config.source == "phantoms":
        validation = phantoms(config, VALIDATION, range(config.validation_phantoms))
        test = phantoms(config, TEST, range(config.test_phantoms))
        return Splits((), validation, test, config.source, digest(test), 0)
    if data is None or not (data / config.folder).is_dir():
        where = data / config.folder if data else config.folder
        raise DataError(
            f"{where}: no such folder; set MILLRACE_DATA, correct data.folder, or set data.source=phantoms."
        )
    if config.source == "images":
        scans, skipped = images.read_folder(data / config.folder)
    else:
        scans, skipped = kaggle.read_cases(data / config.folder, config.kaggle)
    train, validation, test = divide(scans, (config.validation_share, config.test_share), config.seed)
    return Splits(train, validation, test, config.source, digest(test), skipped)


def phantoms(config: DataConfig, part: int, numbers: Sequence[int]) -> tuple[Scan, ...]:
    """Phantoms of one part by their numbers; each is a group of its own."""
    return tuple(_phantom(config, part, number) for number in numbers)


def training_number(config: DataConfig, real: int, epoch: int, index: int) -> int | None:
    """The number of the phantom that is sample `index` of an epoch, or None where it is the real scan `index`."""
    if index < real and epoch >= config.phantom_epochs:
        return None
    return index + (epoch * (real + config.phantoms) if config.fresh_phantoms else 0)


def training_scan(config: DataConfig, real: Sequence[Scan], epoch: int, index: int) -> Scan:
    """Sample `index` of an epoch: the real scans first, then phantoms."""
    number = training_number(config, len(real), epoch, index)
    return real[index] if number is None else _phantom(config, TRAIN, number)


def _phantom(config: DataConfig, part: int, number: int) -> Scan:
    made = phantom(config.seed, part, number, config.phantom_size_px)
    name = f"phantom-{part}-{number:05d}"
    return Scan(name, made.image, made.mask, made.kind, name)
