"""State and offset of a partition in atomic files, with fencing: the heart of effectively-once.

Layout under the store's URI: `<stream>/<partition>/owner.json` says who may write (epoch and a token), and
`<stream>/<partition>/<epoch>-<sequence>.checkpoint` are the checkpoints, newest last by name. A zombie that was
fenced cannot win even if it writes: its epoch is older, so its files sort before those of the new owner.

A checkpoint holds the whole state, or what changed since the checkpoint that its header names; such a chain ends at a
whole one, and what is loaded is the newest checkpoint of which every link is whole. A new chain begins when the changes
together exceed half of the whole, or when there are as many as there may be.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from pyarrow import fs as pafs

log = logging.getLogger(__name__)

FORMAT = 2
KEPT = 2
SUFFIX = ".checkpoint"
DELTAS = 20
DELTAS_SHARE = 0.5
LARGE_BYTES = 1 << 20
DIGEST_BYTES = 32


class StaleEpochError(ValueError):
    """Another worker has taken the partition over; this one must stop."""


class Checkpoint(NamedTuple):
    """What a restart needs: the offset of the next record, the clock of the partition and the state's own bytes.

    Attributes:
        offset: Of the next record.
        clock_us: Event time of the partition.
        state: The whole state, or what a checkpoint builds on.
        deltas: What changed after it, oldest first.
    """

    offset: int
    clock_us: int
    state: bytes
    deltas: tuple[bytes, ...] = ()


class _Chain(NamedTuple):
    """The checkpoints since the last whole one, of one owner."""

    newest: str
    whole_bytes: int
    deltas_bytes: int
    deltas: int


class CheckpointStore:
    """Checkpoints on any file system of Arrow (a local path, `s3://`, `gs://`, ...).

    The store object is one owner: after `claim` it may save, until somebody claims the partition with a newer epoch.
    Calls for one partition must not overlap.

    Args:
        uri: where they are.
        deltas: most that a chain has; a restart reads them all.
    """

    def __init__(self, uri: str, deltas: int = DELTAS) -> None:
        self._fs, self._root = filesystem(uri)
        self._most_deltas = deltas
        self._token = uuid.uuid4().hex
        self._sequences: dict[tuple[str, int], int] = {}
        self._chains: dict[tuple[str, int], _Chain] = {}
        self._links: dict[str, str | None] = {}

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
        self._chains.pop((stream, partition), None)
        for info in self._fs.get_file_info(pafs.FileSelector(folder)):
            if info.path.endswith(".tmp"):  # of an owner that was killed while it wrote
                self._fs.delete_file(info.path)

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

    def wants_whole(self, stream: str, partition: int) -> bool:
        """Whether the next `save` must hold the whole state: nothing to build on, a small state, or a long chain."""
        chain = self._chains.get((stream, partition))
        return (
            chain is None
            or chain.whole_bytes < LARGE_BYTES
            or chain.deltas >= self._most_deltas
            or chain.deltas_bytes > DELTAS_SHARE * chain.whole_bytes
        )

    def save(
        self, stream: str, partition: int, epoch: int, offset: int, clock_us: int, state: bytes, delta: bool = False
    ) -> None:
        """Write a checkpoint atomically (temporary file, fsync, rename); remove what the newest two do not need.

        Args:
            stream: Name of what is computed.
            partition: Its number in Kafka.
            epoch: Under which it was claimed.
            offset: Of the next record.
            clock_us: Event time of the partition.
            state: The whole state, or what changed since the checkpoint that was saved last.
            delta: Which of the two; only where `wants_whole` is false.

        Raises:
            StaleEpochError: the partition belongs to somebody else now.
        """
        self.check(stream, partition, epoch)
        sequence = self._sequences.get((stream, partition), 0) + 1
        before = self._chains[stream, partition] if delta else _Chain("", len(state), 0, -1)
        header = {
            "format": FORMAT,
            "epoch": epoch,
            "offset": offset,
            "clock_us": clock_us,
            "bytes": len(state),
            "builds_on": before.newest.rpartition("/")[2] or None,
        }
        line = json.dumps(header).encode() + b"\n"
        path = f"{self._folder(stream, partition)}/{epoch:010d}-{sequence:012d}{SUFFIX}"
        digest = hashlib.sha256(line)
        digest.update(state)
        write_atomic(self._fs, path, digest.digest(), line, state)
        self._sequences[stream, partition] = sequence
        self._links[path] = before.newest or None
        self._chains[stream, partition] = _Chain(
            path, before.whole_bytes, before.deltas_bytes + len(state) * delta, before.deltas + 1
        )
        self._remove_unneeded(stream, partition)

    def load(self, stream: str, partition: int, offset: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole with all it builds on; None when there is none. Torn ones are logged.

        The `save` after it must hold the whole state.

        Args:
            stream: Name of what is computed.
            partition: Its number in Kafka.
            offset: Only one that was saved with this offset will do.
        """
        self._chains.pop((stream, partition), None)
        folder = self._folder(stream, partition)
        read: dict[str, tuple[dict[str, Any], bytes] | None] = {}
        for path in self._files(stream, partition):
            states: list[bytes] = []
            newest: dict[str, Any] | None = None
            link: str | None = path
            while link is not None:
                if link not in read:
                    read[link] = self._read(link)
                found = read[link]
                if found is None:
                    break
                header, state = found
                newest = newest or header
                states.insert(0, state)
                link = f"{folder}/{header['builds_on']}" if header.get("builds_on") else None
            if link is None and newest is not None and offset in (None, newest["offset"]):
                return Checkpoint(newest["offset"], newest["clock_us"], states[0], tuple(states[1:]))
        return None

    def _read(self, path: str) -> tuple[dict[str, Any], bytes] | None:
        """Header and state of one file; None where it is torn or gone."""
        try:
            with self._fs.open_input_file(path) as file:
                data = file.read()
        except FileNotFoundError:
            log.error("a checkpoint that another one builds on is gone", extra={"path": path})
            return None
        body = memoryview(data)[DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != data[:DIGEST_BYTES]:
            log.error("checkpoint is torn, using the one before", extra={"path": path})
            return None
        end = data.index(b"\n", DIGEST_BYTES)
        return json.loads(data[DIGEST_BYTES:end]), data[end + 1 :]

    def _remove_unneeded(self, stream: str, partition: int) -> None:
        paths = list(self._files(stream, partition))
        needed: set[str] = set()
        for path in paths[:KEPT]:
            link: str | None = path
            while link is not None and link not in needed:
                needed.add(link)
                link = self._builds_on(link)
        for path in paths:
            if path not in needed:
                self._fs.delete_file(path)
                self._links.pop(path, None)

    def _builds_on(self, path: str) -> str | None:
        if path not in self._links:
            found = self._read(path)
            name = found[0].get("builds_on") if found else None
            self._links[path] = f"{path.rpartition('/')[0]}/{name}" if name else None
        return self._links[path]

    def _owner(self, stream: str, partition: int) -> tuple[int, str]:
        path = f"{self._folder(stream, partition)}/owner.json"
        if self._fs.get_file_info(path).type == pafs.FileType.NotFound:
            return 0, ""
        with self._fs.open_input_file(path) as file:
            owner = json.loads(file.read())
        return owner["epoch"], owner["token"]

    def _files(self, stream: str, partition: int) -> Iterator[str]:
        """The paths of the checkpoints, newest first."""
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


def write_atomic(filesystem: pafs.FileSystem, path: str, *parts: bytes | memoryview) -> None:
    """Write a whole file or nothing: durable after return on a local disk; object stores are atomic by themselves."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            for part in parts:
                stream.write(part)
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)  # a full disk must not get fuller with every try
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
