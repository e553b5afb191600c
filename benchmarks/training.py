"""Training: the harness's throughput beside plain DDP under torchrun, a parameter server's, and what faults cost."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from benchmarks.record import Figure, machine, write
from models.probe.task import ProbeTask
from models.trainer import Sample, TrainConfig, fit
from models.training import parameter_server
from ops.jobs import ray_session
from ops.layout import REPOSITORY

TASK = ProbeTask(size=4096, width=512, layers=3)
BATCH, STEPS, FIRST = 128, 450, 150
"""Steps of each training, and how many are not counted: Ray Train's own actors start beside the first hundred."""
LEARNING_RATE = 1e-3
ROUNDS = 3
SERVED_STEPS = 40
FAULTS = ("sigkill", "sigstop", "exception", "corrupt")
BACK_S = {"sigkill": 15.0, "sigstop": 30.0}


def main() -> None:
    """Measure in turns, so that a busy machine is busy for all, and write the medians."""
    conditions = (
        f"{TASK}, batch {BATCH}, ours on Ray Train, gloo, the cores shared out among the workers; "
        f"median of {ROUNDS} in turns; {machine()}"
    )
    plain: dict[int, list[float]] = {1: [], 2: []}
    ours: dict[int, list[float]] = {1: [], 2: []}
    with ray_session():
        for _ in range(ROUNDS):
            for workers in (1, 2):
                plain[workers].append(_torchrun(workers))
                ours[workers].append(_harness(workers))
    figures = [
        Figure(
            f"training: steps a second on {workers} worker{'s' * (workers > 1)}",
            statistics.median(ours[workers]),
            "steps/s",
            "higher",
            conditions,
            target=0.95 * statistics.median(plain[workers]),
            peer="torchrun DDP",
            peer_value=statistics.median(plain[workers]),
        )
        for workers in (1, 2)
    ]
    scaling, peers = (statistics.median(found[2]) / statistics.median(found[1]) for found in (ours, plain))
    figures.append(
        Figure(
            "training: speed-up from 1 to 2 workers",
            scaling,
            "x",
            "higher",
            conditions,
            target=0.95 * peers,
            peer="torchrun DDP",
            peer_value=peers,
        )
    )
    write("training", [*figures, *_servers(statistics.median(ours[2]), conditions), *_faults()])


def _config(workers: int, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        workers=workers,
        checkpoint_every=steps,
        validate_every=steps,
        log_every=FIRST,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _torchrun(workers: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command.append(str(Path(__file__).parent / "peers_scripts" / "torchrun_ddp.py"))
    done = subprocess.run(command, cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


@dataclass(frozen=True)
class TimedTask(ProbeTask):
    """The task, and a file for each worker with the time of every batch."""

    folder: str = ""

    def batch(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """As of the task."""
        with Path(self.folder, str(os.getpid())).open("a", encoding="utf-8") as file:
            file.write(f"{time.monotonic()}\n")
        return super().batch(samples)


def _harness(workers: int) -> float:
    """Steps a second under Ray Train, after the first ones."""
    with TemporaryDirectory() as folder:
        task = TimedTask(**(asdict(TASK) | {"folder": folder}))
        fit(task, _config(workers, STEPS), folder=Path(folder) / "run", config_hash="benchmark")
        (first, *_) = (path for path in Path(folder).iterdir() if path.name.isdecimal())
        times_s = [float(line) for line in first.read_text(encoding="utf-8").splitlines()]
    return (STEPS - 1 - FIRST) / (times_s[STEPS - 1] - times_s[FIRST])


def _servers(reduced: float, conditions: str) -> list[Figure]:
    with ray_session():
        served = {
            name: parameter_server.train(TASK, _config(2, SERVED_STEPS), staleness).steps_per_s
            for name, staleness in (("in step", None), ("at most 3 steps apart", 3))
        }
    return [
        Figure(
            f"training: parameter server, 2 workers {name}",
            speed,
            "steps/s",
            "higher",
            conditions,
            peer="all-reduce",
            peer_value=reduced,
        )
        for name, speed in served.items()
    ]


def _faults() -> list[Figure]:
    """What ray_jobs/chaos.py says."""
    command = [sys.executable, "ray_jobs/chaos.py", "--config", "configs/probe/tiny.yaml"]
    conditions = f"configs/probe/tiny.yaml, two workers; {machine()}"
    with TemporaryDirectory(prefix="bench-") as folder:
        command += ["--report", folder, *(word for fault in FAULTS for word in ("--fault", fault))]
        environment = {**_environment(), "MILLRACE_HOME": folder}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = []
    for cost in json.loads(done.stdout.splitlines()[-1])["faults"]:
        weights = "the same bits" if cost["same_bits"] else f"within {cost['largest_difference']:.1g}"
        there = f"{conditions}; noticed after {cost['detection_s']} s, final weights {weights}"
        every, fault = cost["checkpoint_every"], cost["fault"]
        back = Figure(f"training: back after {fault}", cost["restart_s"], "s", "lower", there, BACK_S.get(fault))
        allowed = 2 * every if fault == "corrupt" else every
        lost = Figure(
            f"training: steps done again after {fault}", cost["lost_steps"], "steps", "lower", there, target=allowed
        )
        figures += [back, lost]
    return figures


if __name__ == "__main__":
    main()
