"""Records must be keyed by their entity where a topic has several partitions, or partitions would share entities."""

from typing import Protocol

import orjson

from streaming.records import RecordBatch

KEYS_CHECKED = 100


class WorkerError(ValueError):
    """Records that cannot be computed by partitions."""


class Keyed(Protocol):
    """A topic and the field that must be the key of its records, as a plan names both."""

    @property
    def topic(self) -> str: ...  # noqa: D102
    @property
    def entity(self) -> str: ...  # noqa: D102


class KeyCheck:
    """Looks at the first records that a worker reads."""

    def __init__(self, plan: Keyed) -> None:
        self._plan = plan
        self._left = KEYS_CHECKED

    def look(self, batch: RecordBatch) -> None:
        """Check a batch, if not enough was checked.

        Raises:
            WorkerError: a record has another key.
        """
        if self._left > 0:
            check_keys(self._plan, batch)
            self._left -= len(batch.offsets)


def check_keys(plan: Keyed, batch: RecordBatch) -> None:
    """Make sure that readable records are keyed by their entity, without which partitions would share entities.

    Raises:
        WorkerError: one is not.
    """
    for row in range(min(len(batch.offsets), KEYS_CHECKED)):
        try:
            event = orjson.loads(batch.value(row) or b"")
        except orjson.JSONDecodeError:
            continue
        entity = event.get(plan.entity) if isinstance(event, dict) else None
        if not isinstance(entity, str | int) or isinstance(entity, bool):
            continue
        accepted = [str(entity).encode()]
        if isinstance(entity, int) and -(1 << 63) <= entity < 1 << 63:
            accepted.append(entity.to_bytes(8, "big", signed=True))
        key = batch.key(row)
        if key not in accepted:
            raise WorkerError(
                f"Topic {plan.topic!r} has several partitions but record {batch.offsets[row]} of partition"
                f" {batch.partition} has the key {key!r} and the {plan.entity} {entity!r}: produce it keyed by"
                f" {plan.entity}, or to a topic with one partition."
            )
