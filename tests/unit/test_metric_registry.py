"""Metrics by name: the built-in ones, other packages' and names that are wrong."""

import sys
from pathlib import Path

import pytest

from evaluation.metrics import MetricError, metric, names


def test_knows_the_built_in_metrics() -> None:
    assert {"auroc", "cer", "wer"} <= set(names())
    assert all(metric(name).signature.startswith(name) for name in ("auroc", "cer", "wer"))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(MetricError, match="no metric 'werr': did you mean 'wer'"):
        metric("werr")


def test_finds_a_metric_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text("class Shouting:\n    name = 'shouting'\n\nSHOUTING = Shouting()\n")
    distribution = tmp_path / "shouting-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[millrace.metrics]\nshouting = shouting:SHOUTING\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "shouting" in names()
    assert metric("shouting").name == "shouting"
    sys.modules.pop("shouting")
