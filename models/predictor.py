"""Loads whatever model a folder holds, by the task that its `model.json` names."""

import importlib
import json
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

DESCRIPTION = "model.json"
LOADERS = {
    "whisper": "models.whisper.predict",
    "tabular": "models.tabular.predict",
    "segmentation": "models.segmentation.predict",
}


class PredictorError(ValueError):
    """A folder that holds no model that can be loaded, in one sentence."""


@runtime_checkable
class Predictor(Protocol):
    """A loaded model; what else it offers depends on its task."""

    task: str


def describe(folder: Path) -> dict[str, object]:
    """The contents of the folder's `model.json`.

    Raises:
        PredictorError: there is none, or it is not a JSON object with a `task`.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PredictorError(f"{path}: can't be read as JSON; a model folder holds a {DESCRIPTION}.") from None
    if not isinstance(description, dict) or "task" not in description:
        raise PredictorError(f"{path}: names no task; it must be an object with a `task`.")
    return description


def load(folder: Path) -> Predictor:
    """Load the model in a folder; the packages of its task are imported only now.

    Raises:
        PredictorError: no model, or a task that this version doesn't know.
    """
    task = describe(folder)["task"]
    if task not in LOADERS:
        raise PredictorError(f"{folder / DESCRIPTION}: task {task!r} is unknown; known are {', '.join(LOADERS)}.")
    return cast(Predictor, importlib.import_module(LOADERS[str(task)]).load(folder))
