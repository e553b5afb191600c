"""Fixtures of the unit tests of workers.

Feast is imported by those who need it: pytest's own process, which loads this file, would pass the environment that
Feast leaves behind on to the processes that run the tests, and Prometheus' counters would count in files there.
"""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Feast repository in which the view is applied, to copy."""
    from tests.worker_world import apply

    return apply(tmp_path_factory.mktemp("applied"))


@pytest.fixture
def undisturbed(tmp_path, applied):
    """A world after a run in which nothing went wrong, the steps of that run, and its status at the end."""
    from tests.worker_world import Steps, World, finish

    world = World(tmp_path / "undisturbed", applied)
    steps = Steps()
    worker = world.worker(steps)
    status = finish(worker)
    return world, steps, status
