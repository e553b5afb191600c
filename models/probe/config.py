"""Configuration of the probe: `configs/probe/*.yaml` is read into `ProbeConfig`."""

from pydantic import BaseModel, ConfigDict, Field

from models.training.config import TrainConfig


class NetworkConfig(BaseModel):
    """How large the network is, and how many samples are an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(200, ge=1)
    width: int = Field(16, ge=1)
    layers: int = Field(1, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class ProbeConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    registered_name: str = "probe"
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
