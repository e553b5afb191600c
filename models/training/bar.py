"""A progress bar on the terminal of the process that started a training, fed by what its rank 0 notes in a file."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

POLL_S = 0.5


def note(path: Path, line: Mapping[str, object]) -> None:
    """Replace the note by this progress, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(line), encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def shown(path: Path, steps: int, console: Console | None = None) -> Iterator[None]:
    """Draw steps, loss and the time left on standard error while a training notes them; only if that is a terminal."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    over = threading.Event()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        follower = threading.Thread(
            target=_follow, args=(path, bars, bars.add_task("", total=steps), over), daemon=True
        )
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()


def _follow(path: Path, bars: Progress, bar: TaskID, over: threading.Event) -> None:
    """Read once more after the end, so that the bar ends where the training did."""
    last = False
    while not last:
        last = over.wait(POLL_S)
        if path.exists():
            line = json.loads(path.read_text(encoding="utf-8"))
            bars.update(bar, completed=line["step"], description=f"loss {line['loss']:.4g}")
