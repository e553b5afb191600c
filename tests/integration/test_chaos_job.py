"""The chaos command as it is typed: a sliced training whose checkpoints lie elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_fault_costs_less_than_an_interval_and_nothing_stays_behind(home: Path, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    settings = [
        "train.steps=60",
        "train.validate_every=60",
        "train.parallelism=tensor",
        f"train.storage={bucket.as_uri()}",
    ]
    command = [sys.executable, "ray_jobs/chaos.py", "--fault", "exception"]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"RAY_AUTH_TOKEN": ""}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (cost,) = result["faults"]
    assert (cost["fault"], cost["step"], cost["lost_steps"], cost["same_bits"]) == ("exception", 30, 10, True)
    assert json.loads((Path(result["report"]) / "chaos.json").read_text())["faults"] == [cost]
    assert "| exception | 30 |" in (Path(result["report"]) / "chaos.md").read_text()
    assert not list(bucket.iterdir())


def test_a_process_may_have_one_ray_of_its_own_after_the_other(home: Path) -> None:
    script = """
import ray
from ops.jobs import ray_session
for number in range(2):
    with ray_session():
        assert ray.get(ray.put(number)) == number
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
