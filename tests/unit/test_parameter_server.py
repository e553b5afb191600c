"""The server of the parameter server variant without Ray: workers in step compute what one process computes."""

import asyncio
import copy

import torch

from models.probe.task import ProbeTask
from models.training import randomness
from models.training.config import TrainConfig
from models.training.order import pick
from models.training.parameter_server import Served, Server
from models.training.schedules import learning_rate

TASK = ProbeTask()
CONFIG = TrainConfig(steps=6, batch_size=9, learning_rate=0.05, workers=3)


async def work(server: Server, rank: int, pauses: int) -> None:
    """One worker, which lets the others go first a number of times before every step."""
    network = TASK.build()
    weights = await server.weights()
    for step in range(CONFIG.steps):
        with torch.no_grad():
            for parameter, weight in zip(network.parameters(), weights, strict=True):
                parameter.copy_(weight)
        samples = pick(step * CONFIG.batch_size, CONFIG.batch_size, TASK.size, CONFIG.seed)[rank::3]
        total, count = TASK.loss(network, TASK.batch(samples))
        for _ in range(pauses):
            await asyncio.sleep(0)
        gradients = list(torch.autograd.grad(total, list(network.parameters())))
        weights = await server.push(rank, gradients, float(total.detach()), count)


async def train(staleness: int | None) -> Server:
    server = Server(TASK, CONFIG, staleness)
    await asyncio.gather(*(work(server, rank, 1 + 20 * rank) for rank in range(3)))
    return server


def test_in_step_it_is_one_process_on_the_whole_batch() -> None:
    served = asyncio.run(_result(None))
    randomness.seed(CONFIG.seed)
    network = TASK.build()
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), weight_decay=CONFIG.weight_decay)
    losses = {}
    for step in range(CONFIG.steps):
        samples = pick(step * CONFIG.batch_size, CONFIG.batch_size, TASK.size, CONFIG.seed)
        total, count = TASK.loss(network, TASK.batch(samples))
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CONFIG.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(CONFIG, step)
        optimizer.step()
        losses[step + 1] = float(total.detach()) / count
    torch.testing.assert_close(dict(served.losses), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(served.weights), copy.deepcopy(dict(network.state_dict())), rtol=1e-4, atol=1e-6)
    assert served.lead == 1


def test_workers_run_ahead_as_far_as_they_may_and_no_further() -> None:
    leads = {staleness: asyncio.run(_result(staleness)).lead for staleness in (0, 1, 3)}
    assert leads == {0: 1, 1: 2, 3: 4}, "a worker that is the allowed number ahead has sent one more and waits"


async def _result(staleness: int | None) -> Served:
    return await (await train(staleness)).result()
