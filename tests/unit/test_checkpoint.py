"""Checkpoints: what is loaded is the newest that is whole, and an owner that was fenced writes nothing."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from streaming import checkpoint
from streaming.checkpoint import Checkpoint, CheckpointError, CheckpointStore, StaleEpochError, check_uri


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
        store.save("view", 0, 1, offset, offset * 7, b"state\n\0%d" % offset)
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(30, 210, b"state\n\x0030")
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
    store = claimed(tmp_path)
    store.save("view", 0, 1, 10, 0, b"first")
    store.save("view", 0, 1, 20, 0, b"second")
    newest = files(tmp_path)[-1]
    data = newest.read_bytes()
    newest.write_bytes({"cut": data[:-3], "empty": b"", "flipped": data[:-1] + b"X"}[damage])
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(10, 0, b"first")
    assert "torn" in caplog.text


def test_an_older_epoch_is_refused(tmp_path):
    zombie = claimed(tmp_path, epoch=1)
    zombie.save("view", 0, 1, 10, 0, b"old")
    owner = claimed(tmp_path, epoch=2)
    owner.save("view", 0, 2, 5, 0, b"new")
    with pytest.raises(StaleEpochError, match="taken over by epoch 2"):
        zombie.save("view", 0, 1, 99, 0, b"zombie")
    with pytest.raises(StaleEpochError):
        zombie.claim("view", 0, 1)
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(5, 0, b"new")


def test_two_owners_of_one_epoch_cannot_both_save(tmp_path):
    first = claimed(tmp_path, epoch=3)
    with pytest.raises(StaleEpochError):
        claimed(tmp_path, epoch=3)
    first.save("view", 0, 3, 1, 0, b"")


def test_partitions_and_streams_are_apart(tmp_path):
    store = claimed(tmp_path)
    store.claim("view", 1, 5)
    store.save("view", 0, 1, 10, 0, b"zero")
    assert store.load("view", 1) is None
    assert (store.epoch("view", 0), store.epoch("view", 1), store.epoch("other", 0)) == (1, 5, 0)


def chained(folder: Path, kinds: str, size: int = 100) -> CheckpointStore:
    """A store after a save a letter: w whole, d delta; the n-th ends at offset n."""
    store = claimed(folder)
    for offset, kind in enumerate(kinds, 1):
        store.save("view", 0, 1, offset, 0, b"%s%d" % (kind.encode(), offset), delta=kind == "d")
    return store


def test_a_chain_is_restored_and_what_it_needs_is_kept(tmp_path):
    chained(tmp_path, "wwddd")
    assert CheckpointStore(str(tmp_path)).load("view", 0) == Checkpoint(5, 0, b"w2", (b"d3", b"d4", b"d5"))
    assert len(files(tmp_path)) == 4


def test_the_chain_before_is_kept_until_two_newer_checkpoints_do_without_it(tmp_path):
    store = chained(tmp_path, "wddw")
    assert len(files(tmp_path)) == 4
    store.save("view", 0, 1, 5, 0, b"d5", delta=True)
    assert [path.name[11:23] for path in files(tmp_path)] == ["000000000004", "000000000005"]


@pytest.mark.parametrize(
    ("torn", "expected"),
    [
        ({6}, Checkpoint(5, 0, b"w4", (b"d5",))),
        ({5}, Checkpoint(4, 0, b"w4")),
        ({5, 4}, Checkpoint(3, 0, b"w1", (b"d2", b"d3"))),
        ({4}, Checkpoint(3, 0, b"w1", (b"d2", b"d3"))),
        ({4, 2}, Checkpoint(1, 0, b"w1")),
    ],
)
def test_a_torn_link_leaves_the_newest_whole_prefix_or_the_chain_before(tmp_path, monkeypatch, torn, expected):
    monkeypatch.setattr(checkpoint, "KEPT", 99)
    chained(tmp_path, "wddwdd")
    for sequence, path in enumerate(files(tmp_path), 1):
        if sequence in torn:
            path.write_bytes(path.read_bytes()[:-1])
    assert CheckpointStore(str(tmp_path)).load("view", 0) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.sets(st.integers(0, 30), max_size=3))
def test_what_is_loaded_is_a_state_that_was_saved_and_no_older_than_damage_demands(tmp_path_factory, deltas, torn):
    folder = tmp_path_factory.mktemp("chain")
    store, saved, chain = claimed(folder), [], []
    for offset, delta in enumerate(deltas, 1):
        delta = delta and bool(saved)
        chain = [*chain, b"%d" % offset] if delta else [b"%d" % offset]
        store.save("view", 0, 1, offset, 0, chain[-1], delta=delta)
        saved.append(Checkpoint(offset, 0, chain[0], tuple(chain[1:])))
    left = files(folder)
    for at in torn & set(range(len(left))):
        left[at].write_bytes(b"torn")
    try:
        assert CheckpointStore(str(folder)).load("view", 0) in saved
    except CheckpointError as error:
        assert torn and "is whole" in str(error)
    if not torn & set(range(len(left))):
        assert CheckpointStore(str(folder)).load("view", 0) == saved[-1]


def test_a_new_chain_begins_when_the_deltas_are_half_of_the_whole_or_twenty(tmp_path):
    store = claimed(tmp_path)
    assert store.wants_whole("view", 0)
    store.save("view", 0, 1, 1, 0, bytes(1000))
    assert store.wants_whole("view", 0), "a small state is always saved whole"
    store.save("view", 0, 1, 2, 0, bytes(checkpoint.LARGE_BYTES))
    store.save("view", 0, 1, 3, 0, bytes(checkpoint.LARGE_BYTES // 2), delta=True)
    assert not store.wants_whole("view", 0)
    store.save("view", 0, 1, 4, 0, b"1", delta=True)
    assert store.wants_whole("view", 0)
    store.save("view", 0, 1, 5, 0, bytes(checkpoint.LARGE_BYTES))
    for offset in range(checkpoint.DELTAS):
        assert not store.wants_whole("view", 0)
        store.save("view", 0, 1, 6 + offset, 0, b"1", delta=True)
    assert store.wants_whole("view", 0)


def test_after_a_load_or_a_claim_the_next_checkpoint_must_be_whole(tmp_path):
    store = claimed(tmp_path)
    for change in (lambda: store.load("view", 0), lambda: store.claim("view", 0, 1)):
        store.save("view", 0, 1, 1, 0, bytes(checkpoint.LARGE_BYTES))
        assert not store.wants_whole("view", 0)
        change()
        assert store.wants_whole("view", 0)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(tmp_path, monkeypatch):
    store = chained(tmp_path, "w")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save("view", 0, 1, 2, 0, b"more")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert store.load("view", 0) == Checkpoint(1, 0, b"w1")
    store.save("view", 0, 1, 2, 0, b"more")
    assert store.load("view", 0) == Checkpoint(2, 0, b"more")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "view").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="view"):
        claimed(tmp_path)


def test_the_temporary_file_of_an_owner_that_was_killed_is_removed_by_the_next(tmp_path):
    chained(tmp_path, "w")
    (tmp_path / "view" / "00000" / "x.checkpoint.1.tmp").write_bytes(b"half")
    claimed(tmp_path, epoch=2)
    assert not list(tmp_path.rglob("*.tmp"))


def test_when_none_is_whole_nothing_begins_anew_by_itself(tmp_path):
    chained(tmp_path, "wdd")
    files(tmp_path)[0].write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="None of the checkpoints in .* is whole: .* --reset view"):
        CheckpointStore(str(tmp_path)).load("view", 0)


@pytest.mark.parametrize("header", [b'{"format": 99, "offset": 1}\n', b"\xff no JSON\n", b"no line"])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, header):
    chained(tmp_path, "ww")
    body = header + b"state"
    files(tmp_path)[-1].write_bytes(hashlib.sha256(body).digest() + body)
    with pytest.raises(CheckpointError, match=r"is of format (99|unknown), and this version of Millrace reads \d"):
        CheckpointStore(str(tmp_path)).load("view", 0)


def test_the_declaration_of_checkpoints_is_told_once_there_are_some(tmp_path):
    store = CheckpointStore(str(tmp_path))
    assert store.declared("view", 0) is None
    store.claim("view", 0, 1, {"window": 60})
    assert store.declared("view", 0) is None, "no state is bound to it"
    store.save("view", 0, 1, 10, 0, b"state")
    store.claim("view", 3, 1)
    assert CheckpointStore(str(tmp_path)).declared("view", 0) == {"window": 60}
    assert (store.partitions("view"), store.partitions("other")) == ([0, 3], [])


def test_a_reset_keeps_the_checkpoints_aside_and_fences_their_owner(tmp_path):
    store = chained(tmp_path, "wdd")
    store.claim("view", 1, 7, {"window": 60})
    store.save("view", 1, 7, 10, 0, b"one")
    store.claim("other", 0, 1)
    store.save("other", 0, 1, 5, 0, b"other")
    before = {path.name: path.read_bytes() for path in files(tmp_path / "view")}
    folders = CheckpointStore(str(tmp_path)).reset("view")
    assert [Path(folder).relative_to(tmp_path).as_posix() for folder in folders] == [
        "view/00000/reset-0000000002",
        "view/00001/reset-0000000008",
    ]
    assert {path.name: path.read_bytes() for path in files(tmp_path / "view")} == before
    assert store.load("view", 0) is None
    assert store.declared("view", 1) is None
    with pytest.raises(StaleEpochError, match="taken over by epoch 8"):
        store.save("view", 1, 7, 11, 0, b"zombie")
    assert store.load("other", 0) == Checkpoint(5, 0, b"other")
    assert CheckpointStore(str(tmp_path)).reset("view") == []
    for path in Path(folders[0]).glob("*.checkpoint"):
        path.rename(tmp_path / "view" / "00000" / path.name)
    assert store.load("view", 0) == Checkpoint(3, 0, b"w1", (b"d2", b"d3")), "whoever moves them back has them again"


@pytest.fixture(params=["path", "file", "part of another", "mock"])
def place(request, tmp_path, monkeypatch) -> str:
    """The URI of a place, of which the last two write without a temporary file and an fsync, as object stores do."""
    made = {
        "part of another": lambda: pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()),
        "mock": lambda: pafs.FileSystem.from_uri("mock:///")[0],
    }.get(request.param)
    if made is None:
        return f"file://{tmp_path}" if request.param == "file" else str(tmp_path)
    shared = made()
    shared.create_dir("checkpoints", recursive=True)
    monkeypatch.setattr(checkpoint, "filesystem", lambda uri: (shared, "checkpoints"))
    return request.param


def test_every_file_system_keeps_fences_and_sets_aside(place):
    store = CheckpointStore(place)
    store.claim("view", 0, 1, {"window": 60})
    for offset, kind in enumerate(["w", "d", "w", "d", "d"], 1):
        store.save("view", 0, 1, offset, 0, b"%s%d" % (kind.encode(), offset), delta=kind == "d")
    owner = CheckpointStore(place)
    assert owner.load("view", 0) == Checkpoint(5, 0, b"w3", (b"d4", b"d5"))
    owner.claim("view", 0, 2)
    with pytest.raises(StaleEpochError):
        store.save("view", 0, 1, 6, 0, b"zombie")
    owner.save("view", 0, 2, 7, 0, b"next")
    assert owner.load("view", 0) == Checkpoint(7, 0, b"next")
    (folder,) = owner.reset("view")
    assert owner.load("view", 0) is None
    names = [info.base_name for info in owner._fs.get_file_info(pafs.FileSelector(folder))]
    assert sum(name.endswith(".checkpoint") for name in names) == 4
    assert "owner.json" in names


def test_a_place_for_checkpoints_is_tried_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_uri(f"file://{tmp_path}/a/b") == f"file://{tmp_path}/a/b"
    assert check_uri("~/c") == str(tmp_path / "c")
    assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("uri", ["checkpoints", "hdfs://node/x", "s4://bucket", "s3:///x", "file://relative/x", ""])
def test_a_place_that_is_none_is_refused_with_a_sentence(uri):
    with pytest.raises(CheckpointError, match=f"Checkpoints cannot be kept at '{uri}'"):
        check_uri(uri)


def test_a_place_that_cannot_be_written_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot be kept"):
        check_uri(f"file://{tmp_path}/file/below")
