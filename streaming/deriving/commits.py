"""The commits of one partition of a derivation: what is done in which order, and what a crash or a zombie leaves.

A commit is: the records into a transaction, the checkpoint under the commit's number, the input's offsets and the
number into the transaction, its end. So the checkpoint of the number that the broker says was written whole, and as the
one before is kept too, it does not matter whether a crash comes before or after the end. A try that fails leaves it
open what the broker has done; the next one takes the topic again, which ends the transaction, and looks.
"""

from dataclasses import dataclass
from typing import Protocol

from streaming.checkpoint import CheckpointStore, StaleEpochError
from streaming.deriving.derivation import Derivation
from streaming.deriving.transactions import Progress
from streaming.state import StateError

FIRST_TO_PROVE = 2
DELTAS = 200
"""Most commits that build on a snapshot: some 20 s."""


class Output(Protocol):
    """What commits need of a derived topic (`transactions.Transactions`)."""

    def take(self) -> Progress | None: ...  # noqa: D102
    def write(self, keys: list[bytes], values: list[bytes]) -> None: ...  # noqa: D102
    def commit(self, progress: Progress) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclass
class Commit:
    """What becomes visible together.

    Attributes:
        progress: What it accounts for.
        keys: Of the derived records.
        values: Of the derived records.
        state: The operator's, or what has changed in it since the commit before; empty where it has none.
        delta: Which of the two.
        tried: Whether a try of it may have reached the broker.
        checkpointed: Whether its state is written.
    """

    progress: Progress
    keys: list[bytes]
    values: list[bytes]
    state: bytes
    delta: bool
    tried: bool = False
    checkpointed: bool = False


class Commits:
    """The commits of one partition; one call at a time.

    Args:
        derivation: what is computed; its name is that of its checkpoints.
        partition: of the inputs.
        output: where records go.
        checkpoints: where state goes.
    """

    def __init__(self, derivation: Derivation, partition: int, *, output: Output, checkpoints: CheckpointStore) -> None:
        self._derivation, self._stream, self.partition = derivation, derivation.name, partition
        self._output, self._checkpoints = output, checkpoints
        self.epoch = 0

    def take(self, epoch: int) -> tuple[Progress | None, tuple[bytes, ...]]:
        """Become the only writer; what was committed last (None: nothing yet) and the snapshot and deltas of it.

        Where there are some, `keep` must follow.

        Raises:
            KafkaError: the broker did not answer; call again.
            StaleEpochError: a newer owner has the partition.
            StateError: what the broker has was not written by this derivation, or its state is gone.
        """
        self._checkpoints.claim(self._stream, self.partition, epoch, self._derivation.essence)
        self.epoch = epoch
        progress = self._output.take()
        if progress is None:
            self._check_beginning()
            return None, ()
        if progress.fingerprint != self._derivation.fingerprint:
            raise StateError(
                f"{self._what} was written by another declaration: give the changed one a new name, or delete the"
                " topic and its consumer group to begin anew."
            )
        if not progress.stateful:
            return progress, ()
        saved = self._checkpoints.load(self._stream, self.partition, progress.number)
        if saved is None:
            raise StateError(
                f"{self._what} has no checkpoint of its commit {progress.number}: bring the checkpoints of this stream"
                " back, or delete the topic and its consumer group to begin anew with"
                f" --reset {self._stream}."
            )
        return progress, (saved.state, *saved.deltas)

    def keep(self, progress: Progress, snapshot: bytes) -> None:
        """Write the state that was taken under this epoch.

        So what an owner before left of a commit that failed does not count as the one before.

        Raises:
            StaleEpochError: a newer owner has the partition.
        """
        self._checkpoints.save(self._stream, self.partition, self.epoch, progress.number, 0, snapshot)

    def wants_whole(self) -> bool:
        """Whether the next commit must hold a snapshot; only while none is under way."""
        return self._checkpoints.wants_whole(self._stream, self.partition)

    def save(self, commit: Commit) -> None:
        """Commit, or see that it was committed.

        Raises:
            KafkaError, OSError: something is away; call again with the same commit.
            StaleEpochError: a newer owner has the partition.
        """
        number = commit.progress.number
        if commit.tried:
            self._checkpoints.check(self._stream, self.partition, self.epoch)
            found = self._output.take()
            if found is not None and (found.number, found.epoch) == (number, self.epoch):
                return
            if (found.number if found else 0) != number - 1:
                raise StaleEpochError(f"{self._what} was written by another owner: epoch {self.epoch} stops writing.")
        commit.tried = True
        self._output.write(commit.keys, commit.values)
        if (commit.state or number == FIRST_TO_PROVE) and not commit.checkpointed:
            self._checkpoints.save(self._stream, self.partition, self.epoch, number, 0, commit.state, commit.delta)
            commit.checkpointed = True
        self._output.commit(commit.progress)

    def close(self) -> None:
        """Leave the broker."""
        self._output.close()

    def _check_beginning(self) -> None:
        """A checkpoint of the second commit proves that there was a first one, which a broker forgets in time."""
        saved = self._checkpoints.load(self._stream, self.partition)
        if saved is not None and saved.offset >= FIRST_TO_PROVE:
            raise StateError(
                f"{self._what} has been written, but the broker no longer knows how far (offsets.retention.minutes):"
                f" delete the topic and start with --reset {self._stream} to begin anew; the old checkpoints are kept."
            )

    @property
    def _what(self) -> str:
        return f"Partition {self.partition} of the derivation {self._stream!r}"
