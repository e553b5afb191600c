"""What the doctor finds, and what it tells to do about it."""

import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ops import doctor, jars
from ops.environment import Environment
from ops.ports import LOOPBACK
from ops.record import Record


def environment(home: Path, **variables: str) -> Environment:
    return Environment.read({"MILLRACE_HOME": str(home)} | variables)


@pytest.mark.parametrize(("version", "ok"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)])
def test_python(version: tuple[int, int], ok: bool) -> None:
    finding = doctor.python(version)
    assert finding.ok is ok
    assert "make" in finding.remedy


def test_packages_are_compared_with_the_pins(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"# pinned\nPyYAML=={metadata.version('pyyaml')}\n")
    assert doctor.packages(pins).ok
    pins.write_text("pyyaml==0.0.1\nno-such-thing==1.0\n")
    finding = doctor.packages(pins)
    assert finding.line().startswith("missing   packages  0 of 2 as pinned: pyyaml ")
    assert "no-such-thing absent (not 1.0)" in finding.detail
    assert finding.remedy == "run `make setup`"
    assert not doctor.packages(tmp_path / "nowhere").ok


def test_jars_are_counted(tmp_path: Path) -> None:
    finding = doctor.cached_jars(tmp_path)
    assert finding.detail == f"0 of 46 in {tmp_path}"
    assert "python -m ops.jars" in finding.remedy
    for jar in jars.read_list():
        (tmp_path / jar.file_name).touch()
    assert doctor.cached_jars(tmp_path).ok


def test_a_taken_port_is_named_with_its_option(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        taken = server.getsockname()[1]
        record = Record.read(home)
        monkeypatch.setattr(doctor, "is_free", lambda port: port != 5000)
        (finding,) = doctor.ports(environment(home))
        assert finding.line().startswith("missing   port      5000 (mlflow) is taken by ")
        assert "--mlflow-port" in finding.remedy
        assert taken != 5000
    external = environment(home, MLFLOW_TRACKING_URI="http://elsewhere")
    assert [finding.ok for finding in doctor.ports(external)] == [True]
    record.put("kafka", {})


def test_disk_and_memory_have_limits(tmp_path: Path) -> None:
    assert "GiB free" in doctor.disk(tmp_path / "not" / "yet").detail
    assert doctor.memory(5 * 2**30).ok
    assert not doctor.memory(3 * 2**30).ok


def test_the_data_folder_is_optional_but_not_wrong(tmp_path: Path) -> None:
    absent = doctor.data(None)
    assert not absent.needed
    assert absent.line().startswith("optional  data")
    wrong = doctor.data(tmp_path / "nowhere")
    assert wrong.needed
    assert not wrong.ok
    assert doctor.data(tmp_path).ok


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
def test_the_exit_code_says_whether_something_needed_is_missing(
    home: Path, needed: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [doctor.Finding("a", True, "there"), doctor.Finding("b", False, "gone", "get it", needed)]
    monkeypatch.setattr(doctor, "examine", lambda _: iter(findings))
    assert doctor.main(environment(home)) == code
    assert "b         gone; get it" in capsys.readouterr().out


def test_this_interpreter_has_its_java_and_its_speech() -> None:
    assert doctor.java().ok
    assert doctor.speech().ok
    assert doctor.python(sys.version_info[:2]).ok
