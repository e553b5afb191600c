"""Files of predictions and references: paired by id, and each thing that can be wrong with them."""

from pathlib import Path

import pytest

from evaluation.answers import AnswersError, read


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_pairs_by_id_in_the_order_of_the_references(tmp_path: Path) -> None:
    predictions = written(tmp_path, "p.jsonl", '{"id": 2, "prediction": "b"}\n\n{"id": "1", "prediction": "a"}\n')
    references = written(
        tmp_path,
        "r.jsonl",
        '\ufeff{"id": "1", "reference": "A", "input": 7}\n{"id": "2", "reference": "B", "input": 8}',
    )
    found = read(predictions, references)
    assert (found.ids, found.predictions, found.references, found.inputs) == (
        ("1", "2"),
        ("a", "b"),
        ("A", "B"),
        (7, 8),
    )


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ("", "has no rows"),
        ('{"id": 1, "prediction": "a"}\nnonsense\n', r"p\.jsonl, line 2: is not JSON"),
        ("[1]\n", "line 1: is JSON, but no object"),
        ('{"prediction": "a"}\n', "line 1: there is no 'id', only prediction"),
        ('{"id": 1, "text": "a"}\n', "line 1: there is no 'prediction', only id, text"),
        ('{"id": 1.5, "prediction": "a"}\n', "line 1: the id is 1.5"),
        ('{"id": 1, "prediction": "a"}\n{"id": "1", "prediction": "b"}\n', "line 2: id '1' was already on line 1"),
        ('{"id": 3, "prediction": "a"}\n', r"p\.jsonl: 1 of 1 ids are missing \(1\)"),
        ('{"id": 1, "prediction": "a"}\n{"id": 3, "prediction": "b"}\n', r"r\.jsonl: 1 of 2 ids are missing \(3\)"),
        ('{"id": 1, "prediction": "\udcff"}\n', "is not UTF-8 at byte 25"),
    ],
)
def test_says_what_is_wrong_and_where(tmp_path: Path, predictions: str, message: str) -> None:
    references = written(tmp_path, "r.jsonl", '{"id": 1, "reference": "A"}\n')
    with pytest.raises(AnswersError, match=message):
        read(written(tmp_path, "p.jsonl", predictions), references)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AnswersError, match=r"gone\.jsonl: can't be read \(No such file"):
        read(tmp_path / "gone.jsonl", tmp_path / "r.jsonl")
