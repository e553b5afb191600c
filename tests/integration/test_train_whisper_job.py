"""The command itself, as a user types it without a cluster: one JSON line, or one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "ray_jobs" / "train_whisper.py"


def job(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=home.parent,
        env=os.environ | {"MILLRACE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_trains_on_a_ray_of_its_own(home: Path) -> None:
    tiny = str(ROOT / "configs" / "whisper" / "tiny.yaml")
    done = job(home, "--config", tiny, "--set", "train.steps=4", "--set", "train.log_every=2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 4
    assert result["source"] == "synthetic"
    assert '"event": "progress"' in done.stderr + done.stdout
    (features,) = (home / "features" / "offline" / "utterance_audio").glob("*.parquet")
    assert pq.read_table(features).num_rows == 4


def test_a_bad_configuration_is_one_line(home: Path) -> None:
    digits = str(ROOT / "configs" / "whisper" / "digits.yaml")
    wrong = job(home, "--config", digits, "--set", "train.step=4")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    last = wrong.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "train.step " in last
    assert "did you mean steps?" in last
