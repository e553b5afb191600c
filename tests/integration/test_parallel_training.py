"""One worker's loop in several processes on gloo: every parallelism learns what a single process learns."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from models.checkpoints import Checkpoint, CheckpointStore
from models.probe.task import ProbeTask
from models.segmentation.config import SegmentationConfig
from models.segmentation.train import SegmentationTask
from models.training import processes, snapshots
from models.training.config import TrainConfig
from models.training.faults import FaultyTask
from models.training.parallel import ParallelismError
from models.training.processes import Told
from models.training.task import Task
from models.whisper.config import DigitsConfig, WhisperConfig
from models.whisper.digits import Sequences
from models.whisper.train import WhisperTask
from models.whisper.utterances import Utterance

STEPS = 12
PARALLEL: dict[str, dict[str, object]] = {
    "ddp": {"workers": 2},
    "ddp in parts": {"workers": 2, "accumulate": 2},
    "fsdp": {"workers": 2, "parallelism": "fsdp", "accumulate": 2},
    "tensor": {"workers": 2, "parallelism": "tensor"},
    "fsdp+tensor": {"workers": 4, "parallelism": "fsdp+tensor"},
    "pipeline": {"workers": 2, "parallelism": "pipeline", "accumulate": 4},
}


@dataclass(frozen=True)
class Trained:
    """What a training told, and what it left."""

    told: Told
    last: Checkpoint
    weights: Mapping[str, torch.Tensor]


def config(**values: Any) -> TrainConfig:
    given = {"steps": STEPS, "batch_size": 8, "checkpoint_every": 4, "validate_every": 6, "log_every": 1}
    return TrainConfig.model_validate(given | {"learning_rate": 0.05, "workers": 2} | values)


def train(store: CheckpointStore, config: TrainConfig, task: Task | None = None) -> Trained:
    told = processes.train(task or ProbeTask(), config, store)
    last = store.recover()
    assert last is not None
    return Trained(told, last, snapshots.load_weights(store, last))


def assert_same_bits(left: Trained, right: Trained) -> None:
    assert left.weights.keys() == right.weights.keys()
    assert all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore.at((tmp_path / "checkpoints").as_uri(), "hash")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(CheckpointStore.at(tmp_path_factory.mktemp("single"), "hash"), config(workers=1))


@pytest.mark.parametrize("name", PARALLEL)
def test_every_parallelism_learns_the_same(single: Trained, store: CheckpointStore, name: str) -> None:
    trained = train(store, config(**PARALLEL[name]))
    assert trained.told.losses == pytest.approx(single.told.losses, rel=2e-4)
    assert trained.told.validations == [pytest.approx(one, rel=1e-4) for one in single.told.validations]
    assert trained.weights.keys() == single.weights.keys()
    for key, value in single.weights.items():
        torch.testing.assert_close(trained.weights[key], value, rtol=1e-3, atol=1e-4)


def whisper(base: Path | None) -> WhisperTask:
    """A tiny network that hears two tones: from scratch, or with adapters on a base."""
    adapters = {"base": str(base), "lora": {"r": 2, "alpha": 4, "dropout": 0.0}} if base else {}
    size = {"width": 16, "layers": 2, "heads": 2, "mel_bins": 20, "max_tokens": 12, "dropout": 0.0}
    data = {"max_seconds": 1, "digits": [1, 1], "train_utterances": 40, "synthetic_share": 0.0}
    config = WhisperConfig.model_validate({"data": data, "network": size | adapters})
    seconds = np.arange(2000) / 8000
    tones = [
        Utterance("", np.sin(2 * np.pi * hz * seconds).astype(np.float32), text, "ann", 8000)
        for hz, text in ((300, "one"), (900, "two"))
    ]
    return WhisperTask(config, Sequences(tones, DigitsConfig.model_validate(data)), tuple(tones))


@pytest.mark.parametrize("adapted", [False, True], ids=["from scratch", "adapters"])
def test_a_speech_network_learns_the_same_sharded_and_sliced(tmp_path: Path, adapted: bool) -> None:
    base = None
    if adapted:
        base, made = tmp_path / "base", whisper(None)
        torch.manual_seed(0)
        made.predictor(made.build()).save(base)
    task = whisper(base)
    assert len(task.tensor_plan(task.build())) == 4 * (2 + 2 * adapted), "of four layers, two each and their adapters"
    settings = {"learning_rate": 0.01, "steps": 4}
    alone = train(CheckpointStore.at(tmp_path / "alone", "hash"), config(workers=1, **settings), task)
    for parallelism in ("fsdp", "tensor"):
        together = CheckpointStore.at(tmp_path / parallelism, "hash")
        trained = train(together, config(parallelism=parallelism, **settings), task)
        assert trained.told.losses == pytest.approx(alone.told.losses, rel=1e-3)
        for key, value in alone.weights.items():
            torch.testing.assert_close(trained.weights[key], value, rtol=1e-2, atol=1e-3)


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    store = CheckpointStore.at((tmp_path / "checkpoints").as_uri(), "hash", keep=5)
    task = ProbeTask(dropout=0.2, normalise=True)
    settings = {"average_decay": 0.9, "asynchronous": True, "precision": "bf16"}
    calm = train(CheckpointStore.at(tmp_path / "calm", "hash", 5), config(**settings), task)
    assert calm.told.losses.keys() == set(range(1, STEPS + 1))
    assert calm.last.facts["place"]["ended"] == "steps"
    first = train(store, config(**settings), task)
    assert_same_bits(first, calm)
    for step in (8, 12):
        store.remove(step)
    broken = f"{store.folder(6)}/__1_0.distcp"
    with store.filesystem.open_input_stream(broken) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    with store.filesystem.open_output_stream(broken) as stream:
        stream.write(data)
    resumed = train(store, config(**settings), task)
    assert resumed.told.started == 4, "6 is damaged"
    assert_same_bits(resumed, calm)
    assert {step: resumed.told.losses[step] for step in range(5, 13)} == {s: calm.told.losses[s] for s in range(5, 13)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"workers": 2}, {"workers": 1}),
        ({"workers": 2}, {"workers": 2, "parallelism": "fsdp"}),
        ({"workers": 2, "parallelism": "pipeline", "accumulate": 4}, {"workers": 2, "parallelism": "tensor"}),
    ],
)
def test_goes_on_with_other_workers_and_another_parallelism(
    single: Trained, tmp_path: Path, before: dict[str, object], after: dict[str, object]
) -> None:
    store = CheckpointStore(SubTreeFileSystem(str(tmp_path), LocalFileSystem()), "checkpoints", "hash", keep=5)
    train(store, config(**before))
    for step in (8, 12):
        store.remove(step)
    resumed = train(store, config(**after))
    assert resumed.told.started == 6
    assert resumed.told.losses == pytest.approx({s: single.told.losses[s] for s in range(7, 13)}, rel=2e-4)
    for key, value in single.weights.items():
        torch.testing.assert_close(resumed.weights[key], value, rtol=1e-3, atol=1e-4)


def test_ranks_that_hold_copies_of_a_layer_drop_the_same_units(tmp_path: Path) -> None:
    task, settings = ProbeTask(dropout=0.2), {"workers": 2, "parallelism": "tensor"}
    alone = train(CheckpointStore.at(tmp_path / "alone", "hash"), config(workers=1), task)
    together = train(CheckpointStore.at(tmp_path / "together", "hash"), config(**settings), task)
    assert together.told.losses == pytest.approx(alone.told.losses, rel=2e-4)

    changed = CheckpointStore.at(tmp_path / "changed", "hash", keep=5)
    train(changed, config(workers=2), task)
    for step in (8, 12):
        changed.remove(step)
    train(changed, config(**settings), task)
    changed.remove(12)
    step_8 = changed.recover()
    assert step_8 is not None
    assert [name for name in snapshots.names(changed, step_8) if name.startswith("random/")] == ["random/0"]


def test_half_precision_and_early_stopping(store: CheckpointStore) -> None:
    settings = config(precision="fp16", patience=1, steps=60, validate_every=3, schedule="cosine")
    trained = train(store, settings, ProbeTask(size=24))
    place = trained.last.facts["place"]
    assert (place["ended"], place["stale"]) == ("patience", 1)
    assert trained.last.step < 60
    accuracies = {one["step"]: one["accuracy"] for one in trained.told.validations}
    best, step = place["best"][0]
    assert best == max(accuracies.values()) == accuracies[step]
    assert step == trained.last.step - 3
    assert step in store.steps(), "the best one stays"
    assert min(trained.told.losses.values()) < trained.told.losses[1]


def test_asked_to_stop_it_leaves_a_checkpoint_of_that_step(store: CheckpointStore) -> None:
    def ask() -> None:
        while not store.steps():
            time.sleep(0.02)
        store.ask_to_stop()

    asking = Thread(target=ask)
    asking.start()
    stopped = train(store, config(steps=1_000_000, checkpoint_every=100, validate_every=100_000))
    asking.join()
    assert stopped.last.facts["place"]["ended"] is None
    assert stopped.last.step == max(stopped.told.losses)


@pytest.mark.parametrize(
    ("parallelism", "said"), [("fsdp+tensor", "has no tensor_plan"), ("pipeline", "cannot be cut")]
)
def test_what_cannot_be_cut_or_sliced_is_refused_before_it_starts(
    store: CheckpointStore, parallelism: str, said: str
) -> None:
    task = SegmentationTask(SegmentationConfig(), (), ())
    with pytest.raises(ParallelismError, match=f"SegmentationTask {said}; set train.parallelism to fsdp or ddp."):
        processes.train(task, config(parallelism=parallelism, accumulate=2), store)


def test_a_task_with_a_fault_can_be_sliced_as_the_task_can(store: CheckpointStore, tmp_path: Path) -> None:
    faulty = FaultyTask(ProbeTask(), "exception", (0, -1), tmp_path, store)
    sliced = config(parallelism="tensor", steps=4)
    plain = CheckpointStore.at((tmp_path / "plain").as_uri(), "hash")
    assert (
        processes.train(cast(Task, faulty), sliced, store).losses == processes.train(ProbeTask(), sliced, plain).losses
    )
