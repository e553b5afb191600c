"""The registry and the runs over MLflow on sqlite: versions, aliases, restarts."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from models.registry import Registry, RegistryError
from models.runs import opened


@pytest.fixture(scope="module")
def registry(mlflow_uri: str) -> Registry:
    return Registry(mlflow_uri)


def model(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"task": text}))
    return folder


def test_a_version_comes_back_as_it_was_registered(registry: Registry, mlflow_uri: str, tmp_path: Path) -> None:
    with opened(mlflow_uri, "test", "run") as run:
        first = registry.register("round", model(tmp_path / "a" / "model", "one"), run_id=run.id, tags={"wer": "0.5"})
    with opened(mlflow_uri, "test", "run") as run:
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


def test_an_alias_moves_and_versions_are_integers(registry: Registry, mlflow_uri: str, tmp_path: Path) -> None:
    with opened(mlflow_uri, "test", "run") as run:
        for part in ("first", "second"):
            registry.register("moving", model(tmp_path / part, "t"), run_id=run.id, tags={})
    registry.set_alias("moving", "champion", 1, "")
    registry.set_alias("moving", "champion", 2, "better")
    assert registry.aliases()["moving", "champion"] == 2
    assert isinstance(registry.aliases()["moving", "champion"], int)


def test_training_makes_challengers_and_a_promotion_can_be_rolled_back(
    registry: Registry, mlflow_uri: str, tmp_path: Path
) -> None:
    with opened(mlflow_uri, "test", "run") as run:
        entered = [
            registry.enter(registry.register("crown", model(tmp_path / name, "t"), run_id=run.id, tags={}))
            for name in ("first", "second", "third")
        ]
    assert entered == ["champion", "challenger", "challenger"]
    assert aliases_of(registry, "crown") == {"champion": 1, "challenger": 3}
    with pytest.raises(RegistryError, match="crown@previous is not registered"):
        registry.roll_back("crown", "?")
    registry.promote("crown", registry.resolve("crown", "2").version, "it is better")
    assert aliases_of(registry, "crown") == {"champion": 2, "challenger": 3, "previous": 1}
    assert registry.roll_back("crown", "it is slow") == 1
    assert aliases_of(registry, "crown") == {"champion": 1, "challenger": 3, "previous": 2}
    assert registry.resolve("crown", "champion").tags["champion.reason"] == "it is slow"


def aliases_of(registry: Registry, name: str) -> dict[str, int]:
    return {alias: version for (model, alias), version in registry.aliases().items() if model == name}


@pytest.mark.parametrize(
    ("name", "reference", "said"),
    [
        ("unknown", "champion", "unknown@champion"),
        ("moving", "unknown", "moving@unknown"),
        ("moving", "99", "moving version 99"),
    ],
)
def test_what_is_not_registered_is_named_with_what_is(registry: Registry, name: str, reference: str, said: str) -> None:
    with pytest.raises(RegistryError, match=f"{said} is not registered; registered: .*moving@champion"):
        registry.resolve(name, reference)


def test_a_restart_goes_on_with_the_same_run_and_logs_no_step_twice(mlflow_uri: str) -> None:
    client = MlflowClient(mlflow_uri)
    with pytest.raises(KeyboardInterrupt), opened(mlflow_uri, "speech", "first") as run:
        run.log_params({f"p{number}": number for number in range(150)})
        run.log_metrics({"loss": 3.0}, 10)
        run.log_metrics({"loss": 2.0, "bad": float("nan")}, 20)
        raise KeyboardInterrupt
    assert client.get_run(run.id).info.status == "FAILED"
    with opened(mlflow_uri, "speech", "first", run.id) as again:
        again.log_params({"p1": "changed", "fresh": 1})
        again.log_metrics({"loss": 2.0}, 20)
        again.log_metrics({"loss": 1.0}, 30)
    assert again.id == run.id
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.params["p1"] == "1"
    assert len(found.data.params) == 151
    assert [(one.step, one.value) for one in client.get_metric_history(run.id, "loss")] == [(10, 3), (20, 2), (30, 1)]
    assert "bad" not in found.data.metrics
    assert found.data.tags["git.revision"]
    assert Path(found.info.artifact_uri.removeprefix("file://")).parts[-3] == "artifacts"


def test_an_unknown_run_id_starts_a_new_run(mlflow_uri: str) -> None:
    with opened(mlflow_uri, "speech", "run", "0" * 32) as run:
        assert run.id != "0" * 32
