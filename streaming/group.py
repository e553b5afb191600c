"""Partitions by a Kafka consumer group instead of by the supervisor: what the group gives, the worker takes.

The member reads nothing itself. It joins, pauses what it is given and hands the numbers to a worker, which works in a
thread of its own, so no flush can hold up a heartbeat. What the group takes back is awaited until the worker has
checkpointed it, or for 20 s; a slower worker is fenced by the next owner's epoch. Assignment is by Kafka's range
assignor.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.errors import KafkaError

log = logging.getLogger(__name__)

POLL_MS = 500
RELEASE_S = 20.0
LOOK_S = 0.02
MISSING_S = 30.0
METADATA_MS = 10_000
SESSION_MS = 10_000
HEARTBEAT_MS = 1_000


class GroupMember:
    """One member of a consumer group on one topic, run by a thread of its own.

    Args:
        bootstrap_servers: `host:port,host:port`.
        group: name of the group; not that under which offsets are committed.
        topic: the topic.
        assign: takes the partitions that the member has now, and whether those that it had before are lost, so that
            they must be discarded rather than saved.
        holds: the partitions that the worker still has.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        group: str,
        topic: str,
        assign: Callable[[set[int], bool], None],
        holds: Callable[[], Iterable[int]],
    ) -> None:
        self._topic, self._assign, self._holds = topic, assign, holds
        self._owned: set[int] = set()
        self._stop = threading.Event()
        self._kafka = KafkaConsumer(
            bootstrap_servers=bootstrap_servers.split(","),
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            partition_assignment_strategy=(RangePartitionAssignor,),
            metadata_max_age_ms=METADATA_MS,
            session_timeout_ms=SESSION_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            reconnect_backoff_max_ms=1_000,
        )
        self._thread = threading.Thread(target=self._run, name=f"group-{topic}", daemon=True)

    def start(self) -> None:
        """Join."""
        self._kafka.subscribe([self._topic], listener=_Listener(self))
        self._thread.start()

    def stop(self) -> None:
        """Leave, once the worker has let go of its partitions or has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        complete_s = time.monotonic()
        while not self._stop.is_set():
            try:
                self._kafka.poll(timeout_ms=POLL_MS)
            except KafkaError as error:
                log.warning("trying again", extra={"topic": self._topic, "error": repr(error)})
                self._stop.wait(1.0)
            if self._owned <= set(self._holds()):
                complete_s = time.monotonic()
            elif time.monotonic() - complete_s > MISSING_S:  # a former owner that woke up had fenced the worker
                self._assign(self._owned, False)
                complete_s = time.monotonic()
        try:
            self._kafka.close(autocommit=False, timeout_ms=5_000)
        except KafkaError as error:
            log.debug("leaving the group failed: %s", error)

    def _given(self, partitions: Iterable[TopicPartition]) -> None:
        self._kafka.pause(*partitions)
        self._owned = {at.partition for at in partitions}
        log.info("the group assigns", extra={"topic": self._topic, "partitions": sorted(self._owned)})
        self._assign(self._owned, False)

    async def _taken(self, partitions: Iterable[TopicPartition], lost: bool) -> None:
        taken = {at.partition for at in partitions}
        self._owned = self._owned - taken
        self._assign(self._owned, lost)
        deadline_s = time.monotonic() + RELEASE_S
        while not self._stop.is_set() and taken & set(self._holds()) and time.monotonic() < deadline_s:
            await self._kafka._net.sleep(LOOK_S)


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Called on the loop that also sends the heartbeats, so it awaits and never blocks."""

    def __init__(self, member: GroupMember) -> None:
        self._member = member

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._member._given(assigned)

    async def on_partitions_revoked(self, revoked: Any) -> None:
        await self._member._taken(revoked, lost=False)

    async def on_partitions_lost(self, lost: Any) -> None:
        await self._member._taken(lost, lost=True)
