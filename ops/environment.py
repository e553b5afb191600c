"""The environment variables that Millrace reads, read once at an entry point."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOME = ".millrace"


@dataclass(frozen=True)
class Environment:
    """What the shell says; everything else comes from configuration files and arguments."""

    kafka_bootstrap_servers: str | None
    mlflow_tracking_uri: str | None
    home: Path
    data: Path | None
    api_keys: tuple[str, ...]

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Environment":
        """Read the variables; an empty one counts as not set, and both folders become absolute."""

        def value(name: str) -> str | None:
            return environ.get(name, "").strip() or None

        data = value("MILLRACE_DATA")
        keys = (key.strip() for key in (value("MILLRACE_API_KEYS") or "").split(","))
        return cls(
            kafka_bootstrap_servers=value("KAFKA_BOOTSTRAP_SERVERS"),
            mlflow_tracking_uri=value("MLFLOW_TRACKING_URI"),
            home=Path(value("MILLRACE_HOME") or DEFAULT_HOME).expanduser().absolute(),
            data=Path(data).expanduser().absolute() if data else None,
            api_keys=tuple(key for key in keys if key),
        )

    @property
    def tracking_uri(self) -> str:
        """MLflow's address: the one that is set, else the sqlite file under the home that the stack's server uses."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"

    def export(self) -> None:
        """Give child processes, Feast and MLflow the same values."""
        (self.home / "mlflow").mkdir(parents=True, exist_ok=True)
        os.environ["MILLRACE_HOME"] = str(self.home)
        os.environ["MLFLOW_TRACKING_URI"] = self.tracking_uri
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        if self.kafka_bootstrap_servers:
            os.environ["KAFKA_BOOTSTRAP_SERVERS"] = self.kafka_bootstrap_servers
