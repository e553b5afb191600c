"""Topics: made where they are missing, and watched while they are read, for more partitions and for their end."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from kafka import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

log = logging.getLogger(__name__)

CONNECT_MS = 10_000
LOOK_S = 10.0
GONE_S = 60.0


class TopicGoneError(ValueError):
    """A topic was deleted and did not come back."""


def ensure_topics(
    bootstrap_servers: str, topics: Mapping[str, int], configs: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Create the topics (name to number of partitions) that do not exist; returns how many partitions each has.

    Args:
        bootstrap_servers: `host:port,host:port`.
        topics: the wanted ones.
        configs: settings of those that are created.

    Raises:
        KafkaError: no broker answered.
    """
    admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers.split(","), bootstrap_timeout_ms=CONNECT_MS)
    try:
        existing = set(admin.list_topics())
        missing = {
            name: {"num_partitions": partitions, "replication_factor": -1, "configs": dict(configs or {})}
            for name, partitions in topics.items()
            if name not in existing
        }
        if missing:
            log.info("creating topics", extra={"topics": sorted(missing)})
            with suppress(TopicAlreadyExistsError):  # another process was faster
                admin.create_topics(missing, wait_for_metadata=True)
        return {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(list(topics))}
    finally:
        admin.close()


def count_partitions(bootstrap_servers: str, topics: Iterable[str]) -> dict[str, int]:
    """How many partitions each topic has; one that does not exist is missing.

    Raises:
        KafkaError: no broker answered.
    """
    admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers.split(","))
    try:
        existing = sorted(set(admin.list_topics()) & set(topics))
        return (
            {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(existing)} if existing else {}
        )
    finally:
        admin.close()


class TopicWatch:
    """Asks a broker every 10 s, in a thread of its own, for an answer can take as long as the broker is away.

    Args:
        bootstrap_servers: `host:port,host:port`.
        topics: names.
        count: answers the question.
        monotonic_s: clock.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topics: Iterable[str],
        count: Callable[[str, Iterable[str]], dict[str, int]] = count_partitions,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers, self._topics = bootstrap_servers, sorted(set(topics))
        self._count, self._monotonic_s = count, monotonic_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="topics")
        self._asked: Future[dict[str, int]] | None = None
        self._next_s = monotonic_s() + LOOK_S
        self._gone_since_s: dict[str, float] = {}

    def look(self) -> dict[str, int]:
        """What the broker has answered since the last call: topic to partitions; empty when it has not. Never waits.

        Raises:
            TopicGoneError: a topic has not been there for a minute.
        """
        now_s = self._monotonic_s()
        if self._asked is None:
            if now_s >= self._next_s:
                self._asked = self._executor.submit(self._count, self._servers, self._topics)
            return {}
        if not self._asked.done():
            return {}
        asked, self._asked, self._next_s = self._asked, None, now_s + LOOK_S
        try:
            counts = asked.result()
        except KafkaError as error:
            log.warning("no broker answers", extra={"servers": self._servers, "error": repr(error)})
            return {}
        for topic in self._topics:
            if topic in counts:
                self._gone_since_s.pop(topic, None)
                continue
            log.error("the topic is gone", extra={"topic": topic})
            if now_s - self._gone_since_s.setdefault(topic, now_s) >= GONE_S:
                raise TopicGoneError(
                    f"Topic {topic!r} was deleted at {self._servers} and has not come back for {GONE_S:.0f} s: make it"
                    " again and start its views with --reset, or take the views out of the registry."
                )
        return counts

    def close(self) -> None:
        """Ask no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
