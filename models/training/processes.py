"""Training in processes of this machine without Ray: to try a task and to test the harness."""

import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from models.checkpoints import CheckpointStore
from models.training.config import TrainConfig
from models.training.parallel import require
from models.training.task import Task
from models.training.worker import Listener, Worker


class ProcessError(RuntimeError):
    """A process of a training that failed, in one sentence."""


@dataclass
class Told:
    """What rank 0 has told: the step from which it went on, and metrics by step."""

    started: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    validations: list[Mapping[str, float]] = field(default_factory=list)


def train(task: Task, config: TrainConfig, store: CheckpointStore) -> Told:
    """Train in `config.fewest_workers` processes on gloo, to the end.

    Raises:
        ProcessError: one of them failed; the others are ended.
    """
    require(task, config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        processes = [
            context.Process(target=_work, args=(rank, meeting, task, config, store, sender), daemon=True)
            for rank in range(config.fewest_workers)
        ]
        for process in processes:
            process.start()
        sender.close()
        try:
            told = receiver.recv()
        except EOFError:
            raise ProcessError("A process of the training was killed.") from None
        finally:
            receiver.close()
            for process in processes:
                process.join(10)
                process.kill()
    if not isinstance(told, Told):
        raise ProcessError(str(told))
    return told


def _work(rank: int, meeting: str, task: Task, config: TrainConfig, store: CheckpointStore, sender: Connection) -> None:
    """Send what rank 0 was told, or what went wrong on any rank."""
    try:
        told = _train(rank, meeting, task, config, store)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
        raise
    if rank == 0:
        sender.send(told)


def _train(rank: int, meeting: str, task: Task, config: TrainConfig, store: CheckpointStore) -> Told:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.fewest_workers))
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=config.fewest_workers)
    told = Told()

    def metrics(values: Mapping[str, float], step: int) -> None:
        if "train_loss" in values:
            told.losses[step] = values["train_loss"]

    def started(step: int) -> None:
        told.started = step

    listener = Listener(started, metrics, told.validations.append, progress=lambda line: None)
    Worker(task, config, store, torch.device("cpu"), listener).train()
    dist.barrier()
    dist.destroy_process_group()
    return told
