"""Fixtures of every tier: tests never see the Millrace, Ray, Kafka or MLflow of the shell they run in."""

import os
from collections.abc import Iterator
from pathlib import Path

import prometheus_client.values  # noqa: F401 (before Feast, as in serving/__init__.py)
import pytest

import streaming  # noqa: F401 (the same)

OURS = ("MILLRACE_", "RAY_", "KAFKA_BOOTSTRAP_SERVERS", "MLFLOW_TRACKING_URI")
KEPT = ("MILLRACE_DATA",)


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """Remove the addresses and tokens of an outer stack, so that no test reaches it; MILLRACE_DATA stays."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(OURS) and name not in KEPT:
                patch.delenv(name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        yield


@pytest.fixture(autouse=True)
def _environment_of_one_test() -> Iterator[None]:
    """Put the variables back that a job's `main`, called in this process, exported for its children."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh MILLRACE_HOME, exported to the environment for the time of one test."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("MILLRACE_HOME", str(folder))
    return folder
