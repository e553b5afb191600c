"""Trains the probe as any task is trained, and registers its weights."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch

from models import trainer
from models.probe.config import ProbeConfig
from models.probe.task import VALIDATION, ProbeTask
from models.registry import Registry
from models.runs import claimed, opened

WEIGHTS = "weights.pt"


def task(config: ProbeConfig, data: object = None) -> ProbeTask:
    """What is trained; its data are made on the fly."""
    network = config.network
    return ProbeTask(network.samples, network.width, network.layers, network.dropout)


def scores(config: ProbeConfig, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Whether each validation sample is right, by the weights in a folder."""
    probe = task(config)
    network = probe.build()
    trainer.load_weights(network, folder / WEIGHTS)
    network.eval()
    with torch.no_grad():
        each = [probe.validate(network, number, len(VALIDATION))["accuracy"] for number in range(len(VALIDATION))]
    return {"accuracy": each}


def train(config: ProbeConfig, data: object = None, *, home: Path, tracking_uri: str) -> dict[str, object]:
    """Train and return the result of the job; an unfinished run of the same name goes on. Ray must be initialised."""
    deciding = config.model_dump(mode="json", exclude={"registered_name": True, "train": set(trainer.SCHEDULING)})
    config_hash = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    name = config.train.name or f"{config.registered_name}-{config_hash[:10]}"
    probe = task(config)
    with (
        claimed(home / "training", name, config_hash) as claim,
        opened(
            tracking_uri,
            config.registered_name,
            claim.name,
            claim.run_id or trainer.run_of(config.train, claim.folder, config_hash),
        ) as run,
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
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(fitted.weights, Path(scratch) / WEIGHTS)
            tags = {"task": "probe", "split_hash": "probe"}
            registry = Registry(tracking_uri)
            version = registry.register(config.registered_name, Path(scratch), run_id=run.id, tags=tags)
        alias = registry.enter(version)
        claim.remember(run.id, finished=True)
    return {
        "accuracy": right / count,
        "model": config.registered_name,
        "version": version.version,
        "alias": alias,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "seconds": round(fitted.seconds, 1),
        "restarts": fitted.restarts,
        "run_id": run.id,
        "run": claim.name,
    }
