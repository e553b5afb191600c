"""The files of streams that run in one home: none overwrites or hides another, and one of them can be addressed."""

import json
import os
import time

import pytest

from streaming import report as report_module
from streaming.report import SILENT_S, Report, ScaleError, read_views, scale


def row(epoch=1, metrics="127.0.0.1:1"):
    return {"epoch": epoch, "metrics": metrics, "lag": 0}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes jobs, each of a process of its own."""
    pids = iter(range(100, 200))

    def make(*views, workers=1):
        pid = next(pids)
        monkeypatch.setattr(report_module.os, "getpid", lambda: pid)
        made = Report(tmp_path, views)
        made.begin(workers)
        return made

    return make


def age(folder, name):
    for path in folder.glob(f"*{name}*"):
        os.utime(path, (time.time() - SILENT_S - 1,) * 2)


def targets(folder):
    """What Prometheus finds under `prometheus-*.json`."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("prometheus-*.json"))]
    return sorted(target for groups in found for group in groups for target in group["targets"])


def test_jobs_side_by_side_keep_their_views_and_targets(tmp_path, job):
    one, two, shared = job("a"), job("b"), job("a")
    for _ in range(2):
        one.write([{"a": {0: row(1, "h:1"), 1: row(1, "h:1")}}])
        two.write([{"b": {0: row(1, "h:2")}}])
        shared.write([{"a": {1: row(2, "h:3")}}])
    views = read_views(tmp_path)
    assert {view: sorted(partitions) for view, partitions in views.items()} == {"a": ["0", "1"], "b": ["0"]}
    assert [views["a"][number]["metrics"] for number in ("0", "1")] == ["h:1", "h:3"], "the later owner of partition 1"
    assert targets(tmp_path) == ["h:1", "h:2", "h:3"]
    two.end()
    assert targets(tmp_path) == ["h:1", "h:3"]


def test_a_job_that_says_nothing_any_more_is_not_shown_and_the_others_remove_its_files(tmp_path, job):
    job("dead").write([{"dead": {0: row(1, "h:1")}}])
    alive = job("alive")
    age(tmp_path, "dead")
    assert read_views(tmp_path) == {}
    alive.write([{"alive": {0: row(1, "h:2")}}])
    assert list(read_views(tmp_path)) == ["alive"]
    assert targets(tmp_path) == ["h:2"]
    assert not list(tmp_path.glob("*dead*"))


def test_a_job_whose_files_were_removed_while_it_was_held_up_comes_back(tmp_path, job):
    held_up, alive = job("held_up", workers=2), job("alive")
    scale(tmp_path, 4, ["held_up"])
    assert held_up.workers() == 4
    age(tmp_path, "held_up")
    alive.write([])
    assert held_up.workers() is None
    held_up.write([{"held_up": {0: row()}}])
    assert held_up.workers() == 4
    assert "held_up" in read_views(tmp_path)


def test_scale_addresses_the_only_job_or_the_one_that_computes_the_views(tmp_path, job):
    with pytest.raises(ScaleError, match=r"No stream runs .* --workers 3"):
        scale(tmp_path, 3)
    one = job("a", "b", workers=1)
    assert one.workers() == 1
    scale(tmp_path, 3)
    assert one.workers() == 3
    two, three = job("c", workers=1), job("a", workers=1)
    with pytest.raises(ScaleError, match=r"3 streams run .*a, b.*: say which with --views"):
        scale(tmp_path, 5)
    scale(tmp_path, 5, ["c"])
    scale(tmp_path, 6, ["a"])
    scale(tmp_path, 7, ["b"])
    assert (one.workers(), two.workers(), three.workers()) == (7, 5, 6)
    with pytest.raises(ScaleError, match="No stream of a, c runs"):
        scale(tmp_path, 5, ["c", "a"])
    job("c")
    with pytest.raises(ScaleError, match="2 streams of c run .*: start and end jobs instead"):
        scale(tmp_path, 5, ["c"])
    two.end()
    one.end()
    three.end()
    scale(tmp_path, 9)
    assert (one.workers(), two.workers()) == (None, None)
