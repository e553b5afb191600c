"""Train with a fault on purpose and report what it cost: `chaos.py --config FILE --fault sigkill --fault node`."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import torch

from models import tasks, trainer
from models.training.faults import MARK, Fault, FaultyTask
from models.training.task import Task
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import RAY_SETTINGS, JobError, parser, ray_session, run

CONFIG_HASH = "chaos"
WATCH_S = 0.05
NODE_CPUS = 2


@dataclass(frozen=True)
class Cost:
    """What one fault cost; seconds count from the fault, steps are those that were done again."""

    fault: Fault
    step: int
    detection_s: float
    restart_s: float
    lost_steps: int
    checkpoint_every: int
    workers_after: int
    restarts: int
    same_bits: bool
    largest_difference: float


def main() -> dict[str, object]:
    """Train once undisturbed and once for each fault, all with the same configuration, and compare."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    kind = tasks.named(arguments.config.absolute().parent.name)
    config: Any = load(kind.config, arguments.config, arguments.overrides)
    step = arguments.at_step or config.train.steps // 2 + config.train.checkpoint_every // 2
    if not config.train.checkpoint_every < step < config.train.steps:
        raise JobError(f"The fault at step {step} must come after the first checkpoint and before the last step.")
    task = kind.task(config, kind.data(config, environment.data, environment.home))
    faults: list[Fault] = arguments.fault or [fault for fault in get_args(Fault) if fault != "node"]
    found: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        here: list[Fault] = [fault for fault in faults if fault != "node"]
        if here:
            with ray_session():
                found += costs(task, config.train, here, step, Path(folder))
        if "node" in faults:
            shutil.rmtree(Path(folder) / "calm", ignore_errors=True)
            with _two_nodes() as lose_node:
                elastic = config.train.model_copy(update={"workers": (1, 2), "cpus_per_worker": NODE_CPUS})
                found += costs(task, elastic, ["node"], step, Path(folder), lose_node)
    report = arguments.report or environment.home / "reports" / "chaos"
    report.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {"config": str(arguments.config), "faults": [asdict(cost) for cost in found]}
    (report / "chaos.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (report / "chaos.md").write_text(table(found), encoding="utf-8")
    return result | {"report": str(report)}


def table(costs: list[Cost]) -> str:
    """The costs as Markdown."""
    lines = [
        "| fault | at step | noticed after s | back after s | steps done again | checkpoint every | final weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        weights = "same bits" if cost.same_bits else f"within {cost.largest_difference:.1g}"
        weights += "" if cost.workers_after == 2 else f", on {cost.workers_after} worker"
        lines.append(
            f"| {cost.fault} | {cost.step} | {cost.detection_s:.1f} | {cost.restart_s:.1f} | {cost.lost_steps} "
            f"| {cost.checkpoint_every} | {weights} |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> Any:
    arguments = parser(__doc__ or "", config="configs/probe/tiny.yaml")
    arguments.add_argument(
        "--fault", action="append", choices=get_args(Fault), help="may be repeated (default: all but node)"
    )
    arguments.add_argument("--at-step", type=int, help="when (default: half-way, between two checkpoints)")
    arguments.add_argument("--report", type=Path, help="where to write (default HOME/reports/chaos)")
    return arguments.parse_args()


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
    fitted = trainer.fit(faulty, config, folder=folder, config_hash=CONFIG_HASH)
    fault_s = float((folder / MARK).read_text())
    noticed, after = _lines(folder / trainer.FAILURES)[0], _lines(folder / trainer.ATTEMPTS)[1]
    left, right = (torch.load(path, weights_only=True)["network"] for path in (calm, fitted.final))
    difference = max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
    return Cost(
        fault=fault,
        step=step,
        detection_s=round(noticed["time_s"] - fault_s, 2),
        restart_s=round(after["time_s"] - fault_s, 2),
        lost_steps=step - after["step"],
        checkpoint_every=config.checkpoint_every,
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


@contextmanager
def _two_nodes() -> Iterator[Callable[[], None]]:
    """A Ray of two nodes, each with room for one worker; what it gives ends the second one without a warning."""
    import os
    import secrets

    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **RAY_SETTINGS}.items():
        os.environ.setdefault(name, value)

    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": NODE_CPUS, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=NODE_CPUS)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address)
        yield lambda: cluster.remove_node(second, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    run(main)
