"""Availability batching: whatever waits goes to the model the moment a worker is free, and nothing waits for company.

At low load every item runs at once and alone; under load batches grow by themselves to what arrived during the call
before. A worker is a slot on an executor, not a thread of its own, so the whole is driven step by step in tests.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serving.errors import ServingError, deadline_passed

In = TypeVar("In")
Out = TypeVar("Out")


def _one(_: object) -> int:
    return 1


def _unobserved(_size: int, _seconds: float) -> None:
    return None


@dataclass(eq=False, slots=True)
class _Waiting(Generic[In, Out]):
    item: In
    size: int
    timeout_s: float | None
    deadline: float
    future: Future[Out] = field(default_factory=Future)


class Batcher(Generic[In, Out]):
    """Turns single items into calls of `execute` on batches, first come, first served.

    Args:
        execute: gets the items of a batch in order of arrival and returns as many results in that order; an exception
            as a result fails its item alone. When the call itself raises, the batch is halved and run again until the
            item at fault stands alone, so `execute` must be safe to repeat.
        executor: where batches run; at most `workers` of them at a time.
        max_batch_size: the sum of sizes a batch; an item that is larger by itself runs alone.
        max_queue: items that may wait; one more is refused.
        size: how much of a batch an item takes.
        clock: seconds, monotonic.
        observe: told the size and seconds of every batch.
    """

    def __init__(
        self,
        execute: Callable[[Sequence[In]], Sequence[Out | Exception]],
        *,
        executor: Executor,
        max_batch_size: int,
        max_queue: int,
        workers: int = 1,
        size: Callable[[In], int] = _one,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[int, float], None] = _unobserved,
    ) -> None:
        self._execute = execute
        self._executor = executor
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._workers = workers
        self._size = size
        self._clock = clock
        self._observe = observe
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting[In, Out]] = {}
        self._tickets = itertools.count()
        self._busy = 0
        self._batch_s = 0.0

    @property
    def queue_size(self) -> int:
        """Items that wait for a worker."""
        return len(self._waiting)

    def submit(self, item: In, timeout_s: float | None = None) -> Future[Out]:
        """Queue an item; cancelling the future before its batch starts frees its place at once.

        The future fails with a `ServingError` of status 504 when the item's turn comes after `timeout_s`.

        Raises:
            ServingError: status 429 with `retry_after_s`, when the queue is full.
        """
        deadline = math.inf if timeout_s is None else self._clock() + timeout_s
        entry = _Waiting[In, Out](item, self._size(item), timeout_s, deadline)
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                raise self._full()
            ticket = next(self._tickets)
            self._waiting[ticket] = entry
            starts = self._busy < self._workers
            self._busy += starts
        entry.future.add_done_callback(lambda _: self._forget(ticket))
        if starts:
            self._executor.submit(self._drain)
        return entry.future

    def _full(self) -> ServingError:
        batches = len(self._waiting) / self._max_batch_size / self._workers
        retry_after_s = max(1.0, math.ceil(batches * self._batch_s))
        message = f"{len(self._waiting)} requests are waiting, which is the limit; try again in {retry_after_s:g} s"
        return ServingError(429, message, "queue_full", retry_after_s=retry_after_s)

    def _forget(self, ticket: int) -> None:
        with self._lock:
            self._waiting.pop(ticket, None)

    def _drain(self) -> None:
        while batch := self._take():
            self._run(batch)

    def _take(self) -> list[_Waiting[In, Out]]:
        """The next batch; an empty one gives the worker's slot back."""
        batch: list[_Waiting[In, Out]] = []
        expired: list[_Waiting[In, Out]] = []
        total = 0
        with self._lock:
            now = self._clock()
            while self._waiting:
                ticket, entry = next(iter(self._waiting.items()))
                if batch and total + entry.size > self._max_batch_size:
                    break
                del self._waiting[ticket]
                if not entry.future.set_running_or_notify_cancel():
                    continue
                if now >= entry.deadline:
                    expired.append(entry)
                    continue
                batch.append(entry)
                total += entry.size
            self._busy -= not batch
        for entry in expired:
            entry.future.set_exception(deadline_passed(entry.timeout_s or 0.0))
        return batch

    def _run(self, batch: list[_Waiting[In, Out]]) -> None:
        started = self._clock()
        results = self._results([entry.item for entry in batch])
        self._batch_s = self._clock() - started
        self._observe(sum(entry.size for entry in batch), self._batch_s)
        for entry, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)

    def _results(self, items: list[In]) -> list[Out | Exception]:
        try:
            results = list(self._execute(items))
        except Exception as error:
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._results(items[:half]) + self._results(items[half:])
        if len(results) != len(items):
            return [RuntimeError(f"the model gave {len(results)} results for {len(items)} items")] * len(items)
        return results
