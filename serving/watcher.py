"""Follows the registry: when an alias moves, the server loads the new version and swaps."""

import logging
import threading
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


class Watcher:
    """Polls the registry's aliases and hands them to the server; loads happen on the watcher's thread.

    The alias map itself is compared, because MLflow changes no time stamp when an alias is set. While the registry does
    not answer, the server goes on with what it has.

    Args:
        aliases: `Registry.aliases`.
        follow: `ModelServer.follow`.
        interval_s: between two polls.
    """

    def __init__(
        self,
        aliases: Callable[[], Mapping[tuple[str, str], int]],
        follow: Callable[[Mapping[tuple[str, str], int]], None],
        *,
        interval_s: float = 2.0,
    ) -> None:
        self._aliases = aliases
        self._follow = follow
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watcher", daemon=True)
        self.seen = False
        self.error = ""

    def start(self) -> None:
        """Begin polling."""
        self._thread.start()

    def close(self) -> None:
        """End after the poll at hand."""
        self._stop.set()

    @property
    def alive(self) -> bool:
        """Whether polling goes on."""
        return self._thread.is_alive()

    def poll(self) -> None:
        """Look once; an error is kept in `error` and logged when it is new."""
        try:
            aliases = self._aliases()
        except Exception as error:
            message = f"the model registry does not answer: {error}"
            if message != self.error:
                logger.warning(message)
            self.error = message
            return
        self.error = ""
        self._follow(aliases)
        self.seen = True

    def _work(self) -> None:
        while not self._stop.is_set():
            self.poll()
            self._stop.wait(self._interval_s)
