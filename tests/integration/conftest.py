"""Fixtures over real services: a Kafka broker and a local Ray a session, MLflow on sqlite, an applied Feast repo."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.broker import Broker
from ops.jobs import start_ray
from ops.ports import free_ports

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of a real broker on a free port, which no other module writes to; it ends with the module."""
    folder = tmp_path_factory.mktemp("kafka")
    port, controller_port = free_ports(2)
    broker = Broker(folder / "data", log=folder / "kafka.log", port=port, controller_port=controller_port)
    broker.start()
    yield broker.bootstrap_servers
    broker.stop()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Ray on this machine with 6 logical CPUs; its folder is short because Ray's socket paths must be."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # noqa: S108 (a socket path holds 107 characters)
    start_ray(num_cpus=6, folder=folder)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without a run, made once because its migrations take long."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    database = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").create_experiment("millrace", artifact_location=(folder / "runs").as_uri())
    return database


@pytest.fixture(scope="module")
def mlflow_uri(migrated_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite tracking address of the module's own, so that no test sees the models that another one registered."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copy(migrated_mlflow, database)
    return f"sqlite:///{database}"


@pytest.fixture
def repo(home: Path) -> Path:
    """A copy of feature_repo, applied by Feast's own command to the registry under `home`."""
    folder = home.parent / "feature_repo"
    shutil.copytree(ROOT / "feature_repo", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (home / "features").mkdir()
    feast = Path(sys.executable).with_name("feast")
    subprocess.run([feast, "--chdir", folder, "apply"], check=True, env=os.environ | {"FEAST_USAGE": "False"})
    return folder
