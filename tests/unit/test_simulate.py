"""`millrace simulate` refuses what it can't do in one sentence and exit code 2, before it sends anything."""

import gzip
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from ops import simulate
from ops.environment import Environment
from ops.ports import free_ports
from streaming.events import MEASUREMENTS
from streaming.producing.columns import Event, rows
from streaming.simulators import nab, wikipedia
from streaming.simulators.arrival import Faults, Kind, disturb
from streaming.simulators.patterns import START
from streaming.simulators.sources import SOURCES


def environment(data: Path | None = None) -> Environment:
    return Environment(None, None, Path("/nonexistent"), data, ())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wikipedia", "--limit", "0"], "--limit is 0"),
        (["wikipedia", "--poison", "2"], "--poison is 2.0"),
        (["wikipedia", "--late", "0.9", "--disorder", "0.9"], "exceed 1 together"),
        (["wikipedia", "--late", "0.1", "--late-by", "-1"], "--late-by is -1.0"),
        (["wikipedia", "--pattern", "bursts"], "--pattern does not apply to wikipedia"),
        (["scans", "--file", "x.csv"], "--file does not apply to scans"),
        (["scans", "--events-per-second", "0"], "--events-per-second is 0.0"),
        (["scans", "--entities", "0"], "--entities is 0"),
        (["scans", "--skew", "-1"], "--skew is -1.0"),
        (["scans", "--start", "soon"], "--start is soon"),
        (["replay", "--file", "x.csv"], "replay needs --topic, --time, --key"),
        (["replay", "--file", "x.txt", "--topic", "t", "--time", "a", "--key", "b"], "name a .jsonl or .csv file"),
        (["replay", "--file", "none.csv", "--topic", "t", "--time", "a", "--key", "b"], "no such file"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(arguments, environment()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert output.err.count("\n") == 1


def test_a_missing_data_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["wikipedia"], environment(tmp_path / "nowhere")) == 2
    assert "no such data folder" in capsys.readouterr().err


def test_an_unreachable_broker_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.topics.CONNECT_MS", 300)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert simulate.main(["wikipedia", "--limit", "5", "--bootstrap-servers", address], environment()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert address in last
    assert "millrace up" in last


def stream(*words: str, data: Path | None = None) -> tuple[str, list[Event]]:
    found = simulate._stream(simulate._parser().parse_args(words), environment(data))
    return found.source, list(rows(found.events))


def test_real_edits_are_used_where_they_are_and_else_the_generator(tmp_path: Path) -> None:
    source, events = stream("wikipedia", "--limit", "7", data=tmp_path)
    assert (source, len(events)) == ("generated", 7)
    path = tmp_path / wikipedia.FOLDER / "wikipedia_edits_2015-09-12.jsonl.gz"
    path.parent.mkdir()
    lines = [f'{{"time":"2015-09-12T00:00:0{second}Z","user":"a"}}\n' for second in range(5)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    source, events = stream("wikipedia", "--limit", "3", data=tmp_path)
    assert (source, [event.value.decode() + "\n" for event in events]) == ("real", lines[:3])
    assert stream("edits", "--limit", "3", data=tmp_path)[0] == "generated"


def test_real_series_are_used_where_they_are_and_else_the_generator(tmp_path: Path) -> None:
    source, events = stream("nab", "--limit", "4", data=tmp_path)
    assert source == "generated"
    assert [set(orjson.loads(event.value)) for event in events] == [set(MEASUREMENTS.fields)] * 4
    folder = tmp_path / nab.FOLDER
    (folder / "data" / "real").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "data" / "real" / "heat.csv").write_text("timestamp,value\n2014-01-01 00:00:00,1.5\n")
    (folder / "labels" / "combined_windows.json").write_text("{}")
    source, events = stream("nab", data=tmp_path)
    assert (source, [event.key for event in events]) == ("real", [b"heat"])


@pytest.mark.parametrize("name", [*SOURCES, "predictions"])
def test_a_generated_stream_has_the_shape_that_is_asked_for(name: str) -> None:
    words = ["--limit", "500", "--entities", "3", "--start", "2030-02-03T04:05:06Z", "--events-per-second", "1000"]
    source, events = stream(name, *words, "--pattern", "steady", "--skew", "0")
    assert source == "generated"
    times = [event.time_us for event in events][:100]
    assert times[0] == pytest.approx(datetime(2030, 2, 3, 4, 5, 6, tzinfo=UTC).timestamp() * 1e6, abs=2000)
    field = "entity" if name == "predictions" else SOURCES[name].topic.key
    assert len({orjson.loads(event.value).get(field) for event in events} - {None}) == 3


def test_now_is_a_start() -> None:
    before = datetime.now(UTC)
    moment = simulate._start("now")
    assert before <= moment <= datetime.now(UTC)
    assert simulate._start("2026-01-05") == START


def test_a_file_is_replayed_and_poisoned_by_its_own_fields(tmp_path: Path) -> None:
    path = tmp_path / "trips.jsonl"
    path.write_text('{"at":"2026-01-05T00:00:00Z","zone":"a","fare":2.5,"note":"x"}\n' * 50)
    words = ["replay", "--file", str(path), "--topic", "trips", "--time", "at", "--key", "zone", "--poison", "0.5"]
    found = simulate._stream(simulate._parser().parse_args(words), environment())
    assert [topic.name for topic in found.topics] == ["trips"]
    arrivals = [row for chunk in disturb(found.events, Faults(poison=0.5), found.topics) for row in chunk.rows()]
    assert sum(kind is Kind.EVENT for _, kind, _ in arrivals) == 50
    poison = [event.value for _, kind, event in arrivals if kind is Kind.POISON]
    assert any(b'"fare":"plenty"' in value for value in poison)
    assert any(b'"at":"2999' in value for value in poison)


def test_help_names_every_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate.main(["--help"], environment())
    text = capsys.readouterr().out
    assert all(name in text for name in simulate.STREAMS)
