"""Where the local stack lives: its ports, its paths under MILLRACE_HOME and what a shell needs to use it."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ops.environment import Environment
from ops.ports import LOOPBACK
from ops.record import Record

REPOSITORY = Path(__file__).resolve().parents[1]
EVERYWHERE = "0.0.0.0"  # noqa: S104 (only with MILLRACE_API_KEYS, see Layout.serve_host)


@dataclass(frozen=True)
class Ports:
    """The ports that a user may want to know or to change; Ray's inner ones are any that are free."""

    kafka: int = 9092
    controller: int = 9093
    ray: int = 6379
    dashboard: int = 8265
    mlflow: int = 5000
    serve: int = 8000


@dataclass(frozen=True)
class Layout:
    """One stack: everything that its parts must agree about."""

    home: Path
    ports: Ports = field(default_factory=Ports)
    external_kafka: str | None = None
    external_mlflow: str | None = None
    api_keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, environment: Environment, ports: Ports, known: Ports | None = None) -> "Layout":
        """Lay a stack out for a shell.

        An address in the environment means somebody else's service, unless it is that of this home's own stack: either
        `ports`, or `known`, where it ran last (the shell may still hold what `millrace env` printed).
        """
        own = [cls(environment.home, candidate) for candidate in (ports, known) if candidate]
        own_mlflow = [layout.mlflow for layout in own] + [replace(environment, mlflow_tracking_uri=None).tracking_uri]
        kafka, mlflow = environment.kafka_bootstrap_servers, environment.mlflow_tracking_uri
        return cls(
            environment.home,
            ports,
            external_kafka=None if kafka in [layout.kafka for layout in own] else kafka,
            external_mlflow=None if mlflow in own_mlflow else mlflow,
            api_keys=environment.api_keys,
        )

    @classmethod
    def from_record(cls, home: Path, recorded: Mapping[str, Any], api_keys: tuple[str, ...] = ()) -> "Layout":
        """Lay out the stack that was started with what `record` returned."""
        ports = Ports(**recorded["ports"])
        return cls(home, ports, recorded["external_kafka"], recorded["external_mlflow"], api_keys)

    @classmethod
    def current(cls, environment: Environment) -> "Layout":
        """Return the layout of the stack that is up in a home, else of one with the default ports."""
        record = Record.read(environment.home)
        if record.layout and record.parts:
            return cls.from_record(environment.home, record.layout, environment.api_keys)
        return cls.of(environment, Ports(), Ports(**record.layout["ports"]) if record.layout else None)

    def record(self) -> dict[str, Any]:
        """Return a JSON object with the addresses, for `from_record`."""
        return {
            "ports": asdict(self.ports),
            "external_kafka": self.external_kafka,
            "external_mlflow": self.external_mlflow,
        }

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        return self.external_kafka or f"{LOOPBACK}:{self.ports.kafka}"

    @property
    def mlflow(self) -> str:
        """MLflow's tracking address."""
        return self.external_mlflow or f"http://{LOOPBACK}:{self.ports.mlflow}"

    @property
    def dashboard(self) -> str:
        """Ray's dashboard, which is also the address of its job API."""
        return f"http://{LOOPBACK}:{self.ports.dashboard}"

    @property
    def serve(self) -> str:
        """The address of the served models."""
        return f"http://{LOOPBACK}:{self.ports.serve}"

    @property
    def serve_host(self) -> str:
        """What the HTTP server binds: loopback, unless keys protect it."""
        return EVERYWHERE if self.api_keys else LOOPBACK

    @property
    def token_file(self) -> Path:
        """Ray's token, readable by its owner only."""
        return self.home / "ray-token"

    @property
    def stream(self) -> Path:
        """Where streams say every second how they are."""
        return self.home / "stream"

    def log(self, part: str) -> Path:
        """The log file of a part."""
        return self.home / "logs" / f"{part}.log"

    def variables(self) -> dict[str, str]:
        """Return what jobs, scripts and Ray's own commands need in their environment.

        The dashboard goes into RAY_API_SERVER_ADDRESS, which only the job and state commands read: an http address in
        RAY_ADDRESS would break `ray.init()` in scripts that are run by hand.
        """
        return {
            "MILLRACE_HOME": str(self.home),
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def shell(self) -> str:
        """Return the lines for `eval "$(millrace env)"`, in a syntax that sh, bash and zsh share."""
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.variables().items()]
        binaries = shlex.quote(str(binaries_folder()))
        path = f'case ":$PATH:" in *:{binaries}:*) ;; *) export PATH={binaries}:"$PATH" ;; esac'
        return "\n".join([*exports, "unset RAY_ADDRESS RAY_AUTH_TOKEN", path])


def binaries_folder() -> Path:
    """Return the folder with `python`, `ray`, `feast` and `mlflow` of this environment."""
    return Path(sys.executable).parent
