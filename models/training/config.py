"""How a task is trained: the `train` section of every task's YAML."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Parallelism = Literal["ddp", "fsdp", "tensor", "fsdp+tensor", "pipeline"]

SCHEDULING = frozenset(
    {
        *("name", "workers", "cpus_per_worker", "parallelism", "tensor_size", "max_failures"),
        *("log_every", "keep", "keep_best", "asynchronous", "storage"),
    }
)
"""Fields that say how the work is done, not what comes out: a run may go on with other values of them."""


class TrainConfig(BaseModel):
    """How a task is trained; `batch_size` is the global one, whatever the number of workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    """Name of the run: one that is unfinished goes on. None: named by a hash of the configuration."""
    steps: int = Field(1200, ge=1)
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)
    """Parts into which each worker cuts its share of a batch, to need less memory; a pipeline's microbatches."""
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "cosine", "linear", "one-cycle"] = "one-cycle"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(0.1, gt=0, lt=1)
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of matrix products, by autocast; weights and optimizer stay in fp32, and fp16 scales its losses."""
    average_decay: float | None = Field(None, gt=0, lt=1)
    """Decay a step of a moving average of the weights, which is then what is validated and kept. None: no average."""
    patience: int | None = Field(None, ge=1)
    """Validations without a new best after which training stops early. None: all steps are done."""
    seed: int = 0
    workers: int | tuple[int, int] = 2
    """A number, or the fewest and the most: as many as there is room for, anew after every failure."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """Logical CPUs that Ray sets aside; threads are the machine's cores divided by the workers."""
    parallelism: Parallelism = "ddp"
    """ddp: each worker has the whole network. fsdp: shards of it. tensor: slices of its layers. pipeline: a part."""
    tensor_size: int = Field(2, ge=2)
    """Workers that share a layer under fsdp+tensor."""
    max_failures: int = Field(3, ge=-1)
    """How often a group of workers is started again; -1 means always."""
    checkpoint_every: int = Field(100, ge=1)
    validate_every: int = Field(300, ge=1)
    log_every: int = Field(50, ge=1)
    keep: int = Field(2, ge=2)
    """Newest checkpoints that stay, besides the best."""
    keep_best: int = Field(1, ge=1)
    """Best checkpoints that stay, by the primary metric."""
    asynchronous: bool = False
    """Write checkpoints while training goes on, from a copy in memory; a fault during the write loses that one too."""
    storage: str | None = None
    """URI that `pyarrow.fs` knows, below which the checkpoints go. None: the run's own folder."""

    @property
    def fewest_workers(self) -> int:
        """The number of workers, or the lower end of its range."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers, or the upper end of its range."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not 1 <= self.fewest_workers <= self.most_workers:
            raise ValueError("workers must be a number from 1, or two ascending ones")
        if self.batch_size < self.most_workers:
            raise ValueError("batch_size must be at least the number of workers")
        if self.batch_size < self.most_workers * self.accumulate:
            raise ValueError("batch_size must be at least the number of workers times accumulate")
        return self

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.parallelism not in ("ddp", "fsdp") and self.fewest_workers != self.most_workers:
            raise ValueError(f"parallelism {self.parallelism} needs a fixed number of workers")
        if self.parallelism == "fsdp+tensor" and self.most_workers % self.tensor_size:
            raise ValueError("workers must be a multiple of tensor_size")
        in_microbatches = self.accumulate >= self.most_workers and self.batch_size % self.accumulate == 0
        if self.parallelism == "pipeline" and not in_microbatches:
            raise ValueError("a pipeline needs accumulate to be at least the workers and to divide batch_size")
        return self
