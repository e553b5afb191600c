"""Configuration of the speech task: `configs/whisper/*.yaml` is read into `WhisperConfig`."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.trainer import TrainConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """Where utterances come from and how they are split; times are in seconds."""

    source: Literal["auto", "recordings", "synthetic"] = "auto"
    """`auto`: the recordings where they are, else synthetic speech."""
    folder: str = "speech-fsdd"
    """Below the data folder: `recordings/<digit>_<speaker>_<index>.wav`."""
    split: Literal["recording", "speaker"] = "recording"
    """What train, validation and test never share: the index of a recording, or the person who speaks."""
    sample_rate_hz: int = Field(8000, ge=4000, le=48000)
    max_seconds: int = Field(3, ge=1, le=30)
    digits: tuple[int, int] = (2, 5)
    """Fewest and most digits of an utterance."""
    gap_s: tuple[float, float] = (0.02, 0.15)
    """Shortest and longest silence before, between and after digits."""
    train_utterances: int = Field(2000, ge=1)
    """Utterances of an epoch; every epoch concatenates anew, the first ones shorter."""
    validation_utterances: int = Field(100, ge=1)
    test_utterances: int = Field(200, ge=1)
    voices: tuple[str, ...] = ("en-us", "en", "en-us+f2", "en+f4", "en-us+m3", "en+m5", "en-029+f5")
    """Voices of espeak-ng for synthetic speech; each counts as a speaker."""
    rates_wpm: tuple[int, ...] = (120, 135, 150, 165, 180, 195, 210, 225, 240, 255)
    """Speaking rates of synthetic speech; each counts as the index of a recording."""
    seed: int = 0

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 1 <= self.digits[0] <= self.digits[1]:
            raise ValueError("digits must be two ascending numbers from 1")
        if not 0 <= self.gap_s[0] <= self.gap_s[1]:
            raise ValueError("gap_s must be two ascending numbers from 0")
        return self


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al., 2021), merged into the network on export."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class NetworkConfig(_Section):
    """A Whisper to go on from, or the size of a small one that starts from scratch."""

    base: str | None = None
    """A hub id or a local folder; the sizes below are then its own. None: from scratch."""
    lora: LoraConfig | None = None
    width: int = Field(96, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    mel_bins: int = Field(64, ge=8)
    """Spread over 0 to 8 kHz, as Whisper does: at a sample rate of 8 kHz the upper ones hear nothing."""
    hop_ms: float = Field(20.0, gt=0)
    """Step between two frames of the spectrogram; the encoder halves their number once more, so it must be even."""
    max_tokens: int = Field(40, ge=4)
    """Longest transcript, in tokens."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        return self


class AugmentConfig(_Section):
    """What is done to training utterances only."""

    speed: float = Field(0.05, ge=0, lt=0.5)
    """Largest relative change of speed."""
    noise_db: float = -45.0
    """Loudest white noise, relative to the utterance's level."""


class EvaluateConfig(_Section):
    """Statistics of the evaluation job."""

    replicates: int = Field(1000, ge=1)
    seed: int = 0
    level: float = Field(0.95, gt=0, lt=1)
    max_utterances: int | None = Field(None, ge=1)
    feature_service: str | None = "speech_slices"
    """Feast service whose features slice the result; None: no slices."""


class WhisperConfig(_Section):
    """The whole file."""

    registered_name: str = "whisper"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
