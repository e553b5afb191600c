"""`millrace simulate` refuses what it can't do in one sentence and exit code 2, before it sends anything."""

import gzip
from pathlib import Path

import pytest

from ops import simulate
from ops.environment import Environment
from ops.ports import free_ports
from streaming.simulators import wikipedia


def environment(data: Path | None = None) -> Environment:
    return Environment(None, None, Path("/nonexistent"), data, ())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--poison", "2"], "--poison is 2.0"),
        (["--late", "0.9", "--disorder", "0.9"], "exceed 1 together"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["wikipedia", *arguments], environment()) == 2
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
    monkeypatch.setattr("streaming.simulators.produce.CONNECT_S", 0.3)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert simulate.main(["wikipedia", "--limit", "5", "--bootstrap-servers", address], environment()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert address in last
    assert "millrace up" in last


def test_real_edits_are_used_where_they_are_and_else_the_generator(tmp_path: Path) -> None:
    source, events = simulate._events(environment(tmp_path), limit=7, seed=0)
    assert (source, len(list(events))) == ("generated", 7)
    path = tmp_path / wikipedia.FOLDER / "wikipedia_edits_2015-09-12.jsonl.gz"
    path.parent.mkdir()
    lines = [f'{{"time":"2015-09-12T00:00:0{second}Z","user":"a"}}\n' for second in range(5)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    source, events = simulate._events(environment(tmp_path), limit=3, seed=0)
    assert (source, [event.value.decode() + "\n" for event in events]) == ("real", lines[:3])
