"""Harm on purpose: once, where it was asked for, and otherwise the task as it is."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models import tasks, trainer
from models.checkpoints import CheckpointStore
from models.probe.config import ProbeConfig
from models.probe.task import ProbeTask
from models.trainer import checkpoints
from models.training.config import TrainConfig
from models.training.faults import MARK, FaultyTask, InjectedError, damage


def save(store: CheckpointStore, step: int, best: Sequence[int] = (), **facts: object) -> None:
    with store.writing(f"{store.begin(step)}/__0_0.distcp") as stream:
        stream.write(b"weights")
    store.commit(step, 1, {"__0_0.distcp": stream.hexdigest()}, facts, best)


def test_the_fault_comes_once_and_with_its_sample(tmp_path: Path) -> None:
    probe = ProbeTask()
    faulty = FaultyTask(probe, "exception", (1, 7), tmp_path, CheckpointStore.at(tmp_path / "c", "hash"))
    assert (faulty.size, faulty.primary, faulty.higher_is_better) == (40, "accuracy", True)
    torch.testing.assert_close(faulty.batch([(0, 7), (1, 6)]), probe.batch([(0, 7), (1, 6)]))
    assert not (tmp_path / MARK).exists()
    with pytest.raises(InjectedError):
        faulty.batch([(1, 6), (1, 7)])
    assert float((tmp_path / MARK).read_text()) > 0
    torch.testing.assert_close(faulty.batch([(1, 7)]), probe.batch([(1, 7)]))


def test_the_best_checkpoint_that_is_sound_is_used(tmp_path: Path) -> None:
    store = CheckpointStore.at(tmp_path, "hash")
    for step in (1, 2, 3):
        save(store, step, best=(2, 1), place={"best": [[0.9, 2], [0.8, 1]]})
    last = store.recover()
    assert last is not None
    assert trainer.best_of(store, last).step == 2
    (tmp_path / "step-000000002" / "__0_0.distcp").write_bytes(b"spoilt")
    assert trainer.best_of(store, last).step == 1
    (tmp_path / "step-000000001" / "manifest.json").unlink()
    assert trainer.best_of(store, last).step == 3


def test_damage_is_found(tmp_path: Path) -> None:
    store = CheckpointStore.at(tmp_path, "hash")
    save(store, 1)
    save(store, 2)
    damage(store)
    found = store.recover()
    assert found is not None
    assert found.step == 1


def test_checkpoints_lie_in_the_run_or_where_the_configuration_says(tmp_path: Path) -> None:
    inside = checkpoints(TrainConfig(), tmp_path / "run", "hash")
    assert inside.folder(1) == f"{tmp_path}/run/checkpoints/step-000000001"
    outside = checkpoints(TrainConfig(storage=(tmp_path / "bucket").as_uri() + "/"), tmp_path / "run", "hash")
    assert outside.folder(1) == f"{tmp_path}/bucket/run/checkpoints/step-000000001"


def test_tasks_are_found_by_name() -> None:
    kind = tasks.named("probe")
    assert kind.config is ProbeConfig
    assert kind.task(ProbeConfig(), None).size == 200
    for name in tasks.NAMES:
        assert "train" in tasks.named(name).config.model_fields
    with pytest.raises(tasks.UnknownTask, match="There is no task probes; .* probe, segmentation, whisper"):
        tasks.named("probes")
