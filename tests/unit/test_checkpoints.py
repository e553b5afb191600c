"""The checkpoint protocol on plain files: what is committed is found, what is spoilt or half-written is not."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

from models.checkpoints import MANIFEST, CheckpointError, CheckpointStore


def write(store: CheckpointStore, step: int, name: str, data: bytes) -> str:
    with store.writing(f"{store.begin(step)}/{name}") as stream:
        assert stream.write(data) == stream.tell() == len(data)
    assert stream.hexdigest() == hashlib.sha256(data).hexdigest()
    return stream.hexdigest()


def save(store: CheckpointStore, step: int, best_step: int = 0) -> None:
    files = {
        "weights": write(store, step, "weights", b"weights of %d" % step),
        "rank-1": write(store, step, "rank-1", b"state of rank 1"),
    }
    store.commit(step, 2, files, {"best_step": best_step}, [best_step])


@pytest.fixture(params=["path", "file", "subtree", "mock"])
def filesystem(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FileSystem, str]:
    if request.param == "subtree":
        return SubTreeFileSystem(str(tmp_path), LocalFileSystem()), "c"
    if request.param == "mock":
        return FileSystem.from_uri("mock:///c")
    return FileSystem.from_uri((tmp_path / "c").as_uri() if request.param == "file" else str(tmp_path / "c"))


def test_recovers_the_newest_checkpoint_with_its_facts(filesystem: tuple[FileSystem, str]) -> None:
    store = CheckpointStore(*filesystem, "hash")
    assert store.recover() is None
    save(store, 10)
    save(store, 20, best_step=10)
    found = store.recover()
    assert found is not None
    assert (found.step, found.world_size, found.facts) == (20, 2, {"best_step": 10})
    with store.filesystem.open_input_stream(f"{found.folder}/weights") as stream:
        assert stream.read() == b"weights of 20"


def test_a_note_to_stop_is_seen_until_it_is_forgotten(filesystem: tuple[FileSystem, str]) -> None:
    store = CheckpointStore(*filesystem, "hash")
    store.forget_to_stop()
    store.ask_to_stop()
    save(store, 10)
    assert (store.asked_to_stop(), store.steps()) == (True, [10])
    store.forget_to_stop()
    assert not store.asked_to_stop()


def test_keeps_the_newest_and_the_best(filesystem: tuple[FileSystem, str]) -> None:
    store = CheckpointStore(*filesystem, "hash", keep=2)
    for step in (10, 20, 30, 40, 50):
        save(store, step, best_step=20 if step >= 20 else 10)
    assert store.steps() == [20, 40, 50]


@pytest.mark.parametrize("name", ["weights", "rank-1", MANIFEST])
@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_falls_back_when_the_newest_is_damaged(tmp_path: Path, name: str, spoil: str) -> None:
    store = CheckpointStore.at(tmp_path, "hash")
    save(store, 10)
    save(store, 20)
    path = tmp_path / "step-000000020" / name
    data = path.read_bytes()
    if spoil == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if spoil == "cut" else bytes([data[0] ^ 1]) + data[1:])
    found = store.recover()
    assert found is not None
    assert found.step == 10
    assert store.steps() == [10], "the damaged one would be in the way of its successor"
    save(store, 20)
    assert store.load(20) is not None


def test_an_uncommitted_step_is_removed_and_never_read(tmp_path: Path) -> None:
    store = CheckpointStore.at(tmp_path, "hash")
    save(store, 10)
    write(store, 20, "weights", b"half")
    found = store.recover()
    assert found is not None
    assert found.step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    save(CheckpointStore.at(tmp_path, "one"), 10)
    with pytest.raises(CheckpointError, match="another configuration"):
        CheckpointStore.at(tmp_path, "two").recover()


def test_a_manifest_of_another_format_counts_as_damaged(tmp_path: Path) -> None:
    store = CheckpointStore.at(tmp_path, "hash")
    save(store, 10)
    path = tmp_path / "step-000000010" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert store.load(10) is None


@given(data=st.binary(max_size=200))
def test_no_manifest_whatever_it_holds_breaks_a_recovery(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "step-000000010").mkdir()
    (folder / "step-000000010" / MANIFEST).write_bytes(data)
    assert CheckpointStore.at(folder, "hash").recover() is None
