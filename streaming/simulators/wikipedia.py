"""Real edits of Wikipedia (12 September 2015, the sample of Apache Druid's quick start), read from JSON lines."""

import gzip
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from streaming.simulators.arrival import Event

FOLDER = "events-wikipedia-edits"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def files(data: Path) -> list[Path]:
    """The files of real edits under a data folder, in order of their day; empty where there are none.

    Raises:
        ValueError: the data folder itself does not exist.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder; correct MILLRACE_DATA, or unset it to use generated edits.")
    return sorted((data / FOLDER).glob("wikipedia_edits_*.jsonl.gz"))


def edits(path: Path) -> Iterator[Event]:
    """Read one file's edits in time order, keyed by user; values are the file's own lines.

    Raises:
        ValueError: the file is no gzip, or a line is not an edit.
    """
    try:
        with gzip.open(path) as lines:
            events = [_event(path, number, line) for number, line in enumerate(lines, start=1)]
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: can't be read as gzip ({error}); fetch the file again.") from None
    return iter(sorted(events, key=lambda event: event.time_us))


def _event(path: Path, number: int, line: bytes) -> Event:
    try:
        fields = orjson.loads(line)
        moment = datetime.fromisoformat(fields["time"])
        key = fields["user"].encode()
        return Event((moment - EPOCH) // MICROSECOND, key, line.rstrip(b"\n"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}:{number}: is not an edit with a user and a time with its zone ({error!r}).") from None
