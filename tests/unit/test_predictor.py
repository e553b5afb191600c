"""A folder is loaded by the task that it names."""

from pathlib import Path

import pytest

from models import predictor
from models.predictor import PredictorError


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="model.json: can't be read"):
        predictor.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "names no task"), ("{}", "names no task"), ("{", "can't be read")]
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(PredictorError, match=message):
        predictor.load(tmp_path)


def test_an_unknown_task_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"task": "cooking"}')
    with pytest.raises(PredictorError, match="task 'cooking' is unknown; known are whisper, tabular"):
        predictor.load(tmp_path)
