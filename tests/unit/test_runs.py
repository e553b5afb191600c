"""MLflow runs that go on after a restart, and the folders that training runs hold."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from models.runs import RunError, claimed, opened


def test_a_restart_goes_on_with_the_same_run_and_logs_no_step_twice(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    with pytest.raises(KeyboardInterrupt), opened(uri, "speech", "first") as run:
        run.log_params({f"p{number}": number for number in range(150)})
        run.log_metrics({"loss": 3.0}, 10)
        run.log_metrics({"loss": 2.0, "bad": float("nan")}, 20)
        raise KeyboardInterrupt
    assert client.get_run(run.id).info.status == "FAILED"
    with opened(uri, "speech", "first", run.id) as again:
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
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path / "artifacts")


def test_an_unknown_run_id_starts_a_new_run(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path / 'mlflow.db'}", "speech", "run", "0" * 32) as run:
        assert run.id != "0" * 32


def test_an_unfinished_name_goes_on_and_a_finished_one_starts_afresh(tmp_path: Path) -> None:
    with claimed(tmp_path, "digits", "h") as claim:
        assert claim.run_id is None
        claim.remember("run-1", finished=False)
    with claimed(tmp_path, "digits", "h") as claim:
        assert (claim.name, claim.run_id) == ("digits", "run-1")
        claim.remember("run-1", finished=True)
    with claimed(tmp_path, "digits", "another") as claim:
        assert (claim.name, claim.run_id) == ("digits-2", None)


def test_a_name_that_is_in_use_or_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, "digits", "h") as claim:
        claim.remember("run-1", finished=False)
        with pytest.raises(RunError, match="another process"), claimed(tmp_path, "digits", "h"):
            pass
    with pytest.raises(RunError, match="another configuration"), claimed(tmp_path, "digits", "other"):
        pass
