"""The command that compares configurations, as a user types it, killed in the middle and typed again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
POINTS = 2
SPACE = f"samples: {POINTS}\nspace:\n  train.learning_rate: {{loguniform: [0.001, 0.1]}}\n"


def test_a_search_that_was_killed_trains_only_what_is_missing(tmp_path: Path, mlflow_uri: str) -> None:
    report = tmp_path / "report"
    (tmp_path / "space.yaml").write_text(SPACE)
    command = [sys.executable, "ray_jobs/run_experiments.py", "configs/probe/tiny.yaml", "--report", str(report)]
    command += ["--seeds", "1", "--search", str(tmp_path / "space.yaml"), "--set", "train.steps=100"]
    command += ["--set", "train.workers=1", "--set", "train.cpus_per_worker=3"]  # so there is room for one at a time
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
    client = MlflowClient(mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {run.info.run_id: run.info.run_name for run in client.search_runs(experiments)}
    assert len(runs) == POINTS + 1, f"{runs}: the killed one goes on in its run, a point that was tried is known"
    assert first["result"]["run_id"] in runs
    (rate,) = [one for one in comparison["experiments"][0]["overrides"] if one.startswith("train.learning_rate=")]
    assert 0.001 <= float(rate.partition("=")[2]) <= 0.1
    (training,) = comparison["trainings"]
    best = client.get_model_version_by_alias("probe-experiments", "champion")
    assert (int(best.version), result["best"]) == (
        training["result"]["version"],
        f"probe-experiments version {best.version}",
    )
    assert best.tags["champion.reason"].startswith("tiny is the best of comparison: ")
    assert [model.name for model in client.search_registered_models()] == ["probe-experiments"]
    assert not (report / "finished").exists()
