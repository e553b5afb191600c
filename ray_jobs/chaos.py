"""Train with a fault on purpose and report what it cost: `chaos.py --config FILE --fault sigkill --fault node`."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from pyarrow.fs import FileSystem, FileType

from models import tasks
from models.training.chaos import Cost, costs, table
from models.training.config import TrainConfig
from models.training.faults import Fault
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import JobError, own_ray, parser, ray_session, run

NODE_CPUS = 2


def main() -> dict[str, object]:
    """Train once undisturbed and once for each fault, all with the same configuration, and compare."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    kind = tasks.named(arguments.config.absolute().parent.name)
    config: Any = load(kind.config, arguments.config, arguments.overrides)
    every = config.train.checkpoint_every
    step = arguments.at_step or config.train.steps // (2 * every) * every + every // 2
    if not every < step < config.train.steps:
        raise JobError(f"The fault at step {step} must come after the first checkpoint and before the last step.")
    task = kind.task(config, kind.data(config, environment.data, environment.home))
    faults: list[Fault] = arguments.fault or [fault for fault in get_args(Fault) if fault != "node"]
    found: list[Cost] = []
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        _stored_apart(config.train, Path(folder).name) as train,
    ):
        here: list[Fault] = [fault for fault in faults if fault != "node"]
        if here:
            with ray_session():
                found += costs(task, train, here, step, Path(folder))
        if "node" in faults:
            with _two_nodes() as lose_node:
                apart = None if train.storage is None else f"{train.storage}/nodes"
                elastic = train.model_copy(update={"workers": (1, 2), "cpus_per_worker": NODE_CPUS, "storage": apart})
                found += costs(task, elastic, ["node"], step, Path(folder) / "nodes", lose_node)
    report = arguments.report or environment.home / "reports" / "chaos"
    report.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {"config": str(arguments.config), "faults": [asdict(cost) for cost in found]}
    (report / "chaos.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (report / "chaos.md").write_text(table(found), encoding="utf-8")
    return result | {"report": str(report)}


def _arguments() -> Any:
    arguments = parser(__doc__ or "", config="configs/probe/tiny.yaml")
    arguments.add_argument(
        "--fault", action="append", choices=get_args(Fault), help="may be repeated (default: all but node)"
    )
    arguments.add_argument("--at-step", type=int, help="when (default: half-way, between two checkpoints)")
    arguments.add_argument("--report", type=Path, help="where to write (default HOME/reports/chaos)")
    return arguments.parse_args()


@contextmanager
def _stored_apart(config: TrainConfig, name: str) -> Iterator[TrainConfig]:
    """The configuration with a folder of its own in its storage, if it has one; it is removed in the end."""
    if config.storage is None:
        yield config
        return
    place = f"{config.storage.rstrip('/')}/{name}"
    try:
        yield config.model_copy(update={"storage": place})
    finally:
        filesystem, folder = FileSystem.from_uri(place)
        if filesystem.get_file_info(folder).type != FileType.NotFound:
            filesystem.delete_dir(folder)


@contextmanager
def _two_nodes() -> Iterator[Callable[[], None]]:
    """A Ray of two nodes, each with room for one worker; what it gives ends the second one without a warning."""
    own_ray()

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
