"""The command that compares configurations, as a user types it, killed in the middle and typed again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
SEEDS = 2
SPACE = "samples: 2\nspace:\n  train.learning_rate: {loguniform: [0.001, 0.1]}\n"


@pytest.mark.parametrize("searched", [0, 2])
def test_a_comparison_that_was_killed_trains_only_what_is_missing(
    searched: int, tmp_path: Path, mlflow_uri: str
) -> None:
    report, comparison_name = tmp_path / "report", f"searched-{searched}"
    one_at_a_time = ["--set", "train.workers=1", "--set", "train.cpus_per_worker=3"]
    command = [sys.executable, "ray_jobs/run_experiments.py", "configs/probe/tiny.yaml", *one_at_a_time]
    command += ["--seeds", str(SEEDS), "--set", "train.steps=100", "--report", str(report), "--name", comparison_name]
    if searched:
        (tmp_path / "space.yaml").write_text(SPACE)
        command += ["--search", str(tmp_path / "space.yaml")]
    environ = os.environ | {
        "MILLRACE_HOME": str(tmp_path / "home"),
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "RAY_AUTH_TOKEN": "",
    }
    killed = subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (finished := list(report.glob("finished/*.json"))):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    first = json.loads(finished[0].read_text())["outcome"]

    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    comparison = json.loads((report / "comparison.json").read_text())
    trainings = comparison["trainings"]
    assert [one["seed"] for one in trainings] == list(range(SEEDS))
    client = MlflowClient(mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {run.info.run_id: run.info.run_name for run in client.search_runs(experiments)}
    own = {run_id: name for run_id, name in runs.items() if name.startswith(f"{comparison_name}-")}
    assert len(own) == SEEDS + searched, f"{own}: the killed one goes on in its run, a point that was tried is known"
    assert first["result"]["run_id"] in own
    if not searched:
        assert trainings[0] == first
    else:
        (rate,) = [one for one in comparison["experiments"][0]["overrides"] if one.startswith("train.learning_rate=")]
        assert 0.001 <= float(rate.partition("=")[2]) <= 0.1
    best = client.get_model_version_by_alias("probe-experiments", "champion")
    assert result["best"] == f"probe-experiments version {best.version}"
    assert best.tags["champion.reason"].startswith(f"tiny is the best of {comparison_name}: ")
    assert [model.name for model in client.search_registered_models()] == ["probe-experiments"]
    assert not (report / "finished").exists()
