"""Images and masks in the layout of BUSI, their near-duplicates, and a split without leaks."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures
from scipy.ndimage import shift

from models.segmentation.config import DataConfig
from models.segmentation.data import splits
from models.segmentation.images import group, read_folder, read_image
from models.segmentation.phantoms import phantom
from models.segmentation.scans import DataError, Scan, divide


def write(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pictures.fromarray((np.asarray(values) * 255).round().astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        made = phantom(0, 0, number, 96)
        kind = "benign" if number < 6 else "malignant"
        write(tmp_path / "set" / kind / f"{kind} ({number}).png", made.image)
        write(tmp_path / "set" / kind / f"{kind} ({number})_mask.png", made.mask)
    return tmp_path / "set"


def test_several_masks_are_one(folder):
    second = np.zeros((96, 96))
    second[:5, :7] = 1
    write(folder / "benign" / "benign (1)_mask_1.png", second)
    scans, skipped = read_folder(folder)
    by_id = {scan.id: scan for scan in scans}
    assert (len(scans), skipped) == (12, 0)
    assert np.array_equal(by_id["benign/benign (1)"].mask, phantom(0, 0, 1, 96).mask | (second > 0))
    assert np.allclose(by_id["benign/benign (1)"].image, phantom(0, 0, 1, 96).image, atol=1 / 255)
    assert [scan.kind for scan in scans] == ["benign"] * 6 + ["malignant"] * 6
    assert [scan.id for scan in scans][-2:] == ["malignant/malignant (10)", "malignant/malignant (11)"]


def test_what_cannot_be_read_is_skipped_with_its_reason(folder, caplog):
    (folder / "benign" / "damaged.png").write_bytes(b"\x89PNG no more")
    write(folder / "benign" / "damaged_mask.png", np.zeros((9, 9)))
    write(folder / "benign" / "alone.png", np.zeros((9, 9)))
    write(folder / "benign" / "large.png", np.zeros((9, 9)))
    write(folder / "benign" / "large_mask.png", np.zeros((8, 9)))
    scans, skipped = read_folder(folder)
    assert (len(scans), skipped) == (12, 3)
    assert "can't be read as an image" in caplog.text
    assert "has no alone_mask.png" in caplog.text
    assert "another size than its image" in caplog.text


def test_an_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"expected <class>/<name>\.png beside"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="set MILLRACE_DATA"):
        splits(DataConfig(source="images"), None)


def test_colour_and_16_bits_are_read_as_grey(tmp_path):
    Pictures.fromarray(np.full((4, 5), 32768, np.uint16)).save(tmp_path / "deep.png")
    Pictures.new("RGBA", (5, 4), (255, 255, 255, 255)).save(tmp_path / "colour.png")
    assert read_image(tmp_path / "deep.png") == pytest.approx(np.full((4, 5), 0.5), abs=1e-4)
    assert (read_image(tmp_path / "colour.png") == 1).all()


def test_near_duplicates_are_one_group_and_strangers_are_not():
    ones = [phantom(0, 0, number, 128).image for number in range(8)]
    brighter = np.clip(ones[2] * 1.2 + 0.02, 0, 1)
    moved = shift(ones[4], (0, 1), mode="nearest")
    small = np.asarray(Pictures.fromarray(ones[5]).resize((90, 100)))
    groups = group([*ones, brighter, moved, small])
    assert groups[:8] == list(range(8))
    assert groups[8:] == [2, 4, 5]


def test_groups_join_through_a_common_neighbour():
    one = phantom(0, 0, 0, 128).image
    chain = [one]
    for _ in range(12):
        chain.append(shift(chain[-1], (0, 1), mode="nearest"))
    assert group([one, chain[-1]]) == [0, 1]
    assert set(group(chain)) == {0}


@given(sizes=st.lists(st.integers(1, 4), min_size=9, max_size=20), seed=st.integers(0, 5), share=st.floats(0.1, 0.3))
@settings(max_examples=40)
def test_no_group_is_in_two_parts_and_nothing_is_lost(sizes, seed, share):
    blank = np.zeros((2, 2), np.float32)
    scans = [
        Scan(f"{number}-{copy}", blank, blank > 0, "ab"[number % 2], f"g{number}")
        for number, size in enumerate(sizes)
        for copy in range(size)
    ]
    parts = divide(scans, (share, share), seed)
    groups = [{scan.group for scan in part} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert sorted(scan.id for part in parts for scan in part) == sorted(scan.id for scan in scans)
    assert all({scan.kind for scan in part} == {"a", "b"} for part in parts)
    assert parts == divide(scans, (share, share), seed)


def test_too_few_groups_are_refused():
    blank = np.zeros((2, 2), np.float32)
    with pytest.raises(DataError, match="3 groups of images or more, found 2"):
        divide([Scan(str(n), blank, blank > 0, "a", str(n)) for n in range(2)], (0.2, 0.2), 0)


@pytest.mark.skipif("MILLRACE_DATA" not in os.environ, reason="needs the real images")
def test_the_groups_of_the_real_images_hold_those_that_its_manifest_names():
    import csv

    folder = Path(os.environ["MILLRACE_DATA"]) / "medseg-busi-subset"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    scans, skipped = read_folder(folder)
    assert (len(scans), skipped) == (110, 0)
    assert sum(not scan.mask.any() for scan in scans) == sum(scan.kind == "normal" for scan in scans)
    with (folder / "manifest.csv").open() as file:
        theirs = {row["file"].removesuffix(".png"): row["neardup_group"] for row in csv.DictReader(file)}
    ours: dict[str, set[str]] = {}
    for scan in scans:
        ours.setdefault(theirs[scan.id], set()).add(scan.group)
    assert all(len(groups) == 1 for groups in ours.values())
    assert len({scan.group for scan in scans}) >= 90
