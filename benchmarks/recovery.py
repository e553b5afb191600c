"""Training: how long after SIGKILL of a worker the next step is done, and how many steps are done again.

The job runs in a process of its own on a Ray of its own, with the small configuration on generated speech.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.record import Figure, machine, write
from ops.layout import REPOSITORY

NAME = "recovery"
KILL_AFTER_STEP = 60
CHECKPOINT_EVERY = 20
SETTINGS = {
    "train.name": NAME,
    "train.steps": 400,
    "train.log_every": 1,
    "train.checkpoint_every": CHECKPOINT_EVERY,
    "train.validate_every": 400,
}


def main() -> None:
    """Kill one of two workers once, and read the job's own log."""
    conditions = f"configs/whisper/tiny.yaml, two workers, a checkpoint each {CHECKPOINT_EVERY} steps; {machine()}"
    with TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, "ray_jobs/train_whisper.py", "--config", "configs/whisper/tiny.yaml"]
        command += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        environment = {**os.environ, "MILLRACE_HOME": folder, "MILLRACE_DATA": ""}
        job = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            seconds, repeated = _kill_and_wait(job, Path(folder) / "training" / NAME / "attempts.jsonl")
        finally:
            job.terminate()
            job.wait(60)
    write(
        "recovery",
        [
            Figure("training: SIGKILL of a worker to the next step", seconds, "s", "lower", conditions, target=15),
            Figure("training: steps done again", repeated, "steps", "lower", conditions, target=CHECKPOINT_EVERY),
        ],
    )


def _kill_and_wait(job: "subprocess.Popen[str]", attempts: Path) -> tuple[float, float]:
    """Seconds from the kill to the first step of the second attempt, and how many steps that one repeats."""
    killed_s, last = 0.0, 0
    assert job.stdout is not None
    for line in job.stdout:
        if (brace := line.find('{"event"')) < 0:
            continue
        event = json.loads(line[brace:])
        if event["event"] == "attempt" and killed_s:
            last = max(last, KILL_AFTER_STEP)
        if event["event"] != "progress":
            continue
        step = int(event["step"])
        if killed_s and len(attempts.read_text().splitlines()) > 1:
            return round(time.monotonic() - killed_s, 1), float(last - step + 1)
        last = max(last, step)
        if step >= KILL_AFTER_STEP and not killed_s:
            os.kill(json.loads(attempts.read_text().splitlines()[0])["pids"][1], signal.SIGKILL)
            killed_s = time.monotonic()
    raise RuntimeError(f"the job ended with exit code {job.wait()} before it was killed and had recovered")


if __name__ == "__main__":
    main()
