"""State and offset of a partition in one atomic file, with fencing: the heart of effectively-once.

Layout under the store's URI: `<stream>/<partition>/owner.json` says who may write (epoch and a token), and
`<stream>/<partition>/<epoch>-<sequence>.checkpoint` are the checkpoints, newest last by name. A zombie that was
fenced cannot win even if it writes: its epoch is older, so its files sort before those of the new owner.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from pyarrow import fs as pafs

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2
SUFFIX = ".checkpoint"


class StaleEpochError(ValueError):
    """Another worker has taken the partition over; this one must stop."""


class Checkpoint(NamedTuple):
    """What a restart needs: the offset of the next record, the clock of the partition and the state's own bytes."""

    offset: int
    clock_us: int
    state: bytes


class CheckpointStore:
    """Checkpoints on any file system of Arrow (a local path, `s3://`, `gs://`, ...).

    The store object is one owner: after `claim` it may save, until somebody claims the partition with a newer epoch.
    """

    def __init__(self, uri: str) -> None:
        self._fs, self._root = filesystem(uri)
        self._token = uuid.uuid4().hex
        self._sequences: dict[tuple[str, int], int] = {}

    def epoch(self, stream: str, partition: int) -> int:
        """The newest epoch that was claimed, 0 when nobody did."""
        return self._owner(stream, partition)[0]

    def claim(self, stream: str, partition: int, epoch: int) -> None:
        """Become the owner, so that owners with an older epoch cannot save any more.

        Raises:
            StaleEpochError: the partition already belongs to a newer epoch, or to somebody else with the same one.
        """
        owner, token = self._owner(stream, partition)
        if owner > epoch or (owner == epoch and token != self._token):
            raise StaleEpochError(f"Partition {partition} of {stream} belongs to epoch {owner}: {epoch} came too late.")
        folder = self._folder(stream, partition)
        self._fs.create_dir(folder, recursive=True)
        write_atomic(self._fs, f"{folder}/owner.json", json.dumps({"epoch": epoch, "token": self._token}).encode())

    def check(self, stream: str, partition: int, epoch: int) -> None:
        """Make sure that this store still owns the partition.

        Raises:
            StaleEpochError: it does not.
        """
        owner, token = self._owner(stream, partition)
        if owner != epoch or token != self._token:
            raise StaleEpochError(
                f"Partition {partition} of {stream} was taken over by epoch {owner}: epoch {epoch} stops writing."
            )

    def save(self, stream: str, partition: int, epoch: int, checkpoint: Checkpoint) -> None:
        """Write a checkpoint atomically (temporary file, fsync, rename) and remove all but the newest two.

        Raises:
            StaleEpochError: the partition belongs to somebody else now.
        """
        self.check(stream, partition, epoch)
        sequence = self._sequences.get((stream, partition), 0) + 1
        header = {
            "format": FORMAT,
            "epoch": epoch,
            "offset": checkpoint.offset,
            "clock_us": checkpoint.clock_us,
            "bytes": len(checkpoint.state),
        }
        body = json.dumps(header).encode() + b"\n" + checkpoint.state
        path = f"{self._folder(stream, partition)}/{epoch:010d}-{sequence:012d}{SUFFIX}"
        write_atomic(self._fs, path, hashlib.sha256(body).digest() + body)
        self._sequences[stream, partition] = sequence
        for old in list(self._files(stream, partition))[KEPT:]:
            self._fs.delete_file(old)

    def load(self, stream: str, partition: int) -> Checkpoint | None:
        """The newest checkpoint that is whole; None when there is none. Torn ones are logged and passed over."""
        for path in self._files(stream, partition):
            with self._fs.open_input_file(path) as file:
                data = file.read()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                line, _, state = data[32:].partition(b"\n")
                header = json.loads(line)
                return Checkpoint(header["offset"], header["clock_us"], state)
            log.error("checkpoint is torn, using the one before", extra={"path": path})
        return None

    def _owner(self, stream: str, partition: int) -> tuple[int, str]:
        path = f"{self._folder(stream, partition)}/owner.json"
        if self._fs.get_file_info(path).type == pafs.FileType.NotFound:
            return 0, ""
        with self._fs.open_input_file(path) as file:
            owner = json.loads(file.read())
        return owner["epoch"], owner["token"]

    def _files(self, stream: str, partition: int) -> Iterator[str]:
        selector = pafs.FileSelector(self._folder(stream, partition), allow_not_found=True)
        names = (info.path for info in self._fs.get_file_info(selector))
        yield from sorted((name for name in names if name.endswith(SUFFIX)), reverse=True)

    def _folder(self, stream: str, partition: int) -> str:
        return f"{self._root}/{stream}/{partition:05d}"


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system and the path of a URI or of a local path."""
    if "://" in uri:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/")
    return pafs.LocalFileSystem(), os.path.abspath(uri)


def write_atomic(filesystem: pafs.FileSystem, path: str, data: bytes | memoryview) -> None:
    """Write a whole file or nothing: durable after return on a local disk; object stores are atomic by themselves."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
