"""Real edits of Wikipedia (12 September 2015, the sample of Apache Druid's quick start), read from JSON lines."""

from collections.abc import Iterator
from pathlib import Path

from streaming.events import EDITS
from streaming.producing.columns import Events, sorted_within
from streaming.simulators.replay import SORT_ROWS, json_lines

FOLDER = "events-wikipedia-edits"


def files(data: Path) -> list[Path]:
    """The files of real edits under a data folder, in order of their day; empty where there are none.

    Raises:
        ValueError: the data folder itself does not exist.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder; correct MILLRACE_DATA, or unset it to use generated edits.")
    return sorted((data / FOLDER).glob("wikipedia_edits_*.jsonl.gz"))


def edits(path: Path) -> Iterator[Events]:
    """Read one file's edits in time order, keyed by user; values are the file's own lines.

    Raises:
        ValueError: the file is no gzip, or a line is not an edit.
    """
    return sorted_within(json_lines(path, EDITS.timestamp, EDITS.key, "an edit"), SORT_ROWS)
