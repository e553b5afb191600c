"""Plain data parallel training as PyTorch's tutorial has it, under torchrun: the peer of the harness's throughput.

The same network, data, optimizer and clipping as the harness has, and nothing else: no validation, no checkpoint.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.training import BATCH, FIRST, LEARNING_RATE, STEPS, TASK
from models.training.order import pick


def main() -> None:
    """Train, and print steps a second on rank 0."""
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // dist.get_world_size()))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    network = DistributedDataParallel(TASK.build())
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    started_s = 0.0
    for step in range(STEPS):
        if step == FIRST:
            started_s = time.monotonic()
        batch = TASK.batch(pick(step * BATCH, BATCH, TASK.size, 0)[rank::world_size])
        total, count = TASK.loss(network, batch)
        optimizer.zero_grad()
        (total / count).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    if rank == 0:
        json.dump((STEPS - FIRST) / (time.monotonic() - started_s), sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
