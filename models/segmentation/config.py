"""Configuration of the segmentation task: `configs/segmentation/*.yaml` is read into `SegmentationConfig`."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.training.config import TrainConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KaggleConfig(_Section):
    """Which slices of the CT volumes are used."""

    task: str = "Task001_LiverTumor"
    """Folder of the task below `data.folder`."""
    labels: tuple[int, ...] = ()
    """Labels that count as foreground; none named: all but 0."""
    slices_per_case: int = Field(8, ge=1)
    """Evenly spread over those that hold foreground, with one that holds none."""
    window_hu: tuple[float, float] = (-160.0, 240.0)
    """Hounsfield units that become black and white."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError("window_hu must be two ascending numbers")
        return self


class DataConfig(_Section):
    """Where images come from and how they are split."""

    source: Literal["phantoms", "images", "kaggle"] = "phantoms"
    """`images`: `<class>/<name>.png` and `<name>_mask*.png` below the folder; the other two are as they say."""
    folder: str = "medseg-busi-subset"
    """Below the data folder."""
    kaggle: KaggleConfig = KaggleConfig()
    phantoms: int = Field(400, ge=0)
    """Phantoms of an epoch, beside the real images where there are any."""
    fresh_phantoms: bool = False
    """Every epoch has phantoms of its own, which no other epoch has."""
    phantom_epochs: int = Field(0, ge=0)
    """First epochs in which a phantom takes the place of each real image: what a lesion is, is learnt before."""
    validation_phantoms: int = Field(80, ge=1)
    test_phantoms: int = Field(120, ge=1)
    phantom_size_px: int = Field(96, ge=32, le=512)
    validation_share: float = Field(0.15, gt=0, lt=0.5)
    """Of the groups of near-duplicates of each class."""
    test_share: float = Field(0.25, gt=0, lt=0.5)
    seed: int = 0
    """Decides the split, and which phantoms there are."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.source == "phantoms" and not self.phantoms:
            raise ValueError("phantoms must be at least 1 where they are the source")
        return self


class Lee(_Section):
    """Lee (1980): the local mean and the pixel, mixed by the local variation."""

    name: Literal["lee"]
    window_px: int = Field(5, ge=3, le=31)
    noise: float | None = Field(None, gt=0)
    """Coefficient of variation of the speckle; None: estimated from the image."""


class Kuan(_Section):
    """Kuan et al. (1985): as Lee, with the weight that is exact for multiplicative noise."""

    name: Literal["kuan"]
    window_px: int = Field(5, ge=3, le=31)
    noise: float | None = Field(None, gt=0)


class Frost(_Section):
    """Frost et al. (1982): a window that falls off with the distance, faster where the image varies."""

    name: Literal["frost"]
    window_px: int = Field(5, ge=3, le=31)
    damping: float = Field(2.0, gt=0)


class NonLocalMeans(_Section):
    """Buades et al. (2005): the mean of similar patches."""

    name: Literal["nlm"]
    patch_px: int = Field(5, ge=1)
    distance_px: int = Field(6, ge=1)
    strength: float = Field(0.8, gt=0)
    """In standard deviations of the noise."""


class Clahe(_Section):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld, 1994)."""

    name: Literal["clahe"]
    clip: float = Field(0.01, gt=0, le=1)
    tiles: int = Field(8, ge=1)
    """Along each side."""


Step = Annotated[Lee | Kuan | Frost | NonLocalMeans | Clahe, Field(discriminator="name")]


class PreprocessConfig(_Section):
    """What is done to every image, in this order: steps, resize, normalise."""

    steps: tuple[Step, ...] = ()
    """At the image's own resolution, in the order given."""
    size_px: int = Field(96, ge=16, le=1024)
    """Side of the square that the network sees."""
    resize: Literal["stretch", "pad"] = "stretch"
    """`pad` keeps the proportions and fills with black."""
    normalise: Literal["none", "zscore", "minmax"] = "zscore"


class AugmentConfig(_Section):
    """What is done to training images only; each figure is the largest change.

    There is no vertical flip: depth has a direction, as sound fades downwards and shadows fall downwards.
    """

    flip: bool = True
    """Left to right, every other time."""
    rotate_deg: float = Field(10.0, ge=0, le=45)
    scale: float = Field(0.12, ge=0, lt=0.5)
    shift: float = Field(0.06, ge=0, lt=0.5)
    """Of the side."""
    gain: float = Field(0.15, ge=0, lt=1)
    """Relative change of the brightness."""
    gamma: float = Field(0.25, ge=0, lt=1)
    speckle: float = Field(0.08, ge=0, lt=1)
    """Standard deviation of multiplicative noise."""


class NetworkConfig(_Section):
    """A U-Net (Ronneberger et al., 2015); below its last level lies one more with twice the channels."""

    features: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each level."""
    attention: bool = False
    """Gates on the skips (Oktay et al., 2018)."""
    residual: bool = False
    """A short cut round each pair of convolutions (He et al., 2016)."""
    norm: Literal["batch", "instance", "group", "none"] = "batch"
    activation: Literal["relu", "leaky_relu", "silu", "gelu"] = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the lowest level."""

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if not self.features or min(self.features) < 1:
            raise ValueError("features must be one or more positive numbers")
        if self.norm == "group" and any(width % 4 for width in self.features):
            raise ValueError("features must be multiples of 4 for norm=group")
        return self


class LossConfig(_Section):
    """Dice loss and binary cross-entropy, each an image's mean, weighted."""

    dice: float = Field(1.0, ge=0)
    bce: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.dice + self.bce:
            raise ValueError("dice and bce must not both be 0")
        return self


class PredictConfig(_Section):
    """How a trained network's probabilities become a mask."""

    threshold: float | Literal["validation"] = 0.5
    """`validation`: the one with the best Dice on the validation split."""
    peak: float | Literal["validation"] = 0.0
    """Probability that a spot must reach somewhere to count at all; it keeps images without a lesion empty."""
    flip: bool = False
    """Test-time augmentation: the mean over the image and its mirror image."""
    panels: int = Field(8, ge=0)
    """Test images that are drawn as artefacts."""

    @model_validator(mode="after")
    def _probability(self) -> Self:
        if self.threshold != "validation" and not 0 < float(self.threshold) < 1:
            raise ValueError("threshold must be between 0 and 1, or `validation`")
        if self.peak != "validation" and not 0 <= float(self.peak) < 1:
            raise ValueError("peak must be from 0 to below 1, or `validation`")
        return self


class ExportConfig(_Section):
    """Variants for small devices, made and compared by `ray_jobs/export_segmentation.py`."""

    calibration_images: int = Field(32, ge=1)
    """Of the training split, for int8."""
    prune: float = Field(0.25, gt=0, lt=1)
    """Share of the channels of each convolution that is removed."""
    finetune_steps: int = Field(150, ge=0)
    """After pruning, in the exporting process."""
    repeats: int = Field(30, ge=1)
    """Single-image runs whose median is the latency."""


class SegmentationConfig(_Section):
    """The whole file."""

    registered_name: str = "segmentation"
    change: str = ""
    """What this experiment changes, for the table of results."""
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        multiple = 2 ** len(self.network.features)
        if self.preprocess.size_px % multiple:
            raise ValueError(f"preprocess.size_px must be a multiple of {multiple}, as the network halves it")
        return self
