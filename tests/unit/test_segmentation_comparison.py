"""The table of experiments and the gains over the threshold rule, from stored trials."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluation.metrics import MetricError, metric
from evaluation.segmentation import Row, Trial, gain_table, gains, load_trial, rows, table, write
from evaluation.statistics import Resampling
from models.segmentation.scans import Scan

FEW = Resampling(replicates=200)


def trial(experiment="a", seed=0, gain=0.3, count=30):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        base = float(rng.uniform(0.1, 0.5))
        kind = ("benign", "malignant", "normal")[number % 3]
        network = {"dice": base + gain, "hausdorff95_px": 4.0}
        made.append(Row(str(number), kind, f"g{number // 2}", network, {"dice": base, "hausdorff95_px": 9.0}))
    return Trial(experiment, "this", seed, "key", "hash", 0.8, 0.7, 0.5, 0.9, 1234, 9.0, "otsu", tuple(made))


def test_a_constant_gain_is_found_for_every_kind():
    found = gains([trial(seed=0), trial(seed=1)], FEW)
    assert [(one.kind, one.images, one.units) for one in found] == [
        ("all", 60, 15), ("benign", 20, 10), ("malignant", 20, 10), ("normal", 20, 10)
    ]  # fmt: skip
    for one in found:
        assert one.difference == pytest.approx(0.3)
        assert one.network == pytest.approx(one.rule + 0.3)
        assert one.rule_interval.low < one.rule < one.rule_interval.high


def test_units_widen_the_interval_where_their_images_agree():
    one = trial(gain=0, count=60)
    copies = replace(one, rows=tuple(row for row in one.rows for _ in range(2)))
    alone = replace(copies, rows=tuple(replace(row, unit=str(n)) for n, row in enumerate(copies.rows)))
    wide, narrow = (gains([each], FEW)[0].network_interval for each in (copies, alone))
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)


def test_the_table_means_over_seeds_and_shows_their_spread():
    other = replace(trial(seed=1), validation_dice=0.9)
    text = table([trial(), other, trial("b", gain=0.1)])
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a | this | 1,234 | 2 | 0.850 ± 0.071 | 0.700 ± 0.000 |")
    assert "±" not in lines[3]
    assert gain_table(gains([trial()], FEW)).count("\n") == 6


def test_trials_are_kept_and_found_by_their_key(tmp_path):
    one = trial()
    one.save(tmp_path / "trials" / "a-0.json")
    assert load_trial(tmp_path / "trials" / "a-0.json", "key") == one
    assert load_trial(tmp_path / "trials" / "a-0.json", "another") is None
    assert load_trial(tmp_path / "none.json", "key") is None
    (tmp_path / "bad.json").write_text("{")
    assert load_trial(tmp_path / "bad.json", "key") is None


def test_what_is_written_can_be_read(tmp_path):
    result = write([trial(), trial("b")], tmp_path)
    assert json.loads((tmp_path / "experiments.json").read_text()) == json.loads(json.dumps(result))
    text = (tmp_path / "experiments.md").read_text()
    assert "| a | this |" in text and "b against the best threshold" in text


def test_rows_score_network_and_rule():
    truth = np.zeros((6, 6), bool)
    truth[:3] = True
    scan = Scan("x", truth.astype(np.float32), truth, "benign", "g1")
    (row,) = rows([scan], [truth], [~truth], "split-")
    assert (row.network["dice"], row.rule["dice"], row.unit, row.kind) == (1.0, 0.0, "split-g1", "benign")


def test_dice_is_a_metric_by_name():
    dice = metric("dice")
    full, empty, half = np.ones((2, 2), bool), np.zeros((2, 2), bool), np.array([[True, True], [False, False]])
    found = dice.statistics([full, empty, half, full], [full, empty, full, empty])
    assert found[:, 0] == pytest.approx([1, 1, 2 / 3, 0])
    assert dice.scores(found, np.array([[1.0, 1, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]])) == pytest.approx(
        [1, 0, np.nan], nan_ok=True
    )
    assert dice.losses(found) == pytest.approx([0, 0, 1 / 3, 1])
    assert dice.statistics([], []).shape == (0, 1)
    with pytest.raises(MetricError, match="same shape"):
        dice.statistics([full], [np.ones((3, 3), bool)])
    with pytest.raises(MetricError, match="boolean arrays, not str"):
        dice.statistics(["full"], [full])
