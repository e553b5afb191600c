"""Patterns keep the mean rate, each has its own shape, and chunks continue one another; keys are skewed as asked."""

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.events import LABELS, PREDICTIONS
from streaming.producing.columns import rows
from streaming.simulators.arrival import HOUR_US, MINUTE_US, SECOND_US
from streaming.simulators.patterns import BURST_SHARE, BURST_US, DAY_US, Pattern, Shape, gaps_us, skewed, times_us
from streaming.simulators.predictions import LABELLED, RIGHT, predictions
from streaming.simulators.sources import SOURCES, generate

START_US = 1_767_571_200 * SECOND_US
JSON_TYPES = {"string": str, "timestamp": str, "bigint": int, "double": float, "boolean": bool}


def moments(pattern: Pattern, rate_hz: float, count: int, seed: int = 1, chunk: int = 1000) -> np.ndarray:
    chunks = times_us(pattern, rate_hz, count, START_US, np.random.default_rng(seed), chunk)
    return np.concatenate(list(chunks))


@pytest.mark.parametrize("pattern", list(Pattern))
def test_the_mean_rate_is_kept_and_time_never_falls(pattern: Pattern) -> None:
    at_us = moments(pattern, rate_hz=1.0, count=3 * 86_400)  # three days
    assert (np.diff(at_us) >= 0).all()
    assert (at_us % 1000 == 0).all()
    assert at_us[-1] - START_US == pytest.approx(3 * DAY_US, rel=0.01)


def test_steady_gaps_are_equal_and_do_not_drift() -> None:
    at_us = moments(Pattern.STEADY, rate_hz=3.0, count=9000, chunk=7)
    assert np.abs(at_us - START_US - np.arange(1, 9001) * SECOND_US / 3).max() < 2000
    assert set(gaps_us(Pattern.STEADY, 4.0, 5, np.random.default_rng(0)).tolist()) == {250_000.0}


def test_poisson_counts_have_the_variance_of_their_mean() -> None:
    at_us = moments(Pattern.POISSON, rate_hz=10.0, count=100_000)
    counts = np.bincount((at_us - START_US) // MINUTE_US)[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.3)


def test_most_events_lie_in_bursts() -> None:
    at_us = moments(Pattern.BURSTS, rate_hz=20.0, count=100_000)
    within = (at_us % MINUTE_US - MINUTE_US // 2) % MINUTE_US < BURST_US
    assert within.mean() == pytest.approx(BURST_SHARE, abs=0.02)


def test_a_day_has_its_peak_in_the_evening_and_its_trough_in_the_morning() -> None:
    at_us = moments(Pattern.DIURNAL, rate_hz=1.0, count=2 * 86_400)
    by_hour = np.bincount(at_us % DAY_US // HOUR_US, minlength=24)
    assert abs(int(by_hour.argmax()) - 18) <= 2
    assert abs(int(by_hour.argmin()) - 6) <= 2
    assert by_hour.max() > 5 * by_hour.min()


@pytest.mark.parametrize("pattern", list(Pattern))
def test_how_times_are_cut_changes_next_to_nothing(pattern: Pattern) -> None:
    one, other = (moments(pattern, rate_hz=50.0, count=5000, chunk=chunk) for chunk in (5000, 113))
    assert np.abs(one - other).max() <= 1000


@given(st.integers(1, 200), st.floats(0, 3), st.integers(0, 2**32))
def test_keys_stay_within_their_number(entities: int, skew: float, seed: int) -> None:
    who = skewed(entities, skew)(500, np.random.default_rng(seed))
    assert who.min() >= 0
    assert who.max() < entities


def test_keys_follow_zipfs_law() -> None:
    counts = np.bincount(skewed(1000, 1.2)(400_000, np.random.default_rng(0)), minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10**1.2, rel=0.1)
    even = np.bincount(skewed(1000, 0.0)(400_000, np.random.default_rng(0)), minlength=1000)
    assert even.max() < 1.4 * even.min()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_writes_what_its_topic_declares_from_its_seed(name: str) -> None:
    source = SOURCES[name]
    events = list(rows(generate(source, 3000, seed=5)))
    assert events == list(rows(generate(source, 3000, seed=5)))
    assert events != list(rows(generate(source, 3000, seed=6)))
    found = [orjson.loads(event.value) for event in events]
    for fields, event in zip(found, events, strict=True):
        assert list(fields) == list(source.topic.fields)
        assert fields[source.topic.key].encode() == event.key
        for field, kind in source.topic.fields.items():
            assert fields[field] is None or type(fields[field]) is JSON_TYPES[kind]
    always = [field for field in source.topic.fields if all(fields[field] is not None for fields in found)]
    assert set(source.topic.fields) - set(always) <= {"lesion_mm"}
    varied = [field for field in source.topic.fields if len({fields[field] for fields in found}) > 1]
    assert varied == list(source.topic.fields)


def test_an_entity_has_habits_of_its_own() -> None:
    found = [orjson.loads(event.value) for event in rows(generate(SOURCES["measurements"], 20_000))]
    by_series: dict[str, list[float]] = {}
    for fields in found:
        if not fields["anomaly"]:
            by_series.setdefault(fields["series"], []).append(fields["value"])
    within = np.mean([np.std(values) for values in by_series.values()])
    between = np.std([np.mean(values) for values in by_series.values()])
    assert between > 3 * within


def test_labels_come_later_for_most_predictions_and_mostly_agree() -> None:
    events = list(predictions(20_000, seed=2))
    assert np.concatenate([part.times_us for part in events]).tolist() == sorted(
        np.concatenate([part.times_us for part in events]).tolist()
    )
    routes = np.concatenate([part.routes for part in events]).tolist()
    found = [orjson.loads(event.value) for event in rows(events)]
    made = {fields["id"]: fields for fields, route in zip(found, routes, strict=True) if route == 0}
    labels = [fields for fields, route in zip(found, routes, strict=True) if route == 1]
    assert len(made) == 20_000
    assert list(next(iter(made.values()))) == list(PREDICTIONS.fields)
    assert all(list(fields) == list(LABELS.fields) for fields in labels)
    assert len({fields["id"] for fields in labels}) == len(labels) == pytest.approx(LABELLED * 20_000, rel=0.02)
    assert all(fields["time"] >= made[fields["id"]]["time"] for fields in labels)
    agree = [(fields["label"] == "true") == made[fields["id"]]["output"]["robot"] for fields in labels]
    assert np.mean(agree) == pytest.approx(RIGHT, abs=0.02)


def test_two_seeds_do_not_share_the_ids_of_predictions() -> None:
    one, other = ({event.key for event in rows(predictions(100, seed=seed))} for seed in (1, 2))
    assert not one & other


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--events-per-second"):
            generate(SOURCES["scans"], 10, shape=Shape(rate_hz=rate))
