"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = 90) -> None:
    """Return once the condition holds; fail after the timeout, saying what did not come."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.1)
