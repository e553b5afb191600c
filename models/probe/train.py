"""Trains the probe as any task is trained, with a run in MLflow but nothing to register."""

import hashlib
import json
from pathlib import Path

import torch

from models import trainer
from models.probe.config import ProbeConfig
from models.probe.task import ProbeTask
from models.runs import claimed, opened


def task(config: ProbeConfig, data: object = None) -> ProbeTask:
    """What is trained; its data are made on the fly."""
    network = config.network
    return ProbeTask(network.samples, network.width, network.layers, network.dropout)


def train(config: ProbeConfig, data: object = None, *, home: Path, tracking_uri: str) -> dict[str, object]:
    """Train and return the result of the job; an unfinished run of the same name goes on. Ray must be initialised."""
    deciding = config.model_dump(mode="json", exclude={"registered_name": True, "train": set(trainer.SCHEDULING)})
    config_hash = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    name = config.train.name or f"{config.registered_name}-{config_hash[:10]}"
    probe = task(config)
    with (
        claimed(home / "training", name, config_hash) as claim,
        opened(tracking_uri, config.registered_name, claim.name, claim.run_id) as run,
    ):
        claim.remember(run.id, finished=False)
        run.log_params({f"train.{key}": value for key, value in config.train.model_dump().items()})
        fitted = trainer.fit(
            probe,
            config.train,
            folder=claim.folder,
            config_hash=config_hash,
            tracking_uri=tracking_uri,
            run_id=run.id,
        )
        network = probe.build()
        trainer.load_weights(network, fitted.weights)
        network.eval()
        with torch.no_grad():
            right, count = probe.validate(network, 0, 1)["accuracy"]
        run.log_metrics({"test_accuracy": right / count}, fitted.steps)
        claim.remember(run.id, finished=True)
    return {
        "accuracy": right / count,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "seconds": round(fitted.seconds, 1),
        "restarts": fitted.restarts,
        "run_id": run.id,
        "run": claim.name,
    }
