from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from models.runs import flatten
from ops.configuration import ConfigurationError, load


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = 1
    rate: float = 0.1


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    train: Section = Section()
    name: str = "digits"
    optional: Section | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


def test_file_then_overrides_in_their_order(tmp_path):
    path = write(tmp_path, "train: {epochs: 2}\n")
    whole = load(Whole, path, ["train.rate=0.5", "train.epochs=3", "train.epochs=4"])
    assert whole == Whole(train=Section(epochs=4, rate=0.5))


def test_override_may_open_a_section_that_the_file_lacks(tmp_path):
    assert load(Whole, write(tmp_path, ""), ["optional.epochs=7"]).optional == Section(epochs=7)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("train: {epoch: 2}", [], "unknown key train.epoch (did you mean epochs?)"),
        ("nome: x", [], "unknown key nome (did you mean name?)"),
        ("train: {qqqqqq: 2}", [], "known here: epochs, rate"),
        ("optional: {epoch: 2}", [], "did you mean epochs?"),
        ("train: {epochs: many}", [], "train.epochs is 'many'"),
        ("- 1", [], "a mapping of sections is expected"),
        ("a: [", [], "is not YAML"),
        ("", ["train"], "section.key=value"),
        ("", ["name.x=1", "name.x.y=2"], "x is a value, not a section"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path, text, overrides, said):
    with pytest.raises(ConfigurationError) as caught:
        load(Whole, write(tmp_path, text), overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: can't be read"):
        load(Whole, tmp_path / "nowhere.yaml")


def test_flatten_names_keys_as_set_does():
    assert flatten({"train": {"epochs": 1, "a": {"b": 2}}, "name": "x"}) == {
        "train.epochs": 1,
        "train.a.b": 2,
        "name": "x",
    }
