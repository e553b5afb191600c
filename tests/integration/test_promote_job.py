"""The gate as it is typed: a better version passes, a worse one and one of another split don't."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.probe.config import ProbeConfig
from models.probe.train import WEIGHTS, task
from models.registry import Registry
from models.runs import opened
from ops.configuration import load
from ops.jobs import JobError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "probe" / "tiny.yaml"
NAME = "probe-to-promote"
COMMAND = [str(ROOT / "ray_jobs" / "promote.py"), "--config", str(TINY), "--set", f"registered_name={NAME}"]


@pytest.fixture
def gate(mlflow_uri: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The job in this process: importing torch and MLflow for each run would take most of the time."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    main = runpy.run_path(COMMAND[0])["main"]

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [*COMMAND, *arguments])
        return dict(main())

    return run


def network(learnt: bool) -> nn.Module:
    """One that has learnt the sign of the sum in a few steps, or one that knows nothing."""
    torch.manual_seed(0)
    probe = task(load(ProbeConfig, TINY))
    made = probe.build()
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    for step in range(100 if learnt else 0):
        loss, count = probe.loss(made, probe.batch([(0, step * 32 + number) for number in range(32)]))
        optimizer.zero_grad()
        (loss / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made


@pytest.fixture
def registry(mlflow_uri: str, tmp_path: Path) -> Registry:
    """Version 1 knows nothing and is the champion; 2 has learnt; 3 has learnt beside another test split."""
    registry = Registry(mlflow_uri)
    with opened(mlflow_uri, NAME, "made") as run:
        for number, (learnt, split_hash) in enumerate([(False, "probe"), (True, "probe"), (True, "other")]):
            folder = tmp_path / str(number)
            folder.mkdir()
            torch.save({"network": network(learnt).state_dict()}, folder / WEIGHTS)
            registry.enter(registry.register(NAME, folder, run_id=run.id, tags={"split_hash": split_hash}))
    return registry


def test_what_is_surely_better_is_promoted_and_rolled_back(
    registry: Registry, gate: Callable[..., dict[str, Any]], mlflow_uri: str
) -> None:
    with pytest.raises(JobError, match=f"{NAME} version 3 was trained beside the test split other"):
        gate()
    with pytest.raises(JobError, match="accuracy/night: there is no such metric on this split; known: accuracy."):
        gate("--candidate", "2", "--guard", "accuracy/night=0.1")

    better = ["--candidate", "2", "--minimum-gain", "0.1", "--guard", "accuracy=0"]
    passed = subprocess.run([sys.executable, *COMMAND, *better], capture_output=True, text=True, timeout=120)
    assert passed.returncode == 0, passed.stderr
    result = json.loads(passed.stdout)
    assert (result["promoted"], result["version"], result["champion"]) == (True, 2, 1)
    assert result["low"] > 0.1
    champion = registry.resolve(NAME, "champion")
    assert (champion.version, champion.tags["champion.reason"]) == (2, result["reason"])

    back = gate("--roll-back", "--reason", "it is slow")
    assert (back["version"], registry.resolve(NAME, "champion").version) == (1, 1)

    registry.promote(NAME, 3, "by hand")
    worse = gate("--candidate", "1")
    assert not worse["promoted"]
    assert worse["reason"].endswith("which was trained beside another test split (other) and may know these samples")
    assert registry.resolve(NAME, "champion").version == 3
