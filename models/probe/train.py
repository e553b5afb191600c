"""Trains the probe as any task is trained, and registers its weights."""

import hashlib
import json
import shutil
from pathlib import Path

import torch

from models import trainer
from models.probe.config import ProbeConfig
from models.probe.task import VALIDATION, ProbeTask
from models.training_run import training_run

WEIGHTS = "weights.pt"


def task(config: ProbeConfig, data: object = None) -> ProbeTask:
    """What is trained; its data are made on the fly."""
    network = config.network
    return ProbeTask(network.samples, network.width, network.layers, network.dropout)


def scores(config: ProbeConfig, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Whether each validation sample is right, by the weights in a folder."""
    probe = task(config)
    network = trainer.trained(probe, folder / WEIGHTS)
    network.eval()
    with torch.no_grad():
        each = [probe.validate(network, number, len(VALIDATION))["accuracy"] for number in range(len(VALIDATION))]
    return {"accuracy": each}


def train(config: ProbeConfig, data: object = None, *, home: Path, tracking_uri: str) -> dict[str, object]:
    """Train and return the result of the job; an unfinished run of the same name goes on. Ray must be initialised."""
    deciding = config.model_dump(mode="json", exclude={"registered_name": True, "train": set(trainer.SCHEDULING)})
    config_hash = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    parameters = {f"train.{key}": value for key, value in config.train.model_dump().items()}
    probe = task(config)
    with training_run(config.registered_name, config.train, config_hash, parameters, home, tracking_uri) as training:
        fitted = training.fit(probe)
        network = trainer.trained(probe, fitted.weights)
        network.eval()
        with torch.no_grad():
            right, count = probe.validate(network, 0, 1)["accuracy"]
        training.run.log_metrics({"test_accuracy": right / count}, fitted.steps)
        version = training.register(
            "model",
            lambda folder: shutil.copy(fitted.weights, folder / WEIGHTS),
            {"task": "probe", "split_hash": "probe"},
        )
        entered = training.enter(version, fitted)
    return {"accuracy": right / count, **entered}
