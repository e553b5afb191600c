"""The models that Millrace knows: what each serves, and how it comes into the registry."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from serving.errors import ServingError


@dataclass(frozen=True)
class Entry:
    """A known model.

    Attributes:
        decision: name of a tabular model's yes-or-no output.
        endpoint: where it is asked.
        job: the script that trains and registers it.
    """

    endpoint: str
    job: str
    decision: str = "decision"


MODELS = {
    "whisper": Entry("/v1/audio/transcriptions", "ray_jobs/train_whisper.py"),
    "edits": Entry("/v2/models/edits/infer", "ray_jobs/train_edits.py", decision="isRobot"),
}


def model_id(name: str, alias: str, default_alias: str) -> str:
    """What a request calls a model: its name, and `name@alias` for another than the default alias."""
    return name if alias == default_alias else f"{name}@{alias}"


def decision(name: str) -> str:
    """Name of the yes-or-no output of a tabular model; `decision` where the catalog does not know better."""
    return MODELS[name].decision if name in MODELS else Entry.decision


def unknown(model: str, served: Iterable[str]) -> ServingError:
    """The 404 for a model that is not served, naming what is near or how to get it."""
    served = sorted(served)
    if model in MODELS:
        hint = f"it is not registered yet: run {MODELS[model].job}"
    elif near := difflib.get_close_matches(model, served, 1):
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"served are: {', '.join(served)}" if served else "no model is registered yet"
    return ServingError(404, f"the model {model!r} is not served; {hint}", "model_not_found", "model")
