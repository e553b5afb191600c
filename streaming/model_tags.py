"""The tags `millrace.model.<column>: half_space_trees(added, deleted, height=6) every 20`, read and checked."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from streaming.plan import Model, PlanError

PREFIX = "model."

_TEXT = re.compile(r"(\w+)\((.*)\)(?:\s+every\s+(\d+))?", re.DOTALL)
_EXAMPLES = "'half_space_trees(a, b) every 20' or 'adwin(a)'"
_MAX_EVERY = 1_000_000_000


class _Parameter(NamedTuple):
    """Its default, and between which numbers it must be, both included."""

    default: float
    lowest: float
    highest: float


_PARAMETERS: dict[str, dict[str, _Parameter]] = {
    "half_space_trees": {
        "n_trees": _Parameter(10, 1, 100),
        "height": _Parameter(8, 1, 10),
        "window_size": _Parameter(250, 1, 1_000_000),
        "seed": _Parameter(1, 0, 2**31 - 1),
    },
    "adwin": {
        "delta": _Parameter(0.002, 1e-300, 0.999),
        "clock": _Parameter(32, 1, 1_000_000),
        "max_buckets": _Parameter(5, 2, 1_000),
        "min_window_length": _Parameter(5, 1, 1_000_000),
        "grace_period": _Parameter(10, 1, 1_000_000),
    },
}


def models(where: str, tags: Mapping[str, str]) -> tuple[Model, ...]:
    """The models that tags (without `millrace.`) declare, by the name of their column.

    Raises:
        PlanError: Says what cannot be read, and the nearest right thing.
    """
    columns = sorted(name.removeprefix(PREFIX) for name in tags if name.startswith(PREFIX))
    return tuple(_model(where, column, tags[PREFIX + column]) for column in columns)


def _model(where: str, column: str, text: str) -> Model:
    what = f"{where}: the tag 'millrace.{PREFIX}{column}' is '{text}'"
    match = _TEXT.fullmatch(text.strip())
    if not match or not column:
        raise PlanError(f"{what}: write {_EXAMPLES}, and after '{PREFIX}' the name of the column that it adds.")
    function: Any = match[1]
    if function not in _PARAMETERS:
        near = difflib.get_close_matches(function, _PARAMETERS, n=1, cutoff=0.0)[0]
        raise PlanError(f"{what}: there is no model '{function}'; did you mean '{near}'?")
    every = int(match[3] or 1)
    if not 1 <= every <= _MAX_EVERY:
        raise PlanError(f"{what}: after 'every' write a number from 1 to {_MAX_EVERY}.")
    words = [word.strip() for word in match[2].split(",")]
    inputs = tuple(word for word in words if "=" not in word)
    if not all(inputs) or len(set(inputs)) < len(inputs):
        raise PlanError(f"{what}: name the fields that it learns from, each once, as in {_EXAMPLES}.")
    if not inputs or (function == "adwin" and len(inputs) != 1):
        wanted = "exactly one field" if function == "adwin" else "at least one field"
        raise PlanError(f"{what}: {function} needs {wanted} to learn from, and has {len(inputs)}.")
    given = [tuple(part.strip() for part in word.split("=", 1)) for word in words if "=" in word]
    values = {name: parameter.default for name, parameter in _PARAMETERS[function].items()}
    for name, value in given:
        values[name] = _value(what, function, name, value)
    return Model(column, function, inputs, every, tuple(values.items()))


def _value(what: str, function: str, name: str, text: str) -> float:
    known = _PARAMETERS[function]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise PlanError(f"{what}: {function} has no parameter '{name}'; did you mean '{near}'?")
    parameter = known[name]
    try:
        value = float(text) if isinstance(parameter.default, float) else int(text)
    except ValueError:
        value = parameter.lowest - 1
    if not parameter.lowest <= value <= parameter.highest:
        kind = "a number" if isinstance(parameter.default, float) else "a whole number"
        raise PlanError(f"{what}: {name} must be {kind} from {parameter.lowest} to {parameter.highest}.")
    return value
