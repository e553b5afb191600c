"""The registry over MLflow's own sqlite store, which needs no network."""

import json
from pathlib import Path

import pytest

from models.registry import Registry, RegistryError
from models.runs import opened


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def registry(uri: str) -> Registry:
    return Registry(uri)


def model(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"task": text}))
    return folder


def test_a_version_comes_back_as_it_was_registered(registry: Registry, uri: str, tmp_path: Path) -> None:
    with opened(uri, "test", "run") as run:
        first = registry.register("round", model(tmp_path / "a" / "model", "one"), run_id=run.id, tags={"wer": "0.5"})
    with opened(uri, "test", "run") as run:
        second = registry.register("round", model(tmp_path / "b" / "model", "two"), run_id=run.id, tags={})
    assert (first.version, second.version) == (1, 2)
    registry.set_alias("round", "champion", 1, "the first")
    found = registry.resolve("round", "champion")
    assert found.version == 1
    assert found.run_id == first.run_id
    assert found.tags == {"wer": "0.5", "champion.reason": "the first"}
    folder = registry.download(found, tmp_path / "cache")
    assert json.loads((folder / "model.json").read_text()) == {"task": "one"}
    assert registry.download(found, tmp_path / "cache") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["1"], "no partial download stays"


def test_an_alias_moves_and_versions_are_integers(registry: Registry, uri: str, tmp_path: Path) -> None:
    with opened(uri, "test", "run") as run:
        for part in ("first", "second"):
            registry.register("moving", model(tmp_path / part, "t"), run_id=run.id, tags={})
    registry.set_alias("moving", "champion", 1, "")
    registry.set_alias("moving", "champion", 2, "better")
    assert registry.aliases()["moving", "champion"] == 2
    assert isinstance(registry.aliases()["moving", "champion"], int)


@pytest.mark.parametrize(("name", "alias"), [("unknown", "champion"), ("moving", "unknown")])
def test_what_is_not_registered_is_named_with_what_is(registry: Registry, name: str, alias: str) -> None:
    with pytest.raises(RegistryError, match=f"{name}@{alias} is not registered; registered: .*moving@champion"):
        registry.resolve(name, alias)
