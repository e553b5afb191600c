"""Training checkpoints that a crash at any moment can't spoil: files first, a manifest with their hashes last.

A checkpoint is the folder `step-<number>`. All ranks write into `step-<number>.partial`; when all are done, rank 0
writes `manifest.json` (step, world size, configuration hash, sha256 of every file) and renames the folder: that is
the commit. Whatever is not committed is an orphan and is removed by the next `recover`, which trusts no file before
it has checked its hash.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
_FOLDER = re.compile(r"step-(\d{9})")


class CheckpointError(ValueError):
    """A checkpoint that belongs to something else, in one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files have the hashes of its manifest."""

    folder: Path
    step: int
    world_size: int
    facts: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one training run in a folder on a disk that all of its nodes share.

    Args:
        folder: made when the first checkpoint begins.
        config_hash: of what must not change between two parts of one run.
        keep: how many of the newest stay; the best one stays besides.
    """

    def __init__(self, folder: Path, config_hash: str, keep: int = 2) -> None:
        self._folder = folder
        self._config_hash = config_hash
        self._keep = keep

    def begin(self, step: int) -> Path:
        """The folder into which every rank writes its files of a step; it exists when this returns."""
        partial = self._folder / f"step-{step:09d}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def commit(self, step: int, world_size: int, best_step: int, facts: Mapping[str, Any]) -> Checkpoint:
        """Make a step's files durable and its folder a checkpoint, then remove all but the newest and the best.

        Rank 0 calls it, after all ranks have written.
        """
        partial = self.begin(step)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size,
            "config_hash": self._config_hash,
            "files": files,
            "facts": dict(facts),
        }
        for name in files:
            _sync(partial / name)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        final = self._folder / f"step-{step:09d}"
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(self._folder)
        kept = {*self.steps()[-self._keep :], best_step}
        for other in self.steps():
            if other not in kept:
                shutil.rmtree(self._folder / f"step-{other:09d}")
        return Checkpoint(final, step, world_size, dict(facts))

    def recover(self) -> Checkpoint | None:
        """The newest sound checkpoint; orphans, and damaged ones newer than it, are removed with a warning.

        Raises:
            CheckpointError: it was made with another configuration.
        """
        if not self._folder.is_dir():
            return None
        for orphan in self._folder.iterdir():
            if not _FOLDER.fullmatch(orphan.name):
                logger.warning(json.dumps({"event": "orphan removed", "path": str(orphan)}))
                shutil.rmtree(orphan, ignore_errors=True)
        for step in reversed(self.steps()):
            if (checkpoint := self.load(step)) is not None:
                return checkpoint
            logger.warning(json.dumps({"event": "damaged checkpoint removed", "step": step}))
            shutil.rmtree(self._folder / f"step-{step:09d}")
        return None

    def load(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step, or None when it isn't there or any of its files is not as it was written."""
        folder = self._folder / f"step-{step:09d}"
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sound = manifest["format"] == FORMAT and manifest["step"] == step
            sound = sound and all(_sha256(folder / name) == digest for name, digest in manifest["files"].items())
            config_hash, world_size, facts = manifest["config_hash"], manifest["world_size"], manifest["facts"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if not sound:
            return None
        if config_hash != self._config_hash:
            raise CheckpointError(
                f"{folder} was made with another configuration; give this run another train.name or remove the folder."
            )
        return Checkpoint(folder, step, world_size, facts)

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, sound or not, in ascending order."""
        matches = (_FOLDER.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
