"""The harness on a local Ray: a worker that hangs and a job that is told to end change no bit of the weights."""

import json
import os
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
import ray
import torch

from models.checkpoints import CheckpointStore
from models.probe.config import ProbeConfig
from models.probe.task import ProbeTask
from models.probe.train import train as train_probe
from models.trainer import ATTEMPTS, TrainConfig, TrainingStopped, checkpoints, fit
from models.training import parameter_server, processes
from models.training.chaos import costs, table
from ops.configuration import load

CONFIG = TrainConfig(steps=60, batch_size=8, learning_rate=0.01, checkpoint_every=10, validate_every=30, log_every=10)
TASK = ProbeTask(dropout=0.1)
TIMEOUT_S = 240
TINY = Path(__file__).parents[2] / "configs" / "probe" / "tiny.yaml"


@pytest.fixture(scope="module")
def folder(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def test_a_hanging_worker_costs_less_than_a_checkpoint_interval(folder: Path) -> None:
    (cost,) = costs(TASK, CONFIG, ["sigstop"], 35, folder)
    assert (cost.same_bits, cost.restarts, cost.workers, cost.workers_after) == (True, 1, 2, 2)
    assert cost.lost_steps == 5
    assert 0 < cost.detection_s < cost.restart_s
    assert "| sigstop | 35 |" in table([cost])


def test_a_job_told_to_end_leaves_a_checkpoint_and_goes_on(folder: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = folder / "stopped"
    elsewhere = {"workers": (1, 2), "storage": (folder / "bucket").as_uri(), "asynchronous": True}
    config = CONFIG.model_copy(update=elsewhere)
    store = checkpoints(config, run, "chaos")

    def terminate() -> None:
        """While the workers start: the note waits for their first step."""
        ends = time.monotonic() + TIMEOUT_S
        while signal.getsignal(signal.SIGTERM) is handlers[1] and time.monotonic() < ends:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = Thread(target=terminate)
    killer.start()
    endless = config.model_copy(update={"log_every": 1})
    slow = ProbeTask(dropout=0.1, size=40)
    with pytest.raises(TrainingStopped, match=r"stopped after step \d+; the same command goes on"):
        fit(slow, endless.model_copy(update={"steps": 1_000_000}), folder=run, config_hash="chaos")
    killer.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    stopped = store.recover()
    assert stopped is not None
    assert stopped.facts["place"]["ended"] is None
    steps = stopped.step + 5
    fitted = fit(slow, config.model_copy(update={"steps": steps}), folder=run, config_hash="chaos")
    assert fitted.steps == steps
    assert fitted.restarts >= 1, "the second start counts, and an elastic group may be resized"
    assert all(torch.isfinite(value).all() for value in torch.load(fitted.final)["network"].values())


def test_another_home_goes_on_at_the_storage_in_the_same_run(folder: Path, mlflow_uri: str) -> None:
    settings = ["train.steps=40", "train.validate_every=20", "train.name=moved"]
    config = load(ProbeConfig, TINY, [*settings, f"train.storage={(folder / 'far').as_uri()}"])
    first = train_probe(config, home=folder / "lost", tracking_uri=mlflow_uri)
    again = train_probe(config, home=folder / "new", tracking_uri=mlflow_uri)
    assert (again["run_id"], again["steps"], again["accuracy"]) == (first["run_id"], 40, first["accuracy"])
    attempts = (folder / "new" / "training" / "moved" / ATTEMPTS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in attempts] == [40], "nothing was trained again"


def test_a_parameter_server_in_step_is_an_all_reduce(folder: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 8, "log_every": 1, "validate_every": 8})
    task = ProbeTask()
    served = parameter_server.train(task, config)
    reduced = processes.train(task, config, CheckpointStore.at(folder / "reduced", "hash"))
    assert served.losses == pytest.approx(reduced.losses, rel=1e-5)
    assert served.lead == 1


def test_what_is_not_training_has_the_priority_of_any_process(folder: Path) -> None:
    niceness = ray.remote(num_cpus=0)(lambda: os.nice(0))
    assert ray.get(niceness.remote()) == os.nice(0)
