"""What `configs/tabular/*.yaml` may say."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Frozen, and no key that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    """Which events become rows, and how the rows are split by entity."""

    feature_service: str = Field(description="Feast feature service that lists the model's inputs")
    label: str = Field(description="boolean field of the event that the model predicts")
    delay_s: float = Field(default=60.0, ge=0, description="seconds after its event at which a row asks for features")
    max_rows: int = Field(default=20_000, ge=100, description="rows kept, sampled by hash")
    max_rows_per_entity: int = Field(default=100, ge=1, description="rows kept of one entity, so that none dominates")
    validation_share: float = Field(default=0.2, gt=0, lt=1)
    test_share: float = Field(default=0.2, gt=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> "DataConfig":
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self


class TrainConfig(Section):
    """Settings of gradient boosting; the number of trees is chosen on the validation split."""

    learning_rate: float = Field(default=0.1, gt=0)
    max_iter: int = Field(default=200, ge=1, description="most trees")
    max_leaf_nodes: int = Field(default=15, ge=2)
    min_samples_leaf: int = Field(default=20, ge=1)
    l2_regularization: float = Field(default=1.0, ge=0)
    patience: int = Field(default=20, ge=1, description="trees without gain on the validation split before it ends")
    seed: int = 0


class TabularConfig(Section):
    """One tabular model."""

    name: str = Field(description="name in the model registry")
    data: DataConfig
    train: TrainConfig = TrainConfig()
