"""Real and generated edits have one schema, come in time order, and bad files are refused in a sentence."""

import gzip
from collections import Counter
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import orjson
import pytest

from streaming.producing.columns import rows
from streaming.simulators import editors, wikipedia
from streaming.simulators.replay import EPOCH, MICROSECOND

REAL_FIELDS = {
    "seq": int,
    "time": str,
    "channel": str,
    "page": str,
    "user": str,
    "namespace": str,
    "isAnonymous": bool,
    "isRobot": bool,
    "isNew": bool,
    "isMinor": bool,
    "isUnpatrolled": bool,
    "country": str | None,
    "delta": int,
    "added": int,
    "deleted": int,
}


def test_generated_edits_are_one_day_in_order_with_the_schema_of_the_real_ones() -> None:
    events = list(rows(editors.edits(3000, seed=3)))
    assert len(events) == 3000
    times = [event.time_us for event in events]
    assert times == sorted(set(times))
    assert times[-1] - times[0] < 24 * 3600 * 1_000_000
    for event in events:
        fields = orjson.loads(event.value)
        assert list(fields) == list(REAL_FIELDS)
        assert all(isinstance(fields[name], kind) for name, kind in REAL_FIELDS.items())
        assert fields["user"].encode() == event.key
        assert fields["delta"] == fields["added"] - fields["deleted"]
        moment = datetime.fromisoformat(fields["time"])
        assert (moment - EPOCH) // MICROSECOND == event.time_us


def test_the_seed_decides_the_edits() -> None:
    one, again, other = (list(rows(editors.edits(500, seed=seed))) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_bytes_of_a_seed_stay_those_that_were_published() -> None:
    digest = sha256()
    for event in rows(editors.edits(2000, seed=3)):
        digest.update(event.key + event.value)
    assert digest.hexdigest() == "a92332694725541fe52e844896bf2572d9ed65abfcdbab7ba29aa5145ef7a9eb"


def test_keys_are_skewed_and_robots_busy_and_steady_of_size() -> None:
    edits = [orjson.loads(event.value) for event in rows(editors.edits(20_000))]
    by_user = Counter(row["user"] for row in edits)
    assert len(by_user) > 2000
    assert by_user.most_common(1)[0][1] > 0.08 * len(edits)
    robots = {row["user"] for row in edits if row["isRobot"]}
    assert not robots & {row["user"] for row in edits if not row["isRobot"]}
    assert 0.02 < len(robots) / len(by_user) < 0.15
    assert 0.2 < sum(row["isRobot"] for row in edits) / len(edits) < 0.6
    deleting = {robot: [row["deleted"] > 0 for row in edits if row["isRobot"] is robot] for robot in (True, False)}
    assert sum(deleting[True]) / len(deleting[True]) < 0.3 * sum(deleting[False]) / len(deleting[False])


def write(path: Path, *lines: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines)))
    return path


def test_a_file_is_read_in_time_order_with_its_own_lines(tmp_path: Path) -> None:
    second = b'{"time":"2015-09-12T00:00:02Z","user":"b"}'
    first = b'{"time":"2015-09-12T01:00:01+01:00","user":"\xc3\xa4"}'
    path = write(tmp_path / wikipedia.FOLDER / "wikipedia_edits_2015-09-12.jsonl.gz", second, first)
    assert wikipedia.files(tmp_path) == [path]
    events = list(rows(wikipedia.edits(path)))
    assert [event.value for event in events] == [first, second]
    assert [event.key for event in events] == ["ä".encode(), b"b"]
    assert events[1].time_us - events[0].time_us == 1_000_000


@pytest.mark.parametrize("line", [b"not json", b"[]", b'{"user":"a"}', b'{"time":"2015-09-12T00:00:02","user":"a"}'])
def test_a_line_that_is_no_edit_is_named(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "edits.jsonl.gz", b'{"time":"2015-09-12T00:00:02Z","user":"b"}', line)
    with pytest.raises(ValueError, match=r"edits\.jsonl\.gz:2: is not an edit"):
        list(wikipedia.edits(path))


def test_a_broken_file_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 5000)[:-20])
    with pytest.raises(ValueError, match="can't be read as gzip"):
        list(wikipedia.edits(path))
    with pytest.raises(ValueError, match="MILLRACE_DATA"):
        wikipedia.files(tmp_path / "nowhere")
    assert wikipedia.files(tmp_path) == []
