"""The parts of an export that need no exporter; tests/integration/test_segmentation_jobs.py has the rest."""

from pathlib import Path

import numpy as np
import pytest

from models.segmentation import edge
from models.segmentation.config import PreprocessConfig


def test_calibration_sees_normalised_images() -> None:
    images = [np.full((4, 4), 0.2, np.float32), np.eye(4, dtype=np.float32)]
    reader = edge._Calibration(images, PreprocessConfig(size_px=16))
    first, second = reader.get_next(), reader.get_next()
    assert first is not None and second is not None
    assert first["image"].shape == (1, 1, 4, 4)
    assert np.abs(first["image"]).max() == 0
    assert second["image"].std() == pytest.approx(1, abs=1e-4)
    assert reader.get_next() is None


def test_the_table_compares_with_the_first_variant() -> None:
    first = edge.Variant("fp32", Path("a"), 4096, 8.0, 1000, 0.9, 0.8)
    small = edge.Variant("int8", Path("b"), 1024, 2.0, 1000, 0.895, 0.79)
    lines = edge.table([first, small]).splitlines()
    assert lines[2] == "| fp32 | 1,000 | 4 | 1.00x | 8.0 | 1.00x | 0.9000 | +0.0000 | 0.8000 |"
    assert lines[3] == "| int8 | 1,000 | 1 | 4.00x | 2.0 | 4.00x | 0.8950 | -0.0050 | 0.7900 |"


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(edge.EdgeError, match=r"needs the package onnxscript: pip install 'millrace\[segmentation\]'"):
        edge._require()
