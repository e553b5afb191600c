"""The tasks by name: how a configuration file becomes data, something to train, or a whole training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from models.training.task import Task

NAMES = ("probe", "whisper")


class UnknownTask(ValueError):
    """A task that is not there, in one sentence."""


@dataclass(frozen=True)
class Kind:
    """What can be done with the configurations of one task."""

    config: type[BaseModel]
    """What a file is read into; it has a section `train`, a `models.training.config.TrainConfig`."""
    data: Callable[[Any, Path | None], Any]
    """The splits, from a configuration and the folder of data sets."""
    task: Callable[[Any, Any], Task]
    """What is trained, from a configuration and the splits."""
    train: Callable[..., Mapping[str, object]]
    """Train, evaluate and register: (configuration, splits, *, home, tracking_uri) -> the result of the job."""


def named(name: str) -> Kind:
    """A task by the name of its folder in configs/ and models/.

    Raises:
        UnknownTask: there is none of this name.
    """
    match name:
        case "probe":
            from models.probe.config import ProbeConfig
            from models.probe.train import task, train

            return Kind(ProbeConfig, lambda config, folder: None, task, train)
        case "whisper":
            from models.whisper.config import WhisperConfig
            from models.whisper.data import splits
            from models.whisper.train import WhisperTask
            from models.whisper.train import train as train_whisper

            return Kind(
                WhisperConfig,
                lambda config, folder: splits(config.data, folder),
                lambda config, found: WhisperTask(config, found.train, found.validation),
                train_whisper,
            )
    raise UnknownTask(
        f"There is no task {name}; a configuration lies in configs/TASK/ with TASK one of: {', '.join(NAMES)}."[:300]
    )
