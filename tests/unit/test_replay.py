"""Files come back row for row, in time order, and what can't be read is named in a sentence."""

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from streaming.producing.columns import CHUNK, Event, rows
from streaming.simulators import nab, replay

TRIPS = pa.table(
    {
        "pickup": pa.array(
            [1_767_571_202_000_000, 1_767_571_200_000_000, 1_767_571_201_000_500],
            pa.timestamp("us"),
        ),
        "zone": [7, 8, 7],
        "fare": [2.5, None, float("nan")],
        "note": ['a"b', "ü", None],
        "paid": [True, False, None],
    }
)


def events(path: Path, time: str = "pickup", key: str = "zone") -> list[Event]:
    return list(rows(replay.replay(path, time, key)))


def parquet(folder: Path, table: pa.Table) -> Path:
    path = folder / "trips.parquet"
    pq.write_table(table, path)
    return path


def test_parquet_rows_become_objects_in_time_order_keyed_by_a_columns_text(tmp_path: Path) -> None:
    found = events(parquet(tmp_path, TRIPS))
    assert [event.key for event in found] == [b"8", b"7", b"7"]
    assert [orjson.loads(event.value) for event in found] == [
        {"pickup": "2026-01-05T00:00:00.000000Z", "zone": 8, "fare": None, "note": "ü", "paid": False},
        {"pickup": "2026-01-05T00:00:01.000500Z", "zone": 7, "fare": None, "note": None, "paid": None},
        {"pickup": "2026-01-05T00:00:02.000000Z", "zone": 7, "fare": 2.5, "note": 'a"b', "paid": True},
    ]
    start_us = int(datetime(2026, 1, 5, tzinfo=UTC).timestamp()) * 1_000_000
    assert [event.time_us - start_us for event in found] == [0, 1_000_500, 2_000_000]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_csv_rows_are_read_as_pandas_reads_them(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame(
        {
            "at": pd.date_range("2014-07-01", periods=500, freq="30min").astype(str),
            "series": [f"s{n % 3}" for n in range(500)],
            "value": np.random.default_rng(0).normal(size=500),
        }
    )
    path = tmp_path / f"series{suffix}"
    frame.to_csv(path, index=False)
    expected = pd.read_csv(path, parse_dates=["at"], float_precision="round_trip")
    found = [orjson.loads(event.value) for event in events(path, "at", "series")]
    assert [fields["value"] for fields in found] == expected["value"].tolist()
    assert [fields["series"] for fields in found] == expected["series"].tolist()
    assert [pd.Timestamp(fields["at"]) for fields in found] == expected["at"].dt.tz_localize("UTC").tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.timestamp("ns"), "2026-01-05T00:00:00.000Z"),
        (pa.timestamp("s"), "2026-01-05T00:00:00.000Z"),
        (pa.timestamp("ms", "Europe/Berlin"), "2026-01-05T00:00:00.000Z"),
        (pa.date32(), "2026-01-05T00:00:00.000Z"),
        (pa.int64(), 1_767_571_200_000),
        (pa.string(), "2026-01-05T00:00:00.000Z"),
    ],
)
def test_every_kind_of_time_is_understood(tmp_path: Path, kind: pa.DataType, expected: object) -> None:
    moment = datetime(2026, 1, 5, tzinfo=UTC)
    values = {
        pa.int64(): 1_767_571_200_000,
        pa.string(): "2026-01-05T01:00:00+01:00",
        pa.date32(): date(2026, 1, 5),
    }
    naive = moment.replace(tzinfo=None)
    value = values.get(kind, moment if getattr(kind, "tz", None) else naive)
    (event,) = events(parquet(tmp_path, pa.table({"pickup": pa.array([value], kind), "zone": ["a"]})))
    assert event.time_us == 1_767_571_200_000_000
    assert orjson.loads(event.value)["pickup"] == expected


def test_json_lines_are_sent_as_they_are_and_a_long_file_comes_whole(tmp_path: Path) -> None:
    lines = [f'{{ "zone": "z{n % 5}",  "pickup": {1_767_571_200_000 + n} }}' for n in range(CHUNK + 100)]
    path = tmp_path / "trips.ndjson.gz"
    path.write_bytes(gzip.compress(("\n\n".join(lines) + "\n").encode()))
    found = events(path)
    assert [event.value.decode() for event in found] == lines
    assert found[7].key == b"z2"
    assert replay.numeric_columns(path) == ["pickup"]


def test_columns_of_numbers_are_known_for_poison(tmp_path: Path) -> None:
    assert replay.numeric_columns(parquet(tmp_path, TRIPS)) == ["zone", "fare"]
    (tmp_path / "a.csv").write_text("at,n,x\n2026-01-05 00:00:00,1,2.5\n")
    assert replay.numeric_columns(tmp_path / "a.csv") == ["n", "x"]


@pytest.mark.parametrize(
    ("time", "key", "words"),
    [
        ("pick", "zone", "no column 'pick' for --time; it has pickup, zone, fare"),
        ("pickup", "zon", "no column 'zon' for --key"),
        ("paid", "zone", "holds a null"),
        ("fare", "zone", "holds a null"),
        ("pickup", "note", "holds a null"),
    ],
)
def test_a_wrong_column_is_one_sentence(tmp_path: Path, time: str, key: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        events(parquet(tmp_path, TRIPS), time, key)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"), [(["yesterday"], "what is no time"), ([1.5], "of type double"), ([True], "of type bool")]
)
def test_a_time_that_is_none_is_one_sentence(tmp_path: Path, values: list[object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        events(parquet(tmp_path, pa.table({"pickup": values, "zone": ["a"]})))


def test_files_that_are_not_what_their_name_says_are_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"no parquet at all")
    ragged = tmp_path / "x.csv"
    ragged.write_text("at,n\n2026-01-05 00:00:00,1\n1,2,3,4\n")
    text = tmp_path / "x.jsonl"
    text.write_text('{"pickup":"2026-01-05T00:00:00Z","zone":"a"}\n{"pickup":"2026-01-05T00:00:00Z","zone":null}\n')
    for path, words in (
        (broken, "as parquet"),
        (ragged, "as csv"),
        (text, r"x\.jsonl:2: is not an object with a zone"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            events(path, "at" if path is ragged else "pickup", "n" if path is ragged else "zone")
        assert "\n" not in str(caught.value)
    for name in ("x.txt", "x.parquet.gz", "x"):
        with pytest.raises(ValueError, match="name a .jsonl"):
            replay.file_format(tmp_path / name)


def series(folder: Path) -> Path:
    data = folder / nab.FOLDER / "data" / "realKnownCause"
    data.mkdir(parents=True)
    (data / "heat.csv").write_text("timestamp,value\n" + "".join(f"2014-01-01 00:0{n}:00,{n}.25\n" for n in range(6)))
    (data / "taxi.csv").write_text("timestamp,value\n2014-01-01 00:02:30,10844\n")
    labels = folder / nab.FOLDER / "labels" / "combined_windows.json"
    labels.parent.mkdir()
    window = ["2014-01-01 00:01:00.000000", "2014-01-01 00:03:00.000000"]
    labels.write_text(json.dumps({"realKnownCause/heat.csv": [window], "realKnownCause/taxi.csv": []}))
    return folder


def test_series_are_merged_in_time_order_with_their_labelled_windows(tmp_path: Path) -> None:
    found = [orjson.loads(event.value) for event in rows(nab.measurements(series(tmp_path)))]
    assert [fields["series"] for fields in found] == ["heat", "heat", "heat", "taxi", "heat", "heat", "heat"]
    assert [fields["anomaly"] for fields in found] == [False, True, True, False, True, False, False]
    assert found[3] == {"series": "taxi", "time": "2014-01-01T00:02:30.000Z", "value": 10844.0, "anomaly": False}
    minute_us = 60_000_000
    first, last = nab.windows_us(tmp_path)["heat"][0]
    assert (last - first, first % minute_us) == (2 * minute_us, 0)
    assert len(list(rows(nab.measurements(tmp_path, limit=2)))) == 2


def test_broken_series_and_labels_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MILLRACE_DATA"):
        nab.files(tmp_path / "nowhere")
    assert nab.files(tmp_path) == []
    series(tmp_path)
    (nab.files(tmp_path)[0]).write_text("when,what\n1,2\n")
    with pytest.raises(ValueError, match="holds no series"):
        list(nab.measurements(tmp_path))
    (tmp_path / nab.FOLDER / "labels" / "combined_windows.json").write_text("[]")
    with pytest.raises(ValueError, match="no labelled windows"):
        list(nab.measurements(tmp_path))
