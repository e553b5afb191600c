"""The loop around whoever computes partitions: step after step, until told to stop or until nothing is left to read.

A broker or store that is away is tried again with growing pauses, for as long as it takes; once the end has begun, for
a minute.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable

from kafka.errors import KafkaError

from streaming.saving import SavingError

log = logging.getLogger(__name__)

FINISH_S = 60.0
BACKOFF_S = (0.2, 5.0)
SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def run(
    view: str,
    stop: threading.Event,
    *,
    step: Callable[[], int],
    ended: Callable[[], bool],
    checkpoint: Callable[[], None],
    refresh_status: Callable[[], None],
    monotonic_s: Callable[[], float],
) -> None:
    """Step, and at the end checkpoint.

    Args:
        view: what is computed, for the log.
        stop: set when it should end.
        step: returns how many records it has read.
        ended: asked when a step has read none.
        checkpoint: makes everything durable.
        refresh_status: called while it waits, and at the end.
        monotonic_s: clock for intervals.
    """
    pause_s = BACKOFF_S[0]
    finish_s: float | None = None
    while True:
        try:
            if finish_s is not None or stop.is_set():
                finish_s = finish_s or monotonic_s() + FINISH_S
                checkpoint()
                break
            if not step() and ended():
                finish_s = monotonic_s() + FINISH_S
            pause_s = BACKOFF_S[0]
        except (KafkaError, sqlite3.OperationalError, OSError) as error:
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode not in SQLITE_BUSY:
                raise
            if finish_s is not None and monotonic_s() > finish_s:
                raise
            log.warning("trying again", extra={"view": view, "pause_s": pause_s, "error": repr(error)})
            refresh_status()
            if isinstance(error, SavingError) and finish_s is None:
                continue  # the next try has its time, the loop need not wait for it
            time.sleep(pause_s) if stop.is_set() else stop.wait(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_S[1])
    refresh_status()
    log.info("stopped", extra={"view": view})
