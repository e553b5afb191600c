"""The state of all ranks in one checkpoint: torch's distributed checkpoint, written through `models.checkpoints`.

Every rank writes its own shards straight to the store, whatever file system that is: nothing is written twice, and
no machine needs room for a copy. The coordinator commits the manifest in the last phase of the save, when all ranks
have closed their files; so a save that has returned, or an asynchronous one that is done, is a committed checkpoint.
A checkpoint can be read by another number of ranks, and by another parallelism.
"""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as distributed_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as distributed_save
from torch.distributed.checkpoint.storage import WriteResult

from models.checkpoints import Checkpoint, CheckpointStore

METADATA = ".metadata"


def save(
    store: CheckpointStore,
    step: int,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    best: tuple[int, ...],
    group: dist.ProcessGroup,
    asynchronous: bool,
) -> "Future[Any] | None":
    """Save what every rank holds and commit it; all ranks call it.

    Args:
        store: where to.
        step: of the checkpoint.
        state: this rank's tensors; of those that several ranks hold under one name, one is written.
        facts: for the manifest.
        best: steps whose checkpoints stay, besides the newest.
        group: of all ranks, on gloo, used for nothing else: an asynchronous save communicates while training does.
        asynchronous: return as soon as the state is copied; the future ends when the checkpoint is committed.
    """
    writer = _Writer(store, step, facts, best)
    if not asynchronous:
        distributed_save(dict(state), storage_writer=writer, process_group=group)
        return None
    future: Future[Any] = async_save(dict(state), storage_writer=writer, process_group=group)  # type: ignore[assignment]
    return future


def names(store: CheckpointStore, checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The tensors of a checkpoint, with the shape and type of each."""
    metadata = _Reader(store, checkpoint).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(
    store: CheckpointStore, checkpoint: Checkpoint, state: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill tensors in place with those of their names; all ranks call it, or one process alone without a group."""
    reader = _Reader(store, checkpoint)
    distributed_load(dict(state), storage_reader=reader, process_group=group, no_dist=group is None)


def load_weights(store: CheckpointStore, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The network's state in one process: the averaged weights where there are some."""
    known = names(store, checkpoint)
    state = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in known.items()
        if name.startswith(("network/", "average/"))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(store, checkpoint, state, None)
    plain = {name.removeprefix("network/"): value for name, value in state.items() if name.startswith("network/")}
    return plain | {name.removeprefix("average/"): state[name] for name in state if name.startswith("average/")}


@dataclass(frozen=True)
class _Written(WriteResult):
    """What torch notes about a tensor that was written, and the hash of the file it is in."""

    digest: str


class _Files(FileSystemBase):
    """The store's file system, as torch asks for one; it remembers the hashes of what it wrote."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode == "rb":
            with self._store.filesystem.open_input_file(str(path)) as stream:
                yield io.BytesIO(stream.read()) if str(path).endswith(METADATA) else stream
            return
        with self._store.writing(str(path)) as stream:
            yield stream
        self.digests[str(path).rpartition("/")[2]] = stream.hexdigest()

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._store.filesystem.move(str(path), str(new_path))
        self.digests[str(new_path).rpartition("/")[2]] = self.digests.pop(str(path).rpartition("/")[2])

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._store.filesystem.create_dir(str(path), recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return False

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._store.filesystem.delete_file(str(path))


class _Writer(FileSystemWriter):
    """Writes one rank's files; on the coordinator, commits when all ranks have."""

    def __init__(self, store: CheckpointStore, step: int, facts: Mapping[str, Any], best: tuple[int, ...]) -> None:
        super().__init__(store.folder(step), sync_files=False)
        self._store, self._step, self._facts, self._best = store, step, facts, best
        self._files = _Files(store)
        self.fs, self.path = self._files, store.folder(step)  # type: ignore[assignment]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's shards, and note each file's hash beside them."""
        results = super().write_data(plan, planner).wait()
        hashed: list[WriteResult] = [
            _Written(
                **{field.name: getattr(one, field.name) for field in fields(one)},
                digest=self._files.digests[one.storage_data.relative_path],
            )
            for one in results
        ]
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(hashed)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata and commit: only the coordinator is asked, after all ranks have written."""
        super().finish(metadata, results)
        files = {one.storage_data.relative_path: one.digest for rank in results for one in rank}  # type: ignore[attr-defined]
        files[METADATA] = self._files.digests[METADATA]
        self._store.commit(self._step, len(results), files, self._facts, self._best)


class _Reader(FileSystemReader):
    def __init__(self, store: CheckpointStore, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.folder)
        self.fs, self.path = _Files(store), checkpoint.folder  # type: ignore[assignment]
