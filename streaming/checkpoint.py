"""State and offset of a partition in atomic files, with fencing: the heart of effectively-once.

Layout under the store's URI: `<stream>/<partition>/owner.json` says who may write (epoch and a token) and what is
computed, and `<stream>/<partition>/<epoch>-<sequence>.checkpoint` are the checkpoints, newest last by name. A zombie
that was fenced cannot win even if it writes: its epoch is older, so its files sort before those of the new owner.
`<stream>/<partition>/reset-<epoch>/` holds what a reset has set aside; whoever moves the files back goes on with them.

A checkpoint holds the whole state, or what changed since the checkpoint that its header names; such a chain ends at a
whole one, and what is loaded is the newest checkpoint of which every link is whole. A new chain begins when the changes
together exceed half of the whole, or when there are as many as there may be.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
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
SCHEMES = ("file", "s3", "gs")


class CheckpointError(ValueError):
    """Checkpoints that cannot be read, or a place where none can be, in one sentence."""


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

    def partitions(self, stream: str) -> list[int]:
        """Those that somebody has claimed."""
        selector = pafs.FileSelector(f"{self._root}/{stream}", allow_not_found=True)
        return sorted(int(info.base_name) for info in self._fs.get_file_info(selector) if info.base_name.isdigit())

    def declared(self, stream: str, partition: int) -> dict[str, Any] | None:
        """What the checkpoints hold, as their owner has declared it; None where there are none, or nobody has."""
        if not any(self._files(stream, partition)):
            return None
        plan: dict[str, Any] | None = self._owner_file(stream, partition).get("plan")
        return plan

    def claim(self, stream: str, partition: int, epoch: int, plan: Mapping[str, Any] | None = None) -> None:
        """Become the owner, so that owners with an older epoch cannot save any more.

        Args:
            stream: Name of what is computed.
            partition: Its number in Kafka.
            epoch: Newer than all before.
            plan: What is computed, as JSON has it; what checkpoints of another plan become is the caller's to decide.

        Raises:
            StaleEpochError: the partition already belongs to a newer epoch, or to somebody else with the same one.
        """
        owner, token = self._owner(stream, partition)
        if owner > epoch or (owner == epoch and token != self._token):
            raise StaleEpochError(f"Partition {partition} of {stream} belongs to epoch {owner}: {epoch} came too late.")
        folder = self._folder(stream, partition)
        self._fs.create_dir(folder, recursive=True)
        self._own(stream, partition, epoch, plan)
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

        Raises:
            CheckpointError: there are some, but none of them is whole, or one was written in another format.
        """
        self._chains.pop((stream, partition), None)
        folder = self._folder(stream, partition)
        read: dict[str, tuple[dict[str, Any], bytes] | None] = {}
        whole = False
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
            whole = whole or link is None
            if link is None and newest is not None and offset in (None, newest["offset"]):
                return Checkpoint(newest["offset"], newest["clock_us"], states[0], tuple(states[1:]))
        if read and not whole:
            raise CheckpointError(
                f"None of the checkpoints in {folder} is whole: bring one back, or begin anew with --reset {stream},"
                " which keeps them aside."
            )
        return None

    def reset(self, stream: str) -> list[str]:
        """Set all checkpoints aside and fence their owners; the folders where they are now, none where none were."""
        folders = []
        for partition in self.partitions(stream):
            owner = self._owner_file(stream, partition)
            epoch = owner.get("epoch", 0) + 1
            self._own(stream, partition, epoch, owner.get("plan"))
            paths = list(self._files(stream, partition))
            if not paths:
                continue
            folder = f"{self._folder(stream, partition)}/reset-{epoch:010d}"
            self._fs.create_dir(folder, recursive=True)
            write_atomic(self._fs, f"{folder}/owner.json", json.dumps(owner).encode())
            for path in paths:
                self._fs.move(path, f"{folder}/{path.rpartition('/')[2]}")
            folders.append(folder)
        return folders

    def _read(self, path: str) -> tuple[dict[str, Any], bytes] | None:
        """Header and state of one file; None where it is torn or gone.

        Raises:
            CheckpointError: it is whole and of another format.
        """
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
        end = data.find(b"\n", DIGEST_BYTES)
        try:
            header = json.loads(data[DIGEST_BYTES:end])
        except ValueError:
            header = {}
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"The checkpoint {path} is of format {header.get('format', 'unknown')}, and this version of Millrace"
                f" reads {FORMAT}: go on with the version that wrote it, or begin anew with --reset and the name of"
                " its view, which keeps it aside."
            )
        return header, data[end + 1 :]

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

    def _own(self, stream: str, partition: int, epoch: int, plan: Mapping[str, Any] | None) -> None:
        owner = {"epoch": epoch, "token": self._token, "plan": plan}
        write_atomic(self._fs, f"{self._folder(stream, partition)}/owner.json", json.dumps(owner).encode())

    def _owner(self, stream: str, partition: int) -> tuple[int, str]:
        owner = self._owner_file(stream, partition)
        return owner.get("epoch", 0), owner.get("token", "")

    def _owner_file(self, stream: str, partition: int) -> dict[str, Any]:
        """What `claim` has written; empty where nobody has claimed."""
        path = f"{self._folder(stream, partition)}/owner.json"
        if self._fs.get_file_info(path).type == pafs.FileType.NotFound:
            return {}
        with self._fs.open_input_file(path) as file:
            owner: dict[str, Any] = json.loads(file.read())
        return owner

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


def check_uri(uri: str) -> str:
    """A place for checkpoints, with `~` of a path filled in, after a file was written there and removed.

    Args:
        uri: an absolute path, or a URI of a scheme that writes a whole file or nothing (file, s3, gs).

    Raises:
        CheckpointError: no checkpoint could be written there.
    """
    scheme, separator, _ = uri.partition("://")
    path = os.path.expanduser(uri)
    if not (scheme in SCHEMES if separator else os.path.isabs(path)):
        raise CheckpointError(
            f"Checkpoints cannot be kept at '{uri}': give an absolute path, or a URI of {', '.join(SCHEMES)}."
        )
    try:
        place, root = filesystem(path)
        place.create_dir(root, recursive=True)
        probe = f"{root}/{uuid.uuid4().hex}.tmp"
        write_atomic(place, probe, b"")
        place.delete_file(probe)
    except (OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"Checkpoints cannot be kept at '{uri}': {error}") from error
    return path


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
