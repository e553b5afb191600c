"""Settings of the serving application: the `args` of serve.yaml, with a default for each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

REPOSITORY = Path(__file__).resolve().parents[1]


class SettingsError(ValueError):
    """Arguments of the application that cannot be used."""


class Section(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BatchSettings(Section):
    """How one kind of model is batched."""

    max_batch_size: int = Field(ge=1, description="rows (tabular) or pieces of audio (whisper) a model call")
    max_queue: int = Field(ge=1, description="requests that may wait; the next one gets 429")


class FeatureSettings(Section):
    """Where features come from and when one is too old."""

    repo: Path = REPOSITORY / "feature_repo"
    clock: Literal["stream", "wall"] = Field(
        default="stream",
        description="what a feature's age is measured against: its view's newest event (right for replayed history) or "
        "the wall clock",
    )
    deadline_ms: float = Field(default=250.0, gt=0, description="a slower look-up is given up for the defaults")


class PredictionSettings(Section):
    """The log of predictions."""

    max_queue: int = Field(default=10_000, ge=1, description="records waiting for the broker; more are dropped")


class Settings(Section):
    """Everything that the application can be told; the addresses default to the environment's."""

    home: Path
    mlflow_tracking_uri: str
    kafka_bootstrap_servers: str | None = Field(default=None, description="without one, predictions are not published")
    api_keys: tuple[str, ...] = Field(default=(), description="empty: no authorization; bind to loopback only")
    aliases: tuple[str, ...] = Field(default=("champion",), min_length=1, description="the first one is the default")
    poll_s: float = Field(default=2.0, gt=0, description="between two looks at the registry's aliases")
    timeout_s: float = Field(default=60.0, gt=0, description="a request's deadline")
    max_body_bytes: int = Field(default=25 * 2**20, ge=1)
    max_audio_s: float = Field(default=600.0, gt=0)
    whisper: BatchSettings = BatchSettings(max_batch_size=16, max_queue=128)
    tabular: BatchSettings = BatchSettings(max_batch_size=1024, max_queue=1024)
    features: FeatureSettings = FeatureSettings()
    predictions: PredictionSettings = PredictionSettings()

    @classmethod
    def read(cls, args: Mapping[str, object], environ: Mapping[str, str]) -> "Settings":
        """The application's arguments over the environment's addresses, keys and home.

        Raises:
            SettingsError: an unknown key or a wrong value, named.
        """
        home = Path(environ.get("MILLRACE_HOME") or ".millrace").expanduser().absolute()
        keys = (key.strip() for key in environ.get("MILLRACE_API_KEYS", "").split(","))
        defaults = {
            "home": home,
            "mlflow_tracking_uri": environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
            "kafka_bootstrap_servers": environ.get("KAFKA_BOOTSTRAP_SERVERS") or None,
            "api_keys": tuple(key for key in keys if key),
        }
        try:
            return cls.model_validate(defaults | dict(args))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SettingsError(f"argument {where} of the serving application: {first['msg']}") from error
