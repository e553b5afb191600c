"""`millrace simulate`: send real or generated events to Kafka, at a chosen pace and with chosen faults."""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice

from ops.environment import Environment
from streaming.events import EDITS
from streaming.simulators import editors, wikipedia
from streaming.simulators.arrival import Event, Faults, disturb, paced
from streaming.simulators.produce import ensure_topic, produce

DEFAULT_BOOTSTRAP_SERVERS = "127.0.0.1:9092"
GENERATED_EDITS = 40_000


def main(argv: list[str], environment: Environment) -> int:
    """Run the command; progress goes to standard error, one JSON line with the counts to standard output.

    Returns 0, or 2 after one sentence on standard error: an unreachable broker, missing data, a wrong value.
    """
    arguments = _parser().parse_args(argv)
    servers = arguments.bootstrap_servers or environment.kafka_bootstrap_servers or DEFAULT_BOOTSTRAP_SERVERS
    try:
        faults = Faults(
            disorder=arguments.disorder,
            duplicates=arguments.duplicates,
            late=arguments.late,
            poison=arguments.poison,
            seed=arguments.seed,
        )
        source, events = _events(environment, arguments.limit, arguments.seed)
        print(f"simulate: {source} edits to topic {arguments.topic} at {servers}", file=sys.stderr, flush=True)
        ensure_topic(servers, arguments.topic, EDITS.partitions)
        arrivals = paced(disturb(events, faults), rate=arguments.rate, speed_up=arguments.speed_up)
        report = produce(arrivals, servers, arguments.topic, _progress)
    except ValueError as error:
        print(f"millrace simulate: {error}", file=sys.stderr, flush=True)
        return 2
    result = {
        "topic": arguments.topic,
        "source": source,
        "messages": report.messages,
        "counts": report.counts,
        "seconds": round(report.seconds, 3),
        "messages_per_s": round(report.messages_per_s),
    }
    print(json.dumps(result), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millrace simulate", description="Send events to Kafka.")
    parser.add_argument("stream", choices=["wikipedia"], help="which stream to simulate")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=float, help="messages a second (default: as fast as possible)")
    pace.add_argument("--speed-up", type=float, help="event time divided by this: 3600 plays an hour in a second")
    parser.add_argument("--limit", type=int, help="stop after this many edits")
    parser.add_argument("--disorder", type=float, default=0.0, help="fraction up to 4 minutes out of order")
    parser.add_argument("--duplicates", type=float, default=0.0, help="fraction sent twice")
    parser.add_argument("--late", type=float, default=0.0, help="fraction held back for more than 3 hours")
    parser.add_argument("--poison", type=float, default=0.0, help="fraction followed by a message nobody can read")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of generated edits")
    parser.add_argument("--topic", default=EDITS.name)
    parser.add_argument("--bootstrap-servers", help="default: KAFKA_BOOTSTRAP_SERVERS, else the local stack's broker")
    return parser


def _events(environment: Environment, limit: int | None, seed: int) -> tuple[str, Iterator[Event]]:
    """Real edits where MILLRACE_DATA holds them, else generated ones; in time order."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}: give a number above 0.")
    paths = wikipedia.files(environment.data) if environment.data else []
    if paths:
        real = (event for path in paths for event in wikipedia.edits(path))
        return "real", islice(real, limit)
    return "generated", editors.edits(limit or GENERATED_EDITS, seed)


def _progress(messages: int, seconds: float) -> None:
    print(
        f"simulate: {messages:,} messages in {seconds:.0f} s ({messages / seconds:,.0f}/s)", file=sys.stderr, flush=True
    )
