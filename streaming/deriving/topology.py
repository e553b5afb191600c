"""Which topics views and derivations read and write, in which order: made, counted and checked before a stream runs.

A derived topic has as many partitions as its input had when it was made. The two inputs of a join must have equally
many, because a partition of one is joined with the partition of the same number of the other.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from kafka.errors import KafkaError

from streaming import events
from streaming.deriving.derivation import Derivation
from streaming.plan import Plan
from streaming.topics import ensure_topics

log = logging.getLogger(__name__)

BROKER_S = 60.0
GROWTH_S = 300.0
DERIVED_BYTES = 8 << 20
PARTITIONS = {topic.name: topic.partitions for topic in vars(events).values() if isinstance(topic, events.Topic)}


class SupervisorError(ValueError):
    """Why a stream cannot run, in one sentence."""


def input_topics(plan: Plan | Derivation) -> list[str]:
    """The topics that are read."""
    return [plan.topic] if isinstance(plan, Plan) else [each.topic for each in plan.inputs]


def stages(plans: Sequence[Plan | Derivation]) -> list[list[Plan | Derivation]]:
    """What can be computed to its end at the same time, one after the other: nothing reads what comes later."""
    rest, staged = list(plans), []
    while rest:
        missing = {plan.name for plan in rest if isinstance(plan, Derivation)}
        stage = [plan for plan in rest if not missing.intersection(input_topics(plan))]
        rest = [plan for plan in rest if plan not in stage]
        staged.append(stage)
    return staged


def check_partitions(plan: Plan | Derivation, counts: Mapping[str, int]) -> None:
    """Make sure that joined topics have equally many partitions.

    Raises:
        SupervisorError: they have not.
    """
    topics = input_topics(plan)
    if _differ(plan, counts):
        raise SupervisorError(
            f"Derived topic {plan.view!r} joins {topics[0]!r} with {counts[topics[0]]} partitions and {topics[1]!r}"
            f" with {counts[topics[1]]}: give both equally many, keyed by the field that they are joined on."
        )


class Growth:
    """Which topics may be read at the size to which they have grown, where those that are joined must grow alike.

    Each is given more partitions by a command of its own, so joined ones differ for a while: they are then read at
    their former size.

    Args:
        plans: what reads the topics.
        monotonic_s: clock.
    """

    def __init__(self, plans: Sequence[Plan | Derivation], monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._plans, self._monotonic_s = plans, monotonic_s
        self._found: dict[str, int] = {}
        self._since_s: dict[str, float] = {}

    def follow(self, counts: Mapping[str, int], found: Mapping[str, int]) -> dict[str, int]:
        """The topics that have grown and may be read so, each with its number of partitions.

        Args:
            counts: how many partitions are read.
            found: how many there are now, as far as there is news.

        Raises:
            SupervisorError: joined topics have differed for five minutes.
        """
        self._found |= found
        grown = {topic: count for topic, count in self._found.items() if count > counts[topic]}
        uneven: list[Plan | Derivation] = []
        while more := [plan for plan in self._plans if plan not in uneven and _differ(plan, {**counts, **grown})]:
            uneven += more
            waiting = {topic for plan in more for topic in input_topics(plan)}
            grown = {topic: count for topic, count in grown.items() if topic not in waiting}
        now_s = self._monotonic_s()
        before, self._since_s = self._since_s, {plan.view: self._since_s.get(plan.view, now_s) for plan in uneven}
        for plan in uneven:
            sizes = {topic: max(counts[topic], self._found.get(topic, 0)) for topic in input_topics(plan)}
            if now_s - self._since_s[plan.view] >= GROWTH_S:
                check_partitions(plan, sizes)
            elif plan.view not in before:
                log.warning(
                    "joined topics have different numbers of partitions: waiting until the other one has grown too",
                    extra={"view": plan.view, "partitions": sizes, "at_most_s": GROWTH_S},
                )
        return grown


def prepare(plans: Sequence[Plan | Derivation], stopping: Callable[[], bool]) -> dict[str, int]:
    """Make the topics that are read and written where they are missing; how many partitions each has.

    Args:
        plans: derivations before what reads them.
        stopping: whether to wait no longer for a broker.

    Raises:
        SupervisorError: no broker answers, or joined topics have different numbers of partitions.
    """
    counts: dict[str, int] = {}
    for plan in plans:
        for topic in input_topics(plan):
            if topic not in counts:
                counts |= _make(plan, {topic: PARTITIONS.get(topic, 1)} | _rejects(topic), stopping)
        if isinstance(plan, Derivation):
            check_partitions(plan, counts)
            # A joined record can be twice as long as what brokers take by default.
            configs = {"max.message.bytes": str(DERIVED_BYTES)}
            counts |= _make(plan, {plan.name: counts[plan.topic]}, stopping, configs)
            counts |= _make(plan, _rejects(plan.name), stopping)
    return counts


def _differ(plan: Plan | Derivation, counts: Mapping[str, int]) -> bool:
    return len({counts[topic] for topic in input_topics(plan)}) > 1


def _rejects(topic: str) -> dict[str, int]:
    return {events.dead(topic): 1, events.late(topic): 1}


def _make(
    plan: Plan | Derivation,
    topics: Mapping[str, int],
    stopping: Callable[[], bool],
    configs: Mapping[str, str] | None = None,
) -> dict[str, int]:
    deadline_s = time.monotonic() + BROKER_S
    while True:
        try:
            return ensure_topics(plan.bootstrap_servers, topics, configs)
        except KafkaError as error:
            if time.monotonic() > deadline_s or stopping():
                raise SupervisorError(
                    f"No Kafka broker answers at {plan.bootstrap_servers} (view {plan.view!r}): start one, or set"
                    f" KAFKA_BOOTSTRAP_SERVERS. {error!r}"
                ) from error
            log.warning("no broker yet", extra={"servers": plan.bootstrap_servers, "error": repr(error)})
            time.sleep(1.0)
