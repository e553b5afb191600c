"""Checkpoints: what is loaded is the newest that is whole, and an owner that was fenced writes nothing."""

from pathlib import Path

import pytest

from streaming.checkpoint import Checkpoint, CheckpointStore, StaleEpochError


def claimed(folder: Path, epoch: int = 1) -> CheckpointStore:
    store = CheckpointStore(str(folder))
    store.claim("view", 0, epoch)
    return store


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.checkpoint"))


def test_nothing_saved_is_none(tmp_path):
    assert CheckpointStore(str(tmp_path)).load("view", 0) is None
    assert CheckpointStore(str(tmp_path)).epoch("view", 0) == 0


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    store = claimed(tmp_path)
    for offset in (10, 20, 30):
        store.save("view", 0, 1, Checkpoint(offset, offset * 7, b"state\n\0%d" % offset))
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(30, 210, b"state\n\x0030")
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
    store = claimed(tmp_path)
    store.save("view", 0, 1, Checkpoint(10, 0, b"first"))
    store.save("view", 0, 1, Checkpoint(20, 0, b"second"))
    newest = files(tmp_path)[-1]
    data = newest.read_bytes()
    newest.write_bytes({"cut": data[:-3], "empty": b"", "flipped": data[:-1] + b"X"}[damage])
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(10, 0, b"first")
    assert "torn" in caplog.text


def test_an_older_epoch_is_refused(tmp_path):
    zombie = claimed(tmp_path, epoch=1)
    zombie.save("view", 0, 1, Checkpoint(10, 0, b"old"))
    owner = claimed(tmp_path, epoch=2)
    owner.save("view", 0, 2, Checkpoint(5, 0, b"new"))
    with pytest.raises(StaleEpochError, match="taken over by epoch 2"):
        zombie.save("view", 0, 1, Checkpoint(99, 0, b"zombie"))
    with pytest.raises(StaleEpochError):
        zombie.claim("view", 0, 1)
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(5, 0, b"new")


def test_two_owners_of_one_epoch_cannot_both_save(tmp_path):
    first = claimed(tmp_path, epoch=3)
    with pytest.raises(StaleEpochError):
        claimed(tmp_path, epoch=3)
    first.save("view", 0, 3, Checkpoint(1, 0, b""))


def test_partitions_and_streams_are_apart(tmp_path):
    store = claimed(tmp_path)
    store.claim("view", 1, 5)
    store.save("view", 0, 1, Checkpoint(10, 0, b"zero"))
    assert store.load("view", 1) is None
    assert (store.epoch("view", 0), store.epoch("view", 1), store.epoch("other", 0)) == (1, 5, 0)
