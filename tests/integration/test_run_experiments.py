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
SEEDS = 2


def test_a_comparison_that_was_killed_trains_only_what_is_missing(tmp_path: Path, mlflow_uri: str) -> None:
    report = tmp_path / "report"
    one_at_a_time = ["--set", "train.workers=1", "--set", "train.cpus_per_worker=3"]
    command = [sys.executable, "ray_jobs/run_experiments.py", "configs/probe/tiny.yaml", *one_at_a_time]
    command += ["--seeds", str(SEEDS), "--set", "train.steps=100", "--report", str(report)]
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
    trainings = json.loads((report / "comparison.json").read_text())["trainings"]
    assert [one["seed"] for one in trainings] == list(range(SEEDS))
    assert trainings[0] == first
    experiments = [experiment.experiment_id for experiment in MlflowClient(mlflow_uri).search_experiments()]
    assert len(MlflowClient(mlflow_uri).search_runs(experiments)) == SEEDS, "the killed training goes on in its run"
    assert not (report / "finished").exists()
