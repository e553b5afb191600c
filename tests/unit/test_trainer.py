"""The place in the data of a training run, and its configuration."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.trainer import TrainConfig, pick


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
    from io import BytesIO

    import numpy as np

    from models.trainer import _random_state, _set_random_state

    file = BytesIO()
    torch.save(_random_state(), file)
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist()
    file.seek(0)
    _set_random_state(torch.load(file, weights_only=True))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == drawn
