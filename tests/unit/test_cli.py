"""The command line: what is understood, what is refused, and with which exit code."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from ops import cli
from ops.layout import Layout, Ports
from ops.record import Record


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["upp"], "invalid choice"),
        (["up", "--kafka-port", "http"], "a port is a number from 1024 to 65535, not 'http'"),
        (["up", "--serve-port", "80"], "a port is a number from 1024 to 65535, not '80'"),
        (["down", "--force"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(words)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for command in ("up", "down", "status", "env", "doctor", "submit", "simulate", "demo"):
        assert f"\n    {command} " in shown


def test_down_without_a_stack_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["down"]) == 0
    assert f"nothing was ever started in {home}" in capsys.readouterr().out
    assert list(home.iterdir()) == []
    Record.read(home).begin(Layout(home).record())
    assert cli.main(["down"]) == 0
    assert f"nothing is up in {home}" in capsys.readouterr().out


def test_status_without_a_stack_shows_every_part_as_down(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, "down"] for name in ("kafka", "ray", "mlflow", "features", "serve", "stream")
    ]


def test_status_shows_the_lag_that_the_stream_worker_reported(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Layout(home).stream
    folder.mkdir(parents=True)
    figures = {"lag": 5, "processed": 100, "dead": 2, "late": 1, "offset": 103, "end": 108}
    views = {"editor_activity": {"10": figures, "2": figures}}
    (folder / "status-one.json").write_text(json.dumps({"views": views}))
    (folder / "status-other.json").write_text(json.dumps({"views": {"other": {"0": figures}}}))
    (folder / "status-gone.json").write_text(json.dumps({"views": {"gone": {"0": figures}}}))
    os.utime(folder / "status-gone.json", (0, 0))
    cli.main(["status"])
    shown = capsys.readouterr().out
    assert "editor_activity partition 10: lag 5, processed 100, dead 2, late 1" in shown
    assert shown.index("partition 2:") < shown.index("partition 10:")
    assert "other partition 0" in shown
    assert "gone" not in shown


def test_env_is_evaluated_by_a_shell(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record.read(home)
    record.begin(Layout(home, Ports(kafka=19092)).record())
    record.put("kafka", {})
    assert cli.main(["env"]) == 0
    script = f'eval "{"$1"}"; echo "$MILLRACE_HOME $KAFKA_BOOTSTRAP_SERVERS $RAY_AUTH_MODE"'
    lines = capsys.readouterr().out
    done = subprocess.run(["bash", "-c", script, "bash", lines], capture_output=True, text=True, check=True)
    assert done.stdout == f"{home} 127.0.0.1:19092 token\n"


def test_a_damaged_record_is_one_line_and_exit_code_2(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "stack.json").write_text("{")
    assert cli.main(["status"]) == 2
    assert capsys.readouterr().err.startswith("millrace: ")


def test_submit_hands_every_word_to_rays_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    binaries = tmp_path / "bin"  # a `ray` that shows what it was given: the real one needs a cluster
    binaries.mkdir()
    (binaries / "ray").write_text('#!/bin/sh\nprintf "<%s>" "$@"\nprintf "%s" "$RAY_API_SERVER_ADDRESS"\nexit 3\n')
    (binaries / "ray").chmod(0o755)
    monkeypatch.setattr(cli, "binaries_folder", lambda: binaries)
    assert cli.main(["submit", "--no-wait", "--", "python", "a b.py", "--set", "x=1"]) == 3
    shown = capfd.readouterr().out
    assert shown == "<job><submit><--no-wait><--><python><a b.py><--set><x=1>http://127.0.0.1:8265"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
