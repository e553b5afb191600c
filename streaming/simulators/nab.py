"""Real series with labelled anomalies: the Numenta Anomaly Benchmark, one CSV file a series."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv

from streaming.producing.columns import Events, limited, sorted_within
from streaming.records import Bools, Ints
from streaming.simulators.replay import from_table

FOLDER = "events-nab"


def files(data: Path) -> list[Path]:
    """The files of series under a data folder, in order of their names; empty where there are none.

    Raises:
        ValueError: the data folder itself does not exist.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder; correct MILLRACE_DATA, or unset it to use generated series.")
    return sorted((data / FOLDER / "data").glob("*/*.csv"))


def windows_us(data: Path) -> dict[str, list[tuple[int, int]]]:
    """The labelled anomalies: series -> (first, last) microsecond of each window, both within it.

    Raises:
        ValueError: the file of labels is not there or is none.
    """
    path = data / FOLDER / "labels" / "combined_windows.json"
    try:
        labels = orjson.loads(path.read_bytes())
        return {
            Path(name).stem: [(_us(first), _us(last)) for first, last in windows] for name, windows in labels.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: holds no labelled windows ({error}); fetch the data set again.") from None


def measurements(data: Path, limit: int | None = None) -> Iterator[Events]:
    """All series merged in time order as events of `measurements`: the series is the file's name without its end.

    Raises:
        ValueError: a file can't be read.
    """
    anomalies = windows_us(data)
    return limited(sorted_within((_series(path, anomalies) for path in files(data)), window=2**62), limit)


def _series(path: Path, anomalies: dict[str, list[tuple[int, int]]]) -> Events:
    try:
        table = pyarrow.csv.read_csv(path)
        times = table["timestamp"].cast(pa.timestamp("us"))
        values = table["value"].cast(pa.float64())
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: holds no series of timestamp and value ({str(error).splitlines()[0]}).") from None
    times_us: Ints = times.cast(pa.int64()).to_numpy()
    anomalous: Bools = np.zeros(len(times_us), dtype=np.bool_)
    for first, last in anomalies.get(path.stem, []):
        anomalous |= (first <= times_us) & (times_us <= last)
    batch = pa.RecordBatch.from_pydict(
        {
            "series": pa.array([path.stem] * len(times_us), pa.string()),
            "time": times.combine_chunks(),
            "value": values.combine_chunks(),
            "anomaly": pa.array(anomalous),
        }
    )
    return from_table(batch, "time", "series", path)


def _us(text: str) -> int:
    return int(np.datetime64(text, "us").astype(np.int64))
