"""`stack.json`: what was started, by whichever command, so that a later one can find and end exactly that."""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """The record cannot be read, or another command is changing it."""


class Record:
    """The parts that were started, with their handles, and the addresses they were started with.

    Every change is on the disk when its method returns, by rename; threads may share one object. The addresses stay
    when the last part has gone: a shell may still hold them in its environment.
    """

    def __init__(self, path: Path, layout: Mapping[str, Any], parts: Mapping[str, Mapping[str, object]]) -> None:
        self.path = path
        self._layout = dict(layout)
        self._parts = dict(parts)
        self._lock = threading.Lock()

    @classmethod
    def read(cls, home: Path) -> "Record":
        """Read the record of a home; an empty one where nothing was ever started."""
        path = home / "stack.json"
        try:
            content = json.loads(path.read_text())
            return cls(path, content["layout"], content["parts"])
        except FileNotFoundError:
            return cls(path, {}, {})
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} cannot be read ({error}); end what it names by hand and delete it") from None

    @property
    def layout(self) -> Mapping[str, Any]:
        """Ports and addresses of the last start; empty if there was none."""
        return self._layout

    @property
    def parts(self) -> Mapping[str, Mapping[str, object]]:
        """Handles by name, in the order of their start."""
        return dict(self._parts)

    def begin(self, layout: Mapping[str, Any]) -> None:
        """Note the addresses of the stack that is about to start."""
        with self._lock:
            self._layout = dict(layout)
            self._write()

    def put(self, name: str, handle: Mapping[str, object]) -> None:
        """Note a part that was started."""
        with self._lock:
            self._parts[name] = handle
            self._write()

    def drop(self, name: str) -> None:
        """Forget a part that has ended."""
        with self._lock:
            self._parts.pop(name, None)
            self._write()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep other commands from changing this stack; the lock goes with the process, however it ends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(
                    f"another `millrace up` or `millrace down` is at work on {self.path.parent}; wait for it"
                ) from None
            yield

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"layout": self._layout, "parts": self._parts}, indent=2) + "\n")
        scratch.replace(self.path)
