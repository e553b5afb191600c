"""CT volumes of the Kaggle layout, and pickles of a foreign class that may not run anything."""

import gzip
import io
import os
import pickle
import struct
import sys
import zipfile
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.segmentation.config import DataConfig, KaggleConfig
from models.segmentation.data import splits
from models.segmentation.kaggle import read_cases
from models.segmentation.pickles import load_volume
from models.segmentation.scans import DataError

nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def foreign(monkeypatch):
    """The two classes as `evalseg` has them, importable only while a test writes pickles."""
    made = {}
    for name in ("evalseg", "evalseg.io", "evalseg.io.segment_array"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("SegmentArray", "SingleSegment"):
        made[name] = type(name, (), {"__module__": "evalseg.io.segment_array"})
        setattr(sys.modules["evalseg.io.segment_array"], name, made[name])
    return made


def sparse(foreign, dense, boxes):
    """A `SegmentArray` of the boxes (tuples of slices) of a dense volume."""
    segments = []
    for box in boxes:
        one = foreign["SingleSegment"]()
        one.__dict__ = {"dtype": dense.dtype, "shape": dense.shape, "voxelsize": np.ones(3), "fill_value": 0}
        one.__dict__ |= {"data": dense[box], "roi": box}
        segments.append(one)
    whole = foreign["SegmentArray"]()
    whole.__dict__ = {"dtype": dense.dtype, "shape": dense.shape, "voxelsize": np.array([0.7, 0.7, 5.0])}
    whole.__dict__ |= {"fill_value": np.uint8(0), "roi": boxes[0], "segments": segments}
    return whole


def volume():
    dense = np.zeros((20, 24, 10), np.uint8)
    dense[4:9, 6:12, 2:5] = 1
    dense[12:15, 1:4, 4:8] = 2
    return dense, [np.s_[4:9, 6:12, 2:5], np.s_[12:15, 1:4, 4:8]]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float32", ">i2"])
def test_a_sparse_volume_becomes_dense(foreign, protocol, dtype):
    dense, boxes = volume()
    typed = dense.astype(dtype)
    loaded = load_volume(pickle.dumps(sparse(foreign, typed, boxes), protocol))
    assert np.array_equal(loaded, typed.astype(np.int64))


def test_an_array_in_fortran_order_keeps_its_places(foreign):
    dense, boxes = volume()
    dense[5, 7, 3] = 7
    whole = sparse(foreign, dense, boxes)
    whole.segments[0].data = np.asfortranarray(whole.segments[0].data)
    assert np.array_equal(load_volume(pickle.dumps(whole)), dense)


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Runs(os.system, ("touch /tmp/pwned",)),
        Runs(eval, ("1 + 1",)),
        Runs(getattr, ("", "join")),
        Runs(np.load, ("/etc/passwd",)),
        Runs(np.zeros, ((10**12,),)),
        Runs(type, ("x", (), {})),
        {"inside": [Runs(exec, ("x = 1",))]},
        np.array([Runs(eval, ("2",))], dtype=object),
        open,
        print,
    ],
    ids=["system", "eval", "getattr", "load", "zeros", "type", "inside a dict", "inside an array", "open", "print"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_runs(attack, protocol):
    with pytest.raises(DataError, match="is refused"):
        load_volume(pickle.dumps(attack, protocol))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"cevalseg.io\nos.system\n.", "evalseg.io.os.system"),
        (b"cevalseg.os\nsystem\n.", "evalseg.os.system"),
        (b"cmodels.segmentation.pickles\nload_volume\n.", "not allowed"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pname\n.", "PERSID"),
        (b"(ios\nsystem\n.", "INST"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index"),
        (b"\x80\x04N.", "holds no sparse volume"),
        (b"\x80\x04\x95\xff", "damaged"),
        (b"", "damaged"),
        (b"garbage that is no pickle", "is"),
    ],
)
def test_what_is_no_volume_is_one_sentence(data, said):
    with pytest.raises(DataError) as caught:
        load_volume(data)
    assert said in str(caught.value)


def test_arrays_that_lie_about_their_size_are_refused(foreign):
    dense, boxes = volume()
    whole = sparse(foreign, dense, boxes)
    whole.shape = (10**6, 10**6, 10**6)
    with pytest.raises(DataError, match="is not allowed"):
        load_volume(pickle.dumps(whole))
    whole = sparse(foreign, dense, boxes)
    whole.segments[0].roi = np.s_[0:1, 0:1, 0:1]
    with pytest.raises(DataError, match="doesn't fit its place"):
        load_volume(pickle.dumps(whole))
    grown = pickle.dumps(sparse(foreign, dense, boxes), 4).replace(b"K\x05K\x06K\x03", b"K\x05K\x06K\x09")
    with pytest.raises(DataError, match="doesn't fit its bytes"):
        load_volume(grown)


@given(st.binary(max_size=60))
@settings(max_examples=150)
def test_any_bytes_are_a_volume_or_a_sentence(data):
    with pytest.raises(DataError):
        load_volume(data)


def test_one_pickle_changes_nothing_for_the_next(foreign):
    dense, boxes = volume()
    # BUILD on the class itself tries to set an attribute on it.
    spoil = b"cevalseg.io.segment_array\nSegmentArray\n(N(dVshape\nI1\nstb."
    with pytest.raises(DataError):
        load_volume(spoil)
    assert np.array_equal(load_volume(pickle.dumps(sparse(foreign, dense, boxes))), dense)


@pytest.fixture
def archive(tmp_path, foreign):
    rng = np.random.default_rng(0)
    task = tmp_path / "kaggle" / "Task001_LiverTumor"
    (task / "GroundTruth").mkdir(parents=True)
    with zipfile.ZipFile(task / "CT.zip", "w") as volumes:
        for case in range(6):
            dense, boxes = volume()
            hounsfield = rng.normal(-100, 5, dense.shape) + 200 * (dense > 0)
            image = nibabel.Nifti1Image(hounsfield.astype(np.float32), np.eye(4)).to_bytes()
            packed = gzip.compress(image) if case % 2 else image
            volumes.writestr(f"CT/{case}.nii" + (".gz" if case % 2 else ""), packed)
            (task / "GroundTruth" / f"{case}.pkl").write_bytes(pickle.dumps(sparse(foreign, dense, boxes)))
    return tmp_path / "kaggle"


def test_slices_have_their_masks_and_their_case(archive):
    scans, skipped = read_cases(archive, KaggleConfig(slices_per_case=4))
    assert (len(scans), skipped) == (6 * 5, 0)
    assert {scan.group for scan in scans} == set("012345")
    for scan in scans:
        assert scan.image.shape == scan.mask.shape == (24, 20)  # rows are y
        if scan.mask.any():
            assert scan.image[scan.mask].mean() > scan.image[~scan.mask].mean() + 0.3
        assert (scan.kind == "empty") == (not scan.mask.any())
    only_two, _ = read_cases(archive, KaggleConfig(labels=(2,), slices_per_case=4))
    depths = [int(scan.id[-4:]) for scan in only_two if scan.mask.any() and scan.group == "0"]
    assert depths == [4, 5, 6, 7]


def test_a_patient_is_in_one_split_only(archive):
    config = DataConfig(source="kaggle", folder="kaggle", validation_share=0.2, test_share=0.3)
    found = splits(config, archive.parent)
    groups = [{scan.group for scan in part} for part in (found.train, found.validation, found.test)]
    assert sum(map(len, groups)) == 6 and set.union(*groups) == set("012345")


def test_bad_cases_are_skipped_and_said(archive, caplog):
    truths = archive / "Task001_LiverTumor" / "GroundTruth"
    (truths / "1.pkl").write_bytes(pickle.dumps(Runs(os.system, ("false",))))
    (truths / "9.pkl").write_bytes(b"x")
    scans, skipped = read_cases(archive, KaggleConfig())
    assert skipped == 2
    assert {scan.group for scan in scans} == set("02345")
    assert "system, which is not allowed" in caplog.text
    assert "holds no volume of case 9" in caplog.text


def test_damaged_volumes_and_archives_are_one_sentence(archive, caplog):
    path = archive / "Task001_LiverTumor" / "CT.zip"
    header = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes())
    header[40:56] = struct.pack("<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)
    with zipfile.ZipFile(path, "w") as volumes:
        volumes.writestr("0.nii", b"nothing")
        volumes.writestr("1.nii.gz", b"nothing")
        volumes.writestr("2.nii", bytes(header))
        volumes.writestr("3.nii", nibabel.Nifti1Image(np.zeros((2, 2), np.float32), np.eye(4)).to_bytes())
    with pytest.raises(DataError, match=r"no case can be used \(6 skipped\)"):
        read_cases(archive, KaggleConfig())
    assert caplog.text.count("can't be read as NIfTI") == 2
    assert caplog.text.count("no volume of three dimensions") == 2
    path.write_bytes(io.BytesIO(b"no zip").getvalue())
    with pytest.raises(DataError, match="can't be read as a zip archive"):
        read_cases(archive, KaggleConfig())
    with pytest.raises(DataError, match="expected CT.zip"):
        read_cases(archive, KaggleConfig(task="Task009_None"))
