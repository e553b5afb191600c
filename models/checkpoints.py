"""Training checkpoints that a crash at any moment can't spoil: files first, a manifest with their hashes last.

A checkpoint is the folder `step-<number>` on any file system that pyarrow knows. All ranks write their files into it;
when all are done, rank 0 writes `manifest.json` (step, world size, configuration hash, sha256 of every file): that is
the commit, and one atomic operation on disks and object stores alike. A folder without a manifest is an orphan and is
removed by the next `recover`, which trusts no file before it has checked its hash. The hashes say that files are as
they were written, not by whom: a checkpoint is trusted as code is.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, SubTreeFileSystem

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2
STOP = "stop"
_FOLDER = re.compile(r"step-(\d{9})")
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that belongs to something else, in one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files have the hashes of its manifest; `folder` is a path of the file system."""

    folder: str
    step: int
    world_size: int
    facts: Mapping[str, Any]


class HashingStream:
    """A file that is being written, and the sha256 of what went into it so far."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Append bytes; returns how many."""
        self._digest.update(data)
        self._stream.write(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        """How many bytes there are."""
        return self._size

    def flush(self) -> None:
        """Do nothing: the file counts only once it is closed."""

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()

    def hexdigest(self) -> str:
        """The hash of everything written."""
        return self._digest.hexdigest()


class CheckpointStore:
    """The checkpoints of one training run.

    Args:
        filesystem: of pyarrow, the same storage for all workers.
        folder: its path there; made when the first checkpoint is written.
        config_hash: of what must not change between two parts of one run.
        keep: how many of the newest stay; `commit` is told which others do.
    """

    def __init__(self, filesystem: FileSystem, folder: str, config_hash: str, keep: int = 2) -> None:
        self.filesystem = filesystem
        self._folder = folder
        self._config_hash = config_hash
        self._keep = keep

    @classmethod
    def at(cls, place: str | Path, config_hash: str, keep: int = 2) -> "CheckpointStore":
        """The store at an absolute path or at a URI such as `file:///...`, `s3://...`, `gs://...` or `hdfs://...`."""
        filesystem, folder = FileSystem.from_uri(str(place))
        return cls(filesystem, folder, config_hash, keep)

    def folder(self, step: int) -> str:
        """The folder of a step, whether it is there or not."""
        return f"{self._folder}/step-{step:09d}"

    @contextmanager
    def writing(self, path: str) -> Iterator[HashingStream]:
        """Write one file, which is durable when the block has ended."""
        with self.filesystem.open_output_stream(path) as raw:
            yield HashingStream(raw)
        self._sync(path)

    def begin(self, step: int) -> str:
        """Make the folder into which every rank writes its files of a step."""
        self.filesystem.create_dir(self.folder(step), recursive=True)
        return self.folder(step)

    def commit(
        self, step: int, world_size: int, files: Mapping[str, str], facts: Mapping[str, Any], best: Iterable[int] = ()
    ) -> None:
        """Make the files of a step a checkpoint, then remove all but the newest and those of the best steps.

        Args:
            step: of the checkpoint.
            world_size: how many ranks have written.
            files: the sha256 of each, by its name in the folder.
            facts: whatever else a resumed run must know.
            best: steps whose checkpoints stay, besides the newest.
        """
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size,
            "config_hash": self._config_hash,
            "files": dict(files),
            "facts": dict(facts),
        }
        folder = self.folder(step)
        partial = f"{folder}/{MANIFEST}.partial"
        with self.writing(partial) as stream:
            stream.write(json.dumps(manifest, indent=1).encode())
        self.filesystem.move(partial, f"{folder}/{MANIFEST}")
        self._sync(folder)
        self._sync(self._folder)
        kept = {*self.steps()[-self._keep :], *best}
        for other in self.steps():
            if other not in kept:
                self.remove(other)

    def recover(self) -> Checkpoint | None:
        """The newest sound checkpoint; orphans, and damaged ones newer than it, are removed with a warning.

        Raises:
            CheckpointError: it was made with another configuration.
        """
        committed = set(self.steps())
        for orphan in self._steps_begun() - committed:
            logger.warning(json.dumps({"event": "orphan removed", "step": orphan}))
            self.remove(orphan)
        for step in sorted(committed, reverse=True):
            if (checkpoint := self.load(step)) is not None:
                return checkpoint
            logger.warning(json.dumps({"event": "damaged checkpoint removed", "step": step}))
            self.remove(step)
        return None

    def load(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step, or None when it isn't there or any of its files is not as it was written."""
        folder = self.folder(step)
        try:
            manifest = json.loads(self._read(f"{folder}/{MANIFEST}"))
            sound = manifest["format"] == FORMAT and manifest["step"] == step
            sound = sound and all(self._hash(f"{folder}/{name}") == known for name, known in manifest["files"].items())
            config_hash, world_size, facts = manifest["config_hash"], manifest["world_size"], manifest["facts"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if not sound:
            return None
        if config_hash != self._config_hash:
            raise CheckpointError(
                f"{folder} was made with another configuration; give this run another train.name or remove the folder."
            )
        return Checkpoint(folder, step, world_size, facts)

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, sound or not, in ascending order."""
        return sorted(step for step in self._steps_begun() if self._exists(f"{self.folder(step)}/{MANIFEST}"))

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first, so that what is left of it never counts."""
        manifest = f"{self.folder(step)}/{MANIFEST}"
        if self._exists(manifest):
            self.filesystem.delete_file(manifest)
        self.filesystem.delete_dir(self.folder(step))

    def ask_to_stop(self) -> None:
        """Leave a note for the workers to save a checkpoint and end."""
        self.filesystem.create_dir(self._folder, recursive=True)
        with self.writing(f"{self._folder}/{STOP}") as stream:
            stream.write(b"stop")

    def asked_to_stop(self) -> bool:
        """Whether the note is there."""
        return self._exists(f"{self._folder}/{STOP}")

    def forget_to_stop(self) -> None:
        """Remove the note."""
        if self.asked_to_stop():
            self.filesystem.delete_file(f"{self._folder}/{STOP}")

    def _steps_begun(self) -> set[int]:
        found = self.filesystem.get_file_info(FileSelector(self._folder, allow_not_found=True))
        matches = (_FOLDER.fullmatch(info.base_name) for info in found)
        return {int(match.group(1)) for match in matches if match}

    def _exists(self, path: str) -> bool:
        return bool(self.filesystem.get_file_info(path).type != FileType.NotFound)

    def _read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _hash(self, path: str) -> str:
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def _sync(self, path: str) -> None:
        """Wait until a file or folder is on the disk; storage of other kinds does so when a file is closed."""
        if (local := _local(self.filesystem, path)) is None:
            return
        descriptor = os.open(local, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _local(filesystem: FileSystem, path: str) -> Path | None:
    """Where a path lies on this machine's disk, if it does."""
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    if isinstance(filesystem, SubTreeFileSystem):
        return _local(filesystem.base_fs, f"{filesystem.base_path}/{path}")
    return None
