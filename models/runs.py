"""MLflow runs: what was trained on which data by which code, and a restart goes on with the same run."""

import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

PACKAGES = ("torch", "transformers", "scikit-learn", "ray", "feast", "mlflow", "numpy")
SQLITE = "sqlite:///"
STATE = "run.json"


class RunError(ValueError):
    """A training run that can't be started or gone on with, in one sentence."""


class Run:
    """One MLflow run, open for writing; the id is all that another process needs to write to it too."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.id = run_id
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._logged: dict[str, int] = {}

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters; one that the run already has keeps its first value."""
        known = self._client.get_run(self.id).data.params
        fresh = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
        self._client.log_batch(self.id, params=fresh[:100])
        for start in range(100, len(fresh), 100):
            self._client.log_batch(self.id, params=fresh[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log finite metrics at a step; steps that a run before a restart has logged are not logged twice."""
        now_ms = time.time_ns() // 1_000_000
        fresh = [
            Metric(name, float(value), now_ms, step)
            for name, value in metrics.items()
            if math.isfinite(value) and step > self._last_step(name)
        ]
        if fresh:
            self._client.log_batch(self.id, metrics=fresh)
            self._logged |= {metric.key: step for metric in fresh}

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as an artifact of the run."""
        self._client.log_artifact(self.id, str(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, over what they were before."""
        for key, value in tags.items():
            self._client.set_tag(self.id, key, value)

    def _last_step(self, name: str) -> int:
        if name not in self._logged:
            history = self._client.get_metric_history(self.id, name)
            self._logged[name] = max((metric.step for metric in history), default=-1)
        return self._logged[name]


def start(tracking_uri: str, experiment: str, name: str) -> Run:
    """Start a run with the tags that say by which code it is made, and leave it open.

    With a sqlite URI the artifacts lie in `artifacts/` beside the database, not in the working folder.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    run = client.create_run(_experiment(client, tracking_uri, experiment), run_name=name, tags=provenance())
    return Run(tracking_uri, str(run.info.run_id))


@contextmanager
def opened(tracking_uri: str, experiment: str, name: str, run_id: str | None = None) -> Iterator[Run]:
    """A run that ends as FINISHED or, by an exception, as FAILED; with a run id that run goes on."""
    client = MlflowClient(tracking_uri=tracking_uri)
    run = Run(tracking_uri, run_id) if run_id and _exists(client, run_id) else start(tracking_uri, experiment, name)
    client.update_run(run.id, status="RUNNING")
    try:
        yield run
    except BaseException:
        client.set_terminated(run.id, status="FAILED")
        raise
    client.set_terminated(run.id, status="FINISHED")


@dataclass(frozen=True)
class Claim:
    """The folder of one training run, held by this process; `run_id` is that of the part before, if there was one."""

    name: str
    folder: Path
    config_hash: str
    run_id: str | None

    def remember(self, run_id: str, *, finished: bool) -> None:
        """Note the MLflow run, and whether the training has ended well."""
        state = {"config_hash": self.config_hash, "run_id": run_id, "finished": finished}
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps(state), encoding="utf-8")
        os.replace(partial, self.folder / STATE)


@contextmanager
def claimed(root: Path, name: str, config_hash: str) -> Iterator[Claim]:
    """Hold the folder `<root>/<name>` of a training run, to go on where it stopped.

    A name whose run is finished is not reused: the next free one of `<name>-2`, `<name>-3`, ... is taken.

    Raises:
        RunError: another process trains under the name, or it stopped with another configuration.
    """
    number = 1
    while True:
        chosen = name if number == 1 else f"{name}-{number}"
        folder = root / chosen
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"Run {chosen} is being trained by another process; set another train.name.") from None
            state = _state(folder)
            if state.get("finished"):
                number += 1
                continue
            if state and state["config_hash"] != config_hash:
                raise RunError(
                    f"Run {chosen} stopped with another configuration or other data; set another train.name, or remove "
                    f"{folder}."
                )
            yield Claim(chosen, folder, config_hash, state.get("run_id"))
            return


def provenance() -> dict[str, str]:
    """The revision of this repository and the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version(), "git.revision": _revision()}
    for package in PACKAGES:
        try:
            found[f"package.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    location = None
    if tracking_uri.startswith(SQLITE):
        location = (Path(tracking_uri.removeprefix(SQLITE)).absolute().parent / "artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if (made_meanwhile := client.get_experiment_by_name(name)) is None:
            raise
        return str(made_meanwhile.experiment_id)


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        client.get_run(run_id)
    except MlflowException:
        return False
    return True


def _revision() -> str:
    if (git := shutil.which("git")) is None:
        return "unknown"
    try:
        answer = subprocess.run(
            [git, "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def _state(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys, as `--set` and MLflow's parameters name them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
