"""A task that does harm once, to see what a fault costs: `ray_jobs/chaos.py` trains it."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from models.checkpoints import CheckpointStore
from models.training.order import Sample
from models.training.task import Task

Fault = Literal["sigkill", "sigstop", "exception", "corrupt", "node"]
MARK = "fault"
NODE_LOSS_S = 120.0


class InjectedError(RuntimeError):
    """The exception of the fault `exception`."""


@dataclass(frozen=True)
class FaultyTask:
    """Another task, and a fault of the first worker that makes the batch with a certain sample.

    Args:
        task: what is trained.
        fault: `corrupt` damages the newest checkpoint and then kills; `node` waits for somebody to end the node.
        sample: where.
        folder: on a disk that all nodes share, for the mark that the fault has been.
        store: of the run's checkpoints.
    """

    task: Task
    fault: Fault
    sample: Sample
    folder: Path
    store: CheckpointStore

    def __getattr__(self, name: str) -> Any:
        """All but the batches is as of the task."""
        if name == "task" or name.startswith("__"):  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self.task, name)

    def batch(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """As of the task, unless the fault is due."""
        if self.sample in samples and self._first():
            self._harm()
        return self.task.batch(samples)

    def _first(self) -> bool:
        """Whether there was no fault before; the mark says when it was."""
        try:
            with (self.folder / MARK).open("x", encoding="utf-8") as mark:
                mark.write(str(time.time()))
        except FileExistsError:
            return False
        return True

    def _harm(self) -> None:
        if self.fault == "exception":
            raise InjectedError("an exception on purpose")
        if self.fault == "node":
            time.sleep(NODE_LOSS_S)
        if self.fault == "corrupt":
            damage(self.store)
        os.kill(os.getpid(), signal.SIGSTOP if self.fault == "sigstop" else signal.SIGKILL)


def damage(store: CheckpointStore) -> None:
    """Change one byte in the middle of the first file of the newest checkpoint."""
    files: Any = store.filesystem
    path = f"{store.folder(store.steps()[-1])}/__0_0.distcp"
    with files.open_input_stream(path) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    with files.open_output_stream(path) as stream:
        stream.write(data)
