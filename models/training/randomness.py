"""The random states of Python, numpy and torch, as one: seeded, saved into a tensor and set again."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seed all of them with one number."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside, the states are afterwards what they were before."""
    state = _get()
    try:
        yield
    finally:
        _set(state)


def save() -> Tensor:
    """The states as uint8[N], in types that `torch.load(weights_only=True)` reads."""
    file = BytesIO()
    torch.save(_get(), file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def restore(saved: Tensor) -> None:
    """Set the states that `save` gave."""
    _set(torch.load(BytesIO(saved.numpy().tobytes()), weights_only=True))


def _get() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):  # there may be fewer now
        torch.cuda.set_rng_state(saved, device)
