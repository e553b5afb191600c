"""Configuration of the speech task: `configs/whisper/*.yaml` is read into `WhisperConfig`."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, Tag, model_validator

from models.training.config import TrainConfig
from models.whisper.preprocess import PreprocessConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Utterances(_Section):
    """What every source of speech has; times are in seconds."""

    sample_rate_hz: int = Field(8000, ge=4000, le=48000)
    max_seconds: int = Field(3, ge=1, le=30)
    train_utterances: int = Field(2000, ge=1)
    """Utterances of an epoch, each made anew."""
    validation_utterances: int = Field(100, ge=1)
    seed: int = 0


class DigitsConfig(_Utterances):
    """Sequences of spoken digits."""

    kind: Literal["digits"] = "digits"
    source: Literal["auto", "recordings", "synthetic"] = "auto"
    """`auto`: the recordings where they are, else synthetic speech."""
    folder: str = "speech-fsdd"
    """Below the data folder: `recordings/<digit>_<speaker>_<index>.wav`."""
    split: Literal["recording", "speaker"] = "recording"
    """What the test split shares with no other: the index of a recording, or the person who speaks. Validation always
    has other recordings of those who speak in training."""
    test_speaker: str | None = None
    """With `split: speaker`, who that person is; by default the first by name, or the first tenth of many."""
    digits: tuple[int, int] = (2, 5)
    """Fewest and most digits of an utterance; the first epochs have fewer."""
    gap_s: tuple[float, float] = (0.02, 0.15)
    """Shortest and longest silence before, between and after digits."""
    test_utterances: int = Field(200, ge=1)
    voices: tuple[str, ...] = ("en-us", "en", "en-us+f2", "en+f4", "en-us+m3", "en+m5", "en-029+f5")
    """Voices of espeak-ng for synthetic speech; each counts as a speaker."""
    rates_wpm: tuple[int, ...] = (120, 135, 150, 165, 180, 195, 210, 225, 240, 255)
    """Speaking rates of synthetic speech; each counts as the index of a recording."""
    synthetic_share: float = Field(0.0, ge=0, lt=1)
    """Share of the training utterances that synthetic voices say, where there are recordings."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if not 1 <= self.digits[0] <= self.digits[1]:
            raise ValueError("digits must be two ascending numbers from 1")
        if not 0 <= self.gap_s[0] <= self.gap_s[1]:
            raise ValueError("gap_s must be two ascending numbers from 0")
        if self.test_speaker is not None and self.split != "speaker":
            raise ValueError("test_speaker needs split=speaker")
        return self


class NoiseConfig(_Section):
    """With what speech is heard. Training draws from the ranges; tests have every noise at every ratio, and none."""

    noises: tuple[str, ...] = ("wind", "traffic", "crowd")
    """Kinds that are synthesised, or recordings: files below the data folder, whose last quarter is kept for tests."""
    snr_db: tuple[float, ...] = Field((0.0, 5.0, 10.0, 15.0), min_length=1)
    clean: float = Field(0.2, ge=0, le=1)
    """Share of training utterances without noise."""
    reverberant: float = Field(0.3, ge=0, le=1)
    """Share of training utterances in a room."""
    rt60_s: tuple[PositiveFloat, PositiveFloat] = (0.1, 0.4)
    """Shortest and longest time in which the room's echo falls by 60 dB."""
    margin_s: tuple[float, float] = (0.05, 0.25)
    """Shortest and longest time before and after the speech."""
    easy_start: bool = False
    """Whether noise and rooms come in over the first epochs of training: a network that starts from scratch so learns
    sooner what to listen for."""


class DictationConfig(_Utterances):
    """Synthetic speech: sentences of a domain, and everyday ones, in several voices and speeds."""

    kind: Literal["dictation"]
    domain: Literal["general", "field", "coffee"] = "field"
    sample_rate_hz: int = Field(16000, ge=8000, le=48000)
    max_seconds: int = Field(4, ge=1, le=30)
    replay: float = Field(0.25, ge=0, lt=1)
    """Share of everyday sentences in training, so that they are not forgotten."""
    sentences: int = Field(800, ge=1)
    """Different sentences of training, of the domain and everyday ones each."""
    takes: int = Field(2, ge=1)
    """How often each of them, and each word or phrase of which they are made, is spoken by another voice and speed."""
    test_sentences: int = Field(40, ge=1)
    """Different sentences of the test split, of the domain and everyday ones each; every one in every condition."""
    voices: tuple[str, ...] = Field(("en-us", "en", "en-us+f2", "en+m3"), min_length=1)
    rates_wpm: tuple[int, ...] = Field((140, 165, 190), min_length=1)
    noise: NoiseConfig = NoiseConfig()


class RecordingsConfig(_Utterances):
    """Recorded sentences in a folder, with noise; train, validation and test share no recording."""

    kind: Literal["recordings"]
    layout: Literal["ljspeech", "orders"]
    """ljspeech: `metadata.csv` (id|text|normalised text) and `wavs/<id>.wav`. orders: `clean/<name>`, and `label.json`
    with the phrases that must be heard in place of a transcript."""
    folder: str
    """Below the data folder."""
    sample_rate_hz: int = Field(16000, ge=8000, le=48000)
    max_seconds: int = Field(12, ge=1, le=30)
    test_share: float = Field(0.3, gt=0, lt=1)
    noise: NoiseConfig = NoiseConfig()


def _kind(data: object) -> str:
    return str(data.get("kind", "digits") if isinstance(data, dict) else getattr(data, "kind", "digits"))


DataConfig = Annotated[
    Annotated[DigitsConfig, Tag("digits")]
    | Annotated[DictationConfig, Tag("dictation")]
    | Annotated[RecordingsConfig, Tag("recordings")],
    Discriminator(_kind),
]


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al., 2021), merged into the network on export."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class NetworkConfig(_Section):
    """A Whisper to go on from, or the size of a small one that starts from scratch."""

    base: str | None = None
    """A hub id, a local folder, or `models:/NAME@ALIAS` of the registry; the sizes below are then its own. None: from
    scratch."""
    language: str = "english"
    """What is spoken, as a multilingual base is told."""
    lora: LoraConfig | None = None
    width: int = Field(96, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    mel_bins: int = Field(64, ge=8)
    """Spread over 0 to 8 kHz, as Whisper does: at a sample rate of 8 kHz the upper ones hear nothing."""
    hop_ms: float = Field(20.0, gt=0)
    """Step between two frames of the spectrogram; the encoder halves their number once more, so it must be even."""
    vocabulary: int = Field(256, ge=32)
    """Most tokens to learn from the transcripts; 32 are the letters alone."""
    max_tokens: int = Field(40, ge=4)
    """Longest transcript, in tokens."""
    ctc: float = Field(0.0, ge=0, lt=1)
    """Share of the loss that asks the encoder alone for the tokens (connectionist temporal classification): a network
    that starts from scratch so learns to listen long before its decoder would make it."""

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
    reverberant: float = Field(0.0, ge=0, le=1)
    """Share of utterances in a room."""
    rt60_s: tuple[PositiveFloat, PositiveFloat] = (0.1, 0.4)
    """Shortest and longest time in which the room's echo falls by 60 dB."""
    tilt: float = Field(0.0, ge=0)
    """Largest change of the lowest and the highest bin of the log-mel features, in their own unit of 40 dB."""
    masks: int = Field(0, ge=0)
    """Bands of frequencies, and spans of time, that are hidden."""
    mask_share: float = Field(0.1, ge=0, le=0.5)
    """Widest of them, as a share of the whole."""


class EvaluateConfig(_Section):
    """Statistics of the evaluation job."""

    replicates: int = Field(1000, ge=1)
    seed: int = 0
    level: float = Field(0.95, gt=0, lt=1)
    max_utterances: int | None = Field(None, ge=1)
    feature_service: str | None = "speech_slices"
    """Feast service whose features slice the result; None: no slices."""
    preprocess: tuple[PreprocessConfig, ...] = ()
    """Other preprocessing with which the champion is measured too."""


class WhisperConfig(_Section):
    """The whole file."""

    registered_name: str = "whisper"
    data: DataConfig = DigitsConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _head_is_whole(self) -> Self:
        if self.network.ctc and self.train.parallelism != "ddp":
            raise ValueError("network.ctc needs train.parallelism=ddp: its head is no part of the sharded network")
        return self
