"""The place in the data of a training run, and its configuration."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.trainer import TrainConfig, pick
from models.training import randomness
from models.training.schedules import learning_rate


@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 60),
    steps=st.integers(1, 8),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_ranks_and_restarts_skip_and_repeat_nothing(
    size: int, batch: int, steps: int, world_size: int, seed: int
) -> None:
    undisturbed = pick(0, steps * batch, size, seed)
    shared = [
        sample
        for step in range(steps)
        for rank in range(world_size)
        for sample in pick(step * batch, batch, size, seed)[rank::world_size]
    ]
    assert Counter(shared) == Counter(undisturbed)
    whole_epochs = steps * batch // size
    assert sorted(undisturbed[: whole_epochs * size]) == [(e, i) for e in range(whole_epochs) for i in range(size)]


def test_epochs_and_seeds_have_their_own_order() -> None:
    first, second = pick(0, 100, 100, seed=0), pick(100, 100, 100, seed=0)
    assert [index for _, index in first] != [index for _, index in second]
    assert first != pick(0, 100, 100, seed=1)
    assert first == pick(0, 100, 100, seed=0)


def test_a_batch_too_small_for_its_workers_is_refused() -> None:
    with pytest.raises(ValidationError, match="batch_size must be at least the number of workers"):
        TrainConfig(batch_size=2, workers=3)


def test_random_states_survive_a_safe_load() -> None:
    saved = randomness.save()
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    randomness.restore(saved)
    with randomness.undisturbed():
        torch.rand(1)
        np.random.rand(1)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn


@pytest.mark.parametrize(("steps", "warmup"), [(1200, 0.1), (50, 0.5), (7, 0.3), (4, 0.1)])
def test_one_cycle_is_that_of_torch(steps: int, warmup: float) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, learning_rate=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    for step in range(steps):
        assert learning_rate(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            oracle.step()


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear", "one-cycle"]),
    steps=st.integers(1, 300),
    warmup=st.floats(0.01, 0.99),
)
def test_schedules_rise_to_the_peak_and_never_again(schedule: str, steps: int, warmup: float) -> None:
    config = TrainConfig.model_validate({"schedule": schedule, "steps": steps, "warmup": warmup})
    rates = [learning_rate(config, step) / config.learning_rate for step in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == pytest.approx(sorted(rates[peak:], reverse=True), abs=1e-12)
    if schedule == "constant":
        assert rates[-1] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": [3, 2]}, "two ascending"),
        ({"workers": 4, "accumulate": 8}, "times accumulate"),
        ({"workers": [1, 2], "parallelism": "tensor"}, "fixed number"),
        ({"workers": 3, "parallelism": "fsdp+tensor"}, "multiple of tensor_size"),
        ({"workers": 2, "parallelism": "pipeline"}, "needs accumulate"),
    ],
)
def test_what_cannot_be_trained_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(values)
