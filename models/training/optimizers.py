"""The optimizer of every training."""

import torch
from torch import nn

from models.training.config import TrainConfig


def adamw(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with its state there from the start, so that a checkpoint can be loaded into it.

    Parameters that are spread differently are in groups of their own, because one kernel can't work on both.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups.values()],
        config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        zeros = [torch.zeros_like(parameter, requires_grad=False) for _ in range(2)]
        step = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    return optimizer
