"""A training as its job sees it: a folder that nobody else holds, an MLflow run, a fit, a version."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models import trainer
from models.registry import ModelVersion, Registry
from models.runs import Claim, Run, claimed, opened
from models.training.config import TrainConfig
from models.training.task import Task


@dataclass(frozen=True)
class TrainingRun:
    """One training that is under way."""

    registered_name: str
    config: TrainConfig
    claim: Claim
    run: Run
    tracking_uri: str

    def fit(self, task: Task) -> trainer.Fit:
        """Train, from where the run stopped if it did; raises what `models.trainer.fit` raises."""
        return trainer.fit(
            task,
            self.config,
            folder=self.claim.folder,
            config_hash=self.claim.config_hash,
            tracking_uri=self.tracking_uri,
            run_id=self.run.id,
        )

    def register(self, part: str, save: Callable[[Path], object], tags: Mapping[str, str]) -> ModelVersion:
        """Make what `save` writes into a folder the next version of the model; `part` names its artifact."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / part
            folder.mkdir()
            save(folder)
            return Registry(self.tracking_uri).register(self.registered_name, folder, run_id=self.run.id, tags=tags)

    def enter(self, version: ModelVersion, fitted: trainer.Fit) -> dict[str, object]:
        """Give the version its alias; what the job of every task says of its training."""
        return {
            "model": version.name,
            "version": version.version,
            "alias": Registry(self.tracking_uri).enter(version),
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "seconds": round(fitted.seconds, 1),
            "restarts": fitted.restarts,
            "run_id": self.run.id,
            "run": self.claim.name,
        }


@contextmanager
def training_run(
    registered_name: str,
    config: TrainConfig,
    config_hash: str,
    parameters: Mapping[str, object],
    home: Path,
    tracking_uri: str,
) -> Iterator[TrainingRun]:
    """A training named `config.name`, or a name made of the model's and the hash; an unfinished one goes on.

    Raises:
        RunError: the name is in use or belongs to another configuration.
    """
    name = config.name or f"{registered_name}-{config_hash[:10]}"
    with claimed(home / "training", name, config_hash) as claim:
        run_id = claim.run_id or trainer.run_of(config, claim.folder, config_hash)
        with opened(tracking_uri, registered_name, claim.name, run_id) as run:
            claim.remember(run.id, finished=False)
            run.log_params(parameters)
            yield TrainingRun(registered_name, config, claim, run, tracking_uri)
            claim.remember(run.id, finished=True)
