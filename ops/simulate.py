"""`millrace simulate`: send real or generated events to Kafka, at a chosen pace and with chosen faults."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ops.environment import Environment
from streaming.events import EDITS, LABELS, MEASUREMENTS, PREDICTIONS, Topic
from streaming.producing.columns import Events, limited
from streaming.simulators import editors, nab, replay, wikipedia
from streaming.simulators.arrival import SECOND_US, Faults, disturb, paced
from streaming.simulators.patterns import START, Pattern, Shape
from streaming.simulators.predictions import predictions
from streaming.simulators.produce import ensure_topic, produce
from streaming.simulators.sources import SOURCES, generate

DEFAULT_BOOTSTRAP_SERVERS = "127.0.0.1:9092"
GENERATED_EVENTS = 40_000
STREAMS = ("wikipedia", "nab", "edits", *SOURCES, "predictions", "replay")
EPILOG = """\
streams:
  wikipedia     real edits of a day where MILLRACE_DATA holds them, else as `edits`
  nab           real series with labelled anomalies where MILLRACE_DATA holds them, else as `measurements`
  edits         generated edits of one day
  utterances, scans, inspections, prompts, diagrams, measurements
                generated events of that topic
  predictions   generated predictions, and their labels, later, to the topic `labels`
  replay        a file of yours: --file, --topic, --time and --key say what it holds

examples:
  millrace simulate wikipedia --speed-up 600 --disorder 0.05 --late 0.01 --poison 0.001
  millrace simulate measurements --start now --speed-up 1 --events-per-second 500 --pattern bursts --limit 1000000
  millrace simulate replay --file trips.parquet --topic trips --time pickup --key zone --speed-up 3600
"""
_ONLY_GENERATED = ("pattern", "events_per_second", "entities", "skew", "start")
_ONLY_REPLAY = ("file", "time", "key")


@dataclass(frozen=True)
class Stream:
    """What is to be sent: where the events come from, the type of each route's topic, and the events."""

    source: str
    topics: Sequence[Topic]
    events: Iterator[Events]


def main(argv: list[str], environment: Environment) -> int:
    """Run the command; progress goes to standard error, one JSON line with the counts to standard output.

    Returns 0, 2 after one sentence on standard error (an unreachable broker, missing data, a wrong value), or 130 when
    interrupted.
    """
    arguments = _parser().parse_args(argv)
    servers = arguments.bootstrap_servers or environment.kafka_bootstrap_servers or DEFAULT_BOOTSTRAP_SERVERS
    try:
        faults = _faults(arguments)
        stream = _stream(arguments, environment)
        names = [arguments.topic or stream.topics[0].name, *(topic.name for topic in stream.topics[1:])]
        what = f"{stream.source} {arguments.stream if arguments.stream != 'wikipedia' else EDITS.name}"
        print(f"simulate: {what} to topic {' and '.join(names)} at {servers}", file=sys.stderr, flush=True)
        for name, topic in zip(names, stream.topics, strict=True):
            ensure_topic(servers, name, topic.partitions)
        arrivals = disturb(stream.events, faults, stream.topics)
        report = produce(paced(arrivals, rate=arguments.rate, speed_up=arguments.speed_up), servers, names, _progress)
    except ValueError as error:
        print(f"millrace simulate: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("millrace simulate: interrupted; what was sent stays sent.", file=sys.stderr, flush=True)
        return 130
    result = {
        "topic": names[0],
        "source": stream.source,
        "messages": report.messages,
        "counts": report.counts,
        "seconds": round(report.seconds, 3),
        "messages_per_s": round(report.messages_per_s),
    }
    print(json.dumps(result), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="millrace simulate",
        description="Send events to Kafka, each to the partition of its key, and account for every one of them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stream", choices=STREAMS, metavar="NAME", help="which stream to simulate: see below")
    parser.add_argument("--topic", help="where to (default: the stream's own; replay needs it)")
    parser.add_argument("--bootstrap-servers", help="default: KAFKA_BOOTSTRAP_SERVERS, else the local stack's broker")
    parser.add_argument("--limit", type=int, help=f"stop after so many events (generated ones: {GENERATED_EVENTS:,})")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of generated events")
    pace = parser.add_argument_group("pace (default: as fast as possible)").add_mutually_exclusive_group()
    pace.add_argument("--rate", type=float, help="messages a second")
    pace.add_argument("--speed-up", type=float, help="event time divided by this: 3600 plays an hour in a second")
    faults = parser.add_argument_group("faults")
    faults.add_argument("--disorder", type=float, default=0.0, help="fraction that arrives out of order")
    faults.add_argument("--disorder-within", type=float, default=240.0, help="seconds that it is held back at most")
    faults.add_argument("--duplicates", type=float, default=0.0, help="fraction sent twice")
    faults.add_argument("--late", type=float, default=0.0, help="fraction that arrives late")
    faults.add_argument("--late-by", type=float, default=10_800.0, help="seconds that it is held back at least")
    faults.add_argument("--poison", type=float, default=0.0, help="fraction followed by a message nobody can read")
    generated = parser.add_argument_group("generated streams (default: as is usual for the stream)")
    generated.add_argument("--events-per-second", type=float, help="mean rate, in seconds of event time")
    generated.add_argument("--pattern", choices=[*Pattern], help="how they follow one another (default: poisson)")
    generated.add_argument("--entities", type=int, help="number of different keys")
    generated.add_argument("--skew", type=float, help="exponent of Zipf's law over the keys; 0: all equally busy")
    generated.add_argument("--start", help=f"time of the first event, ISO 8601 or now (default: {START.date()})")
    file = parser.add_argument_group("replay")
    file.add_argument("--file", type=Path, help="a .jsonl or .csv file, each also with .gz, or a .parquet file")
    file.add_argument("--time", help="field with the event time: ISO 8601, epoch milliseconds, a timestamp")
    file.add_argument("--key", help="field with the key")
    return parser


def _faults(arguments: argparse.Namespace) -> Faults:
    for name in ("disorder_within", "late_by"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"{_option(name)} is {getattr(arguments, name)}: give a number of seconds of 0 or more.")
    return Faults(
        disorder=arguments.disorder,
        duplicates=arguments.duplicates,
        late=arguments.late,
        poison=arguments.poison,
        seed=arguments.seed,
        disorder_us=int(arguments.disorder_within * SECOND_US),
        late_us=int(arguments.late_by * SECOND_US),
    )


def _stream(arguments: argparse.Namespace, environment: Environment) -> Stream:
    """The events that were asked for; real ones where there are any."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit is {arguments.limit}: give a number above 0.")
    _refuse_foreign_options(arguments)
    name, limit, count = arguments.stream, arguments.limit, arguments.limit or GENERATED_EVENTS
    if name == "replay":
        return _replay(arguments)
    if name == "predictions":
        events = predictions(count, arguments.seed, _shape(arguments))
        return Stream("generated", (PREDICTIONS, LABELS), events)
    if name == "wikipedia" and environment.data and (paths := wikipedia.files(environment.data)):
        real = (events for path in paths for events in wikipedia.edits(path))
        return Stream("real", (EDITS,), limited(real, limit))
    if name == "nab" and environment.data and nab.files(environment.data):
        return Stream("real", (MEASUREMENTS,), nab.measurements(environment.data, limit))
    if name in ("wikipedia", "edits"):
        return Stream("generated", (EDITS,), editors.edits(count, arguments.seed))
    source = SOURCES["measurements" if name == "nab" else name]
    return Stream("generated", (source.topic,), generate(source, count, arguments.seed, _shape(arguments)))


def _replay(arguments: argparse.Namespace) -> Stream:
    missing = [_option(name) for name in ("file", "topic", "time", "key") if getattr(arguments, name) is None]
    if missing:
        raise ValueError(f"replay needs {', '.join(missing)}.")
    events = replay.replay(arguments.file, arguments.time, arguments.key)
    numbers = replay.numeric_columns(arguments.file) if arguments.poison else []
    topic = replay.topic_of(arguments.topic, arguments.time, arguments.key, numbers)
    return Stream("file", (topic,), limited(events, arguments.limit))


def _refuse_foreign_options(arguments: argparse.Namespace) -> None:
    generated = arguments.stream in SOURCES or arguments.stream == "predictions"
    foreign = [name for name in _ONLY_GENERATED if not generated and getattr(arguments, name) is not None]
    foreign += [name for name in _ONLY_REPLAY if arguments.stream != "replay" and getattr(arguments, name) is not None]
    if foreign:
        raise ValueError(f"{_option(foreign[0])} does not apply to {arguments.stream}: leave it out.")


def _shape(arguments: argparse.Namespace) -> Shape:
    return Shape(
        pattern=Pattern(arguments.pattern or Pattern.POISSON),
        rate_hz=arguments.events_per_second,
        entities=arguments.entities,
        skew=arguments.skew,
        start=_start(arguments.start),
    )


def _start(text: str | None) -> datetime:
    if text is None:
        return START
    if text == "now":
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--start is {text}: give a time such as 2026-01-05T08:00:00Z, or now.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _progress(messages: int, seconds: float) -> None:
    print(
        f"simulate: {messages:,} messages in {seconds:.0f} s ({messages / seconds:,.0f}/s)", file=sys.stderr, flush=True
    )
