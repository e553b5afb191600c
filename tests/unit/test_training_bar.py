"""The progress bar: what it draws on a terminal, and that it stays away from anything else."""

import io
from pathlib import Path

from rich.console import Console

from models.training import bar


def drawn(path: Path, *, terminal: bool) -> str:
    text = io.StringIO()
    with bar.shown(path, 40, Console(file=text, force_terminal=terminal, width=100)):
        bar.note(path, {"step": 10, "loss": 2.5})
        bar.note(path, {"step": 40, "loss": 0.125})
    return text.getvalue()


def test_the_bar_ends_where_the_training_did(tmp_path: Path) -> None:
    text = drawn(tmp_path / "progress.json", terminal=True)
    assert "40/40" in text
    assert "loss 0.125" in text


def test_a_log_gets_no_bar(tmp_path: Path) -> None:
    assert drawn(tmp_path / "progress.json", terminal=False) == ""


def test_a_run_that_goes_on_starts_with_its_note(tmp_path: Path) -> None:
    bar.note(tmp_path / "progress.json", {"step": 20, "loss": 1.0})
    text = io.StringIO()
    with bar.shown(tmp_path / "progress.json", 40, Console(file=text, force_terminal=True, width=100)):
        pass
    assert "20/40" in text.getvalue()
