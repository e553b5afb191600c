"""The parts of the local stack that are not Ray's: the broker, the MLflow server, the features' registry."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import httpx

from ops.broker import STOP_S, Broker, answers
from ops.layout import REPOSITORY, Layout, binaries_folder
from ops.ports import LOOPBACK, holder, is_free
from ops.process import DetachedProcess, tail

Handle = Mapping[str, object]
"""What a part needs to find again what it started: a JSON object in stack.json."""

APPLY_S = 120.0
ANSWER_S = 3.0
MLFLOW_ENVIRON = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that we never ask for anything
    "OMP_NUM_THREADS": "1",
}


class PartError(ValueError):
    """A part of the stack cannot be started."""


class Part(Protocol):
    """One service of the stack. Only `handle` carries state from one command to the next."""

    name: str
    address: str
    ready_s: float
    external: bool

    @property
    def port(self) -> int | None:
        """The port it listens on, if it does."""
        ...

    @property
    def log(self) -> Path | None:
        """Where its output goes, if it is ours."""
        ...

    def launch(self) -> Handle:
        """Start it, in seconds; what it returns is recorded before anything waits for the part."""
        ...

    def ready(self, handle: Handle) -> bool:
        """Whether it serves; never raises because of a service that is away."""
        ...

    def ended(self, handle: Handle) -> str | None:
        """Why it will never get ready, or None while it may."""
        ...

    def pid(self, handle: Handle) -> int | None:
        """Return the process to look at, while there is one."""
        ...

    def stop(self, handle: Handle) -> None:
        """End what `launch` started, if it still runs; returns when it is gone."""
        ...


class External:
    """Somebody else's service, named by the environment: never started, never ended."""

    log: Path | None = None
    port: int | None = None
    ready_s = 15.0
    external = True

    def __init__(self, name: str, address: str, variable: str) -> None:
        self.name = name
        self.address = address
        self.variable = variable

    def launch(self) -> Handle:
        """Check that it is there at all."""
        if not self.ready({}):
            raise PartError(f"{self.variable}={self.address} does not answer; correct or unset the variable")
        return {}

    def ready(self, handle: Handle) -> bool:
        """Whether a broker answers; other services are only asked by their users."""
        return self.name != "kafka" or answers(self.address)

    def ended(self, handle: Handle) -> str | None:
        """Return None: it is not ours to watch."""

    def pid(self, handle: Handle) -> int | None:
        """Return None: it may be on another machine."""

    def stop(self, handle: Handle) -> None:
        """Leave it alone."""


class Kafka:
    """The broker."""

    name = "kafka"
    ready_s = 60.0
    external = False

    def __init__(self, layout: Layout) -> None:
        self.port = layout.ports.kafka
        self.log = layout.log(self.name)
        self.address = layout.kafka
        self._broker = Broker(layout.home / "kafka", layout.log(self.name), layout.ports.kafka, layout.ports.controller)

    def launch(self) -> Handle:
        """Start the broker."""
        return self._broker.launch().record()

    def ready(self, handle: Handle) -> bool:
        """Whether the broker that we started answers a client."""
        return DetachedProcess.from_record(handle).alive() and self._broker.health()

    def ended(self, handle: Handle) -> str | None:
        """Say that the JVM has ended, with the end of its log."""
        return process_ended(handle, self.log)

    def pid(self, handle: Handle) -> int | None:
        """Return the pid while the process runs."""
        return process_id(handle)

    def stop(self, handle: Handle) -> None:
        """End the JVM after it has flushed."""
        DetachedProcess.from_record(handle).stop(STOP_S)


class Mlflow:
    """The MLflow server on sqlite, its artifacts proxied from a folder."""

    name = "mlflow"
    ready_s = 240.0
    external = False

    def __init__(self, layout: Layout) -> None:
        self.port = layout.ports.mlflow
        self.log = layout.log(self.name)
        self.address = layout.mlflow
        self._folder = layout.home / "mlflow"
        self._client = httpx.Client(base_url=self.address, timeout=ANSWER_S, trust_env=False)

    def launch(self) -> Handle:
        """Start the server; it creates or migrates its database itself."""
        require_free(self.name, self.port)
        (self._folder / "artifacts").mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = [binaries_folder() / "mlflow", "server"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", self._folder / "artifacts"]
        command += ["--host", LOOPBACK, "--port", str(self.port), "--workers", "1"]
        command += ["--allowed-hosts", "127.0.0.1:*,localhost:*"]
        return DetachedProcess.start(command, self.log, cwd=self._folder, environ=MLFLOW_ENVIRON).record()

    def ready(self, handle: Handle) -> bool:
        """Whether the server that we started says that it is healthy."""
        return DetachedProcess.from_record(handle).alive() and answers_http(self._client, "/health")

    def ended(self, handle: Handle) -> str | None:
        """Say that the server has ended, with the end of its log."""
        return process_ended(handle, self.log)

    def pid(self, handle: Handle) -> int | None:
        """Return the pid while the process runs."""
        return process_id(handle)

    def stop(self, handle: Handle) -> None:
        """End the server and its workers."""
        DetachedProcess.from_record(handle).stop()


class Features:
    """`feast apply`: the declarations of feature_repo/ in the registry under MILLRACE_HOME."""

    name = "features"
    port: int | None = None
    ready_s = 5.0
    external = False

    def __init__(self, layout: Layout) -> None:
        self.log = layout.log(self.name)
        self._layout = layout
        self._registry = layout.home / "features" / "registry.db"
        self.address = str(self._registry)

    def launch(self) -> Handle:
        """Run `feast apply` to its end."""
        self._registry.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            try:
                done = subprocess.run(
                    [binaries_folder() / "feast", "--chdir", REPOSITORY / "feature_repo", "apply"],
                    env=os.environ | self._layout.variables(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=APPLY_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise PartError(f"feast apply does not end within {APPLY_S:.0f} s; the log is {self.log}") from None
        if done.returncode != 0:
            raise PartError(f"feast apply failed; the end of {self.log}:\n{tail(self.log)}")
        return {}

    def ready(self, handle: Handle) -> bool:
        """Whether there is a registry."""
        return self._registry.is_file()

    def ended(self, handle: Handle) -> str | None:
        """Return None: nothing runs."""

    def pid(self, handle: Handle) -> int | None:
        """Return None: nothing runs."""

    def stop(self, handle: Handle) -> None:
        """Keep the registry: it is state, as the broker's data is."""


def require_free(name: str, port: int | None) -> None:
    """Raise a sentence if somebody else holds the port of a part."""
    if port is not None and not is_free(port):
        raise PartError(
            f"port {port} of {name} is taken by {holder(port)}; end that or choose another port "
            f"(millrace up --{name}-port N)"
        )


def process_ended(handle: Handle, log: Path) -> str | None:
    """Say that the process of a handle has ended, with the end of its log; None while it runs."""
    if DetachedProcess.from_record(handle).alive():
        return None
    return f"it ended; the end of {log}:\n{tail(log)}"


def process_id(handle: Handle) -> int | None:
    """Return the pid of a handle while its process runs."""
    process = DetachedProcess.from_record(handle)
    return process.pid if process.alive() else None


def answers_http(client: httpx.Client, path: str) -> bool:
    """Whether `GET path` gives a 2xx."""
    try:
        return client.get(path).is_success
    except httpx.HTTPError:
        return False
