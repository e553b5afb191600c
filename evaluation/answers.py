"""Reads predictions and references from JSON Lines files, paired by id."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.assessment import Evaluation, assess
from evaluation.batch import Split, System, content_hash
from evaluation.metrics import metric

SHOWN_IDS = 3


class AnswersError(ValueError):
    """Files that can't be evaluated, in one sentence."""


@dataclass(frozen=True)
class Answers:
    """Predictions beside their references, in the order of the references; `inputs` only where every row has one."""

    ids: tuple[str, ...]
    predictions: tuple[Any, ...]
    references: tuple[Any, ...]
    inputs: tuple[Any, ...] | None


def evaluate(predictions: Path, references: Path, metrics: Sequence[str]) -> Evaluation:
    """Score one file of predictions.

    Raises:
        AnswersError: the files do not fit together; see `read`.
        MetricError: an unknown metric, or values that it cannot judge.
    """
    chosen = [metric(name) for name in metrics]
    found = read(predictions, references)
    split = Split(references.name, content_hash(found.ids, found.references), found.ids, found.references)
    return Evaluation(
        "files", assess(split, [System("predictions", predictions.name, found.predictions)], chosen), [], {}
    )


def read(predictions: Path, references: Path) -> Answers:
    """Read rows `{"id", "prediction"}` and `{"id", "reference"}` (and, optionally there, `"input"`).

    Ids are strings or integers. Other fields are ignored, and so are empty lines.

    Raises:
        AnswersError: a missing or empty file, a line that is no JSON object or lacks a field (with its number),
            an id given twice, or ids that are in one file only.
    """
    predicted = {key: row["prediction"] for key, row in _rows(predictions, "prediction").items()}
    rows = _rows(references, "reference")
    for there, here, where in ((rows, predicted, predictions), (predicted, rows, references)):
        missing = [key for key in there if key not in here]
        if missing:
            few = ", ".join(missing[:SHOWN_IDS]) + (", ..." if len(missing) > SHOWN_IDS else "")
            raise AnswersError(f"{where}: {len(missing)} of {len(there)} ids are missing ({few}): give each a line.")
    return Answers(
        ids=tuple(rows),
        predictions=tuple(predicted[key] for key in rows),
        references=tuple(row["reference"] for row in rows.values()),
        inputs=tuple(row["input"] for row in rows.values()) if all("input" in row for row in rows.values()) else None,
    )


def _rows(path: Path, field: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    first_line: dict[str, int] = {}
    for number, row in _objects(path):
        where = f"{path}, line {number}"
        for name in ("id", field):
            if name not in row:
                given = ", ".join(row) or "nothing"
                raise AnswersError(f"{where}: there is no {name!r}, only {given}; each line needs 'id' and {field!r}.")
        if isinstance(row["id"], bool) or not isinstance(row["id"], (str, int)):
            raise AnswersError(f"{where}: the id is {row['id']!r}: give a string or an integer.")
        key = str(row["id"])
        if key in rows:
            raise AnswersError(f"{where}: id {key!r} was already on line {first_line[key]}: keep one of the two.")
        rows[key], first_line[key] = row, number
    if not rows:
        raise AnswersError(f"{path}: the file has no rows: nothing can be evaluated.")
    return rows


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise AnswersError(f"{path}: can't be read ({error.strerror}): give an existing JSON Lines file.") from None
    except UnicodeDecodeError as error:
        raise AnswersError(f"{path}: is not UTF-8 at byte {error.start}: give JSON Lines in UTF-8.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AnswersError(f"{path}, line {number}: is not JSON ({error}): give one object a line.") from None
        if not isinstance(row, dict):
            raise AnswersError(f"{path}, line {number}: is JSON, but no object: give one object a line.")
        yield number, row
