"""The tasks by name: how a configuration file becomes data, something to train, or a whole training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from models.training.task import Task

NAMES = ("probe", "segmentation", "whisper")


class UnknownTask(ValueError):
    """A task that is not there, in one sentence."""


@dataclass(frozen=True)
class Kind:
    """What can be done with the configurations of one task."""

    config: type[BaseModel]
    """What a file is read into; it has a section `train`, a `models.training.config.TrainConfig`."""
    data: Callable[[Any, Path | None, Path], Any]
    """The splits, from a configuration, the folder of data sets and the home, where what is synthesised is kept."""
    task: Callable[[Any, Any], Task]
    """What is trained, from a configuration and the splits."""
    train: Callable[..., Mapping[str, object]]
    """Train, evaluate and register: (configuration, splits, *, home, tracking_uri) -> the result of the job."""
    metrics: Mapping[str, bool]
    """The metrics of the test split, the primary one first, and whether higher is better."""
    scores: Callable[[Any, Path], Mapping[str, Sequence[tuple[float, float]]]]
    """Each metric's (sum, count) of every sample of the test split, by the model in a folder.

    `METRIC/PART` is a metric on a part of the split: samples of other parts have (0, 0).
    """
    units: Callable[[Any], Sequence[str]]
    """What each sample of the test split belongs to; samples of one unit are no independent evidence."""
    split_hash: Callable[[Any], str]
    """What identifies the test split."""


def named(name: str) -> Kind:
    """A task by the name of its folder in configs/ and models/.

    Raises:
        UnknownTask: there is none of this name.
    """
    match name:
        case "probe":
            from models.probe.config import ProbeConfig
            from models.probe.task import VALIDATION
            from models.probe.train import scores, task, train

            return Kind(
                config=ProbeConfig,
                data=lambda config, folder, home: config,
                task=task,
                train=train,
                metrics={"accuracy": True},
                scores=scores,
                units=lambda config: [str(number) for number in VALIDATION],
                split_hash=lambda config: "probe",
            )
        case "segmentation":
            from models.segmentation.config import SegmentationConfig
            from models.segmentation.data import splits as scans
            from models.segmentation.train import SegmentationTask, sample_scores
            from models.segmentation.train import train as train_segmentation

            return Kind(
                config=SegmentationConfig,
                data=lambda config, folder, home: scans(config.data, folder),
                task=lambda config, found: SegmentationTask(config, found.train, found.validation),
                train=lambda *found, **where: train_segmentation(*found, **where).result,
                metrics={"dice": True, "iou": True},
                scores=sample_scores,
                units=lambda found: [scan.group for scan in found.test],
                split_hash=lambda found: str(found.hash),
            )
        case "whisper":
            from models.whisper.config import WhisperConfig
            from models.whisper.data import splits
            from models.whisper.train import WhisperTask, sample_errors
            from models.whisper.train import train as train_whisper

            return Kind(
                config=WhisperConfig,
                data=lambda config, folder, home: splits(config.data, folder, home),
                task=lambda config, found: WhisperTask(config, found.train, found.validation),
                train=train_whisper,
                metrics={"wer": False, "cer": False},
                scores=sample_errors,
                units=lambda found: [one.unit for one in found.test],
                split_hash=lambda found: str(found.hash),
            )
    raise UnknownTask(f"There is no task {name}; a configuration lies in a folder named {', '.join(NAMES)}.")
