"""What a fault costs: a training with the fault beside one without, by `ray_jobs/chaos.py`."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch

from models import trainer
from models.training.faults import MARK, Fault, FaultyTask
from models.training.task import Task

CONFIG_HASH = "chaos"
WATCH_S = 0.05


@dataclass(frozen=True)
class Cost:
    """What one fault cost; seconds count from the fault, steps are those that were done again."""

    fault: Fault
    step: int
    detection_s: float
    restart_s: float
    lost_steps: int
    checkpoint_every: int
    workers: int
    workers_after: int
    restarts: int
    same_bits: bool
    largest_difference: float


def costs(
    task: Task,
    config: trainer.TrainConfig,
    faults: list[Fault],
    step: int,
    folder: Path,
    lose_node: Callable[[], None] | None = None,
) -> list[Cost]:
    """Train once undisturbed, then once with each fault at a step, in folders below one that all nodes share."""
    calm = trainer.fit(task, config, folder=folder / "calm", config_hash=CONFIG_HASH)
    return [_cost(task, config, fault, step, folder / fault, calm.final, lose_node) for fault in faults]


def _cost(
    task: Task,
    config: trainer.TrainConfig,
    fault: Fault,
    step: int,
    folder: Path,
    calm: Path,
    lose_node: Callable[[], None] | None,
) -> Cost:
    folder.mkdir()
    sample = trainer.pick((step + 1) * config.batch_size - 1, 1, task.size, config.seed)[0]
    store = trainer.checkpoints(config, folder, CONFIG_HASH)
    faulty = FaultyTask(task, fault, sample, folder, store)
    if lose_node is not None:
        Thread(target=_when_marked, args=(folder / MARK, lose_node), daemon=True).start()
    fitted = trainer.fit(cast(Task, faulty), config, folder=folder, config_hash=CONFIG_HASH)
    fault_s = float((folder / MARK).read_text())
    noticed, (before, after) = _lines(folder / trainer.FAILURES)[0], _lines(folder / trainer.ATTEMPTS)[:2]
    left, right = (torch.load(path, weights_only=True)["network"] for path in (calm, fitted.final))
    difference = max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
    return Cost(
        fault=fault,
        step=step,
        detection_s=round(noticed["time_s"] - fault_s, 2),
        restart_s=round(after["time_s"] - fault_s, 2),
        lost_steps=step - after["step"],
        checkpoint_every=config.checkpoint_every,
        workers=before["world_size"],
        workers_after=after["world_size"],
        restarts=fitted.restarts,
        same_bits=all(torch.equal(left[name], right[name]) for name in left),
        largest_difference=difference,
    )


def _lines(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _when_marked(mark: Path, action: Callable[[], None]) -> None:
    while not mark.exists():
        time.sleep(WATCH_S)
    action()


def table(costs: list[Cost]) -> str:
    """The costs as Markdown."""
    lines = [
        "| fault | at step | noticed after s | back after s | steps done again | checkpoint every | final weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        weights = "same bits" if cost.same_bits else f"within {cost.largest_difference:.1g}"
        weights += "" if cost.workers_after == cost.workers else f", {cost.workers_after} of {cost.workers} workers"
        lines.append(
            f"| {cost.fault} | {cost.step} | {cost.detection_s:.1f} | {cost.restart_s:.1f} | {cost.lost_steps} "
            f"| {cost.checkpoint_every} | {weights} |"
        )
    return "\n".join(lines) + "\n"
