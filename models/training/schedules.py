"""Learning rates as a function of the step alone, so that a schedule has no state to be saved."""

import math

from models.training.config import TrainConfig

FIRST = 1 / 25
LAST = 1e-4 / 25
"""Where the one-cycle schedule (Smith and Topin, 2018) begins and ends, as fractions of its peak."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0 to `config.steps` - 1."""
    if config.schedule == "one-cycle":
        return config.learning_rate * _one_cycle(step, config.steps, config.warmup)
    rising = config.warmup * config.steps
    if step + 1 < rising:
        return config.learning_rate * (step + 1) / rising
    done = (step + 1 - rising) / (config.steps + 1 - rising)
    falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * falling[config.schedule]


def _one_cycle(step: int, steps: int, warmup: float) -> float:
    """As `torch.optim.lr_scheduler.OneCycleLR` with its defaults; both ways are half a cosine."""
    peak = warmup * steps - 1
    if step <= peak:
        return _between(FIRST, 1.0, step / peak if peak else 1.0)
    return _between(1.0, LAST, (step - peak) / (steps - 1 - peak))


def _between(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
