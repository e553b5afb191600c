"""The availability batcher, driven step by step: no thread, no clock, no sleep."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching import Batcher
from serving.errors import ServingError


class Stepped(Executor):
    """Holds submitted calls until `run`, so that a test decides when a worker gets to work."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self) -> None:
        while self.calls:
            self.calls.pop(0)()


@dataclass
class Item:
    number: int
    size: int = 1
    bad: bool = False


@dataclass
class World:
    """A batcher over a model that doubles numbers, and refuses a batch with a bad item in it as a whole."""

    max_batch_size: int = 4
    max_queue: int = 8
    now: float = 0.0
    during: Callable[[], None] = lambda: None
    batches: list[list[Item]] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executor = Stepped()
        self.batcher: Batcher[Item, int] = Batcher(
            self.execute,
            executor=self.executor,
            max_batch_size=self.max_batch_size,
            max_queue=self.max_queue,
            size=lambda item: item.size,
            clock=lambda: self.now,
            observe=lambda size, _: self.observed.append(size),
        )

    def execute(self, items: Sequence[Item]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.during()
        if any(item.bad for item in items):
            raise ValueError("bad item")
        return [item.number * 2 for item in items]


def test_an_item_goes_at_once_and_alone_when_the_worker_is_free():
    world = World()
    future = world.batcher.submit(Item(1))
    assert len(world.executor.calls) == 1
    world.executor.run()
    assert future.result(0) == 2
    assert world.observed == [1]


def test_what_arrives_during_a_call_is_the_next_batch():
    world = World()
    late: list[Future[int]] = []

    def arrive() -> None:
        world.during = lambda: None
        late.extend(world.batcher.submit(Item(number)) for number in range(6))

    world.during = arrive
    world.batcher.submit(Item(9))
    world.executor.run()
    assert [len(batch) for batch in world.batches] == [1, 4, 2]
    assert [future.result(0) for future in late] == [0, 2, 4, 6, 8, 10]


def test_a_batch_counts_the_size_of_items_and_one_that_is_too_large_runs_alone():
    world = World(max_batch_size=4)
    for size in (3, 2, 9, 1):
        world.batcher.submit(Item(size, size))
    world.executor.run()
    assert [[item.size for item in batch] for batch in world.batches] == [[3], [2], [9], [1]]


def test_a_full_queue_refuses_with_429_and_when_to_come_back():
    world = World(max_queue=2)
    world.batcher.submit(Item(0))
    world.batcher.submit(Item(1))
    with pytest.raises(ServingError) as refused:
        world.batcher.submit(Item(2))
    assert refused.value.status == 429
    assert refused.value.retry_after_s == 1.0


def test_retry_after_grows_with_the_time_that_the_queue_needs():
    world = World(max_batch_size=1, max_queue=3)

    def slow() -> None:
        world.now += 10

    world.during = slow
    world.batcher.submit(Item(0))
    world.executor.run()
    for number in range(3):
        world.batcher.submit(Item(number))
    with pytest.raises(ServingError) as refused:
        world.batcher.submit(Item(3))
    assert refused.value.retry_after_s == 30.0


def test_a_cancelled_item_frees_its_place_and_is_not_run():
    world = World(max_queue=1)
    assert world.batcher.submit(Item(0)).cancel()
    future = world.batcher.submit(Item(1))
    world.executor.run()
    assert future.result(0) == 2
    assert world.batches == [[Item(1)]]


def test_an_item_whose_deadline_passed_in_the_queue_fails_with_504_and_its_neighbours_live():
    world = World()
    late = world.batcher.submit(Item(0), timeout_s=1.0)
    other = world.batcher.submit(Item(1), timeout_s=5.0)
    world.now = 1.0
    world.executor.run()
    with pytest.raises(ServingError) as failed:
        late.result(0)
    assert failed.value.status == 504
    assert other.result(0) == 2
    assert world.batches == [[Item(1)]]


def test_a_wrong_number_of_results_fails_the_batch_and_not_the_batcher():
    executor = Stepped()
    batcher: Batcher[int, int] = Batcher(lambda items: [], executor=executor, max_batch_size=2, max_queue=2)
    futures = [batcher.submit(0), batcher.submit(1)]
    executor.run()
    for future in futures:
        assert "0 results for 2 items" in str(future.exception(0))
    assert batcher.queue_size == 0


def test_results_may_be_exceptions_of_single_items():
    executor = Stepped()
    batcher: Batcher[int, int] = Batcher(
        lambda items: [item if item else KeyError("zero") for item in items],
        executor=executor,
        max_batch_size=2,
        max_queue=2,
    )
    bad, good = batcher.submit(0), batcher.submit(1)
    executor.run()
    assert isinstance(bad.exception(0), KeyError)
    assert good.result(0) == 1


actions = st.one_of(
    st.builds(
        lambda size, bad, timeout_s: ("submit", size, bad, timeout_s),
        st.integers(1, 6),
        st.booleans() | st.just(False),
        st.none() | st.integers(1, 5),
    ),
    st.builds(lambda index: ("cancel", index), st.integers(0, 30)),
    st.builds(lambda seconds: ("wait", seconds), st.integers(1, 4)),
)


@given(st.lists(st.lists(actions, max_size=8), max_size=12), st.integers(1, 5), st.integers(1, 6))
def test_any_interleaving_answers_every_accepted_item_once_in_order(script, max_batch_size, max_queue):
    """Actions of each round of the script happen while the model is busy with a batch."""
    world = World(max_batch_size=max_batch_size, max_queue=max_queue)
    rounds = [list(each) for each in script]
    accepted: list[tuple[Item, float | None, Future[int]]] = []
    cancelled: set[int] = set()
    started_at: dict[int, float] = {}

    def act() -> None:
        for item in world.batches[-1] if world.batches else []:
            started_at.setdefault(item.number, world.now)
        for action in rounds.pop(0) if rounds else []:
            match action:
                case ("submit", size, bad, timeout_s):
                    item = Item(len(accepted), size, bad)
                    if world.batcher.queue_size == max_queue:
                        with pytest.raises(ServingError, match="waiting"):
                            world.batcher.submit(item, timeout_s)
                        continue
                    deadline = None if timeout_s is None else world.now + timeout_s
                    accepted.append((item, deadline, world.batcher.submit(item, timeout_s)))
                case ("cancel", index):
                    if index < len(accepted) and accepted[index][2].cancel():
                        cancelled.add(index)
                case ("wait", seconds):
                    world.now += seconds

    world.during = act
    while rounds:
        world.batches.append([])
        act()
        world.batches.pop()
        world.executor.run()
    world.executor.run()

    assert world.batcher.queue_size == 0
    first_runs = list(dict.fromkeys(item.number for batch in world.batches for item in batch))
    assert first_runs == sorted(first_runs), "first come, first served"
    for batch in world.batches:
        assert len(batch) == 1 or sum(item.size for item in batch) <= max_batch_size
    for item, deadline, future in accepted:
        assert future.done()
        if item.number in cancelled:
            assert item.number not in first_runs
        elif item.number not in first_runs:
            assert deadline is not None
            assert isinstance(future.exception(0), ServingError)
        elif item.bad:
            assert isinstance(future.exception(0), ValueError)
        else:
            assert future.result(0) == item.number * 2
            assert deadline is None or started_at[item.number] < deadline


def test_many_threads_get_their_own_answers():
    with ThreadPoolExecutor(2) as workers, ThreadPoolExecutor(16) as callers:
        batcher: Batcher[int, int] = Batcher(
            lambda items: [item * item for item in items], executor=workers, max_batch_size=8, max_queue=1000, workers=2
        )
        barrier = threading.Barrier(16)

        def call(start: int) -> list[int]:
            barrier.wait(30)
            return [batcher.submit(start + step).result(30) for step in range(50)]

        found = list(callers.map(call, range(0, 1600, 100)))
    assert found == [[(start + step) ** 2 for step in range(50)] for start in range(0, 1600, 100)]
