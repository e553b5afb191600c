"""Training on a local Ray with a worker killed and a checkpoint spoilt: the weights are those of a calm run."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from models.checkpoints import MANIFEST
from models.registry import Registry
from models.whisper.config import WhisperConfig
from models.whisper.data import splits
from models.whisper.predict import load as load_predictor
from models.whisper.train import train
from models.whisper.utterances import Splits
from ops.configuration import load

TINY = Path(__file__).parents[2] / "configs" / "whisper" / "tiny.yaml"
STEPS = 24
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Trained:
    """A finished run: the job's result and where everything lies."""

    result: dict[str, object]
    config: WhisperConfig
    found: Splits
    home: Path
    uri: str


def configuration(name: str) -> WhisperConfig:
    overrides = [f"train.name={name}", f"train.steps={STEPS}", "train.validate_every=12", "train.checkpoint_every=4"]
    return load(WhisperConfig, TINY, [*overrides, "train.log_every=4"])


@pytest.fixture(scope="module", autouse=True)
def _quick_detection() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        yield


@pytest.fixture(scope="module")
def calm(ray_local: None, mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("home")
    config = configuration("calm")
    found = splits(config.data, None, home)
    return Trained(train(config, found, home=home, tracking_uri=mlflow_uri), config, found, home, mlflow_uri)


def weights(home: Path, name: str) -> dict[str, torch.Tensor]:
    network: dict[str, torch.Tensor] = torch.load(home / "training" / name / "last.pt", weights_only=True)["network"]
    return network


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def kill_when_saved(folder: Path, step: int) -> None:
    """SIGKILL the worker of rank 1 as soon as the checkpoint of a step is committed."""
    ends = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends:
        if (folder / "checkpoints" / f"step-{step:09d}" / MANIFEST).exists():
            pids = json.loads((folder / "attempts.jsonl").read_text().splitlines()[0])["pids"]
            os.kill(pids[1], signal.SIGKILL)
            return
        time.sleep(0.002)


def test_a_run_is_logged_registered_and_loads_again(calm: Trained) -> None:
    result = calm.result
    assert result["steps"] == STEPS
    assert result["restarts"] == 0
    assert result["source"] == "synthetic"
    registry = Registry(calm.uri)
    champion = registry.resolve("whisper-tiny", "champion")
    assert (champion.version, champion.run_id) == (result["version"], result["run_id"])
    assert champion.tags["split_hash"] == calm.found.hash
    assert registry.resolve("whisper-tiny", "baseline").tags["wer"] == f"{result['wer_before']:.6f}"
    predictor = load_predictor(registry.download(champion, calm.home / "cache"))
    transcripts = predictor.transcribe([one.wave for one in calm.found.test])
    assert len(transcripts) == len(calm.found.test)
    assert all(0 <= one.confidence <= 1 for one in transcripts)
    run = MlflowClient(calm.uri).get_run(str(result["run_id"]))
    assert run.info.status == "FINISHED"
    assert run.data.params["data.hash"] == calm.found.hash
    assert run.data.metrics["test_wer"] == result["wer_after"]


def test_a_killed_worker_and_a_spoilt_checkpoint_change_no_bit(calm: Trained) -> None:
    folder = calm.home / "training" / "killed"
    killer = threading.Thread(target=kill_when_saved, args=(folder, 8))
    killer.start()
    result = train(configuration("killed"), calm.found, home=calm.home, tracking_uri=calm.uri)
    killer.join()
    assert result["restarts"] == 1
    assert result["steps"] == STEPS
    assert_same_bits(weights(calm.home, "killed"), weights(calm.home, "calm"))
    history = MlflowClient(calm.uri).get_metric_history(str(result["run_id"]), "train_loss")
    assert [one.step for one in history] == list(range(4, STEPS + 1, 4)), "a restart logs no step twice, and none less"

    # The job dies before its last step, and the newest checkpoint that it left is spoilt.
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints / f"step-{STEPS:09d}")
    newest = sorted(checkpoints.iterdir())[-1]
    spoilt = newest / "__1_0.distcp"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"?")
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"finished": False}))
    again = train(configuration("killed"), calm.found, home=calm.home, tracking_uri=calm.uri)
    assert (again["run"], again["run_id"]) == ("killed", result["run_id"]), "the same name goes on with the same run"
    resumed_at = json.loads((folder / "attempts.jsonl").read_text().splitlines()[-1])["step"]
    assert resumed_at < int(newest.name.removeprefix("step-"))
    assert resumed_at > 0
    assert_same_bits(weights(calm.home, "killed"), weights(calm.home, "calm"))
