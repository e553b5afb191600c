"""The command that transcribes files, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from models.whisper import network as networks
from models.whisper.predict import WhisperPredictor

ROOT = Path(__file__).parents[2]
RATE_HZ = 8000


def test_files_are_transcribed_live_and_a_broken_one_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens, features = networks.tokenizer(None, ["one two"]), networks.extractor(None, RATE_HZ, 1, 20, 20.0)
    network = networks.small(tokens, features, width=16, layers=1, heads=2, dropout=0.0, max_tokens=8)
    WhisperPredictor(network, tokens, features).save(tmp_path / "model")
    rng = np.random.default_rng(0)
    seconds = {"long.wav": 3.3, "short.wav": 0.4}
    for name, length in seconds.items():
        soundfile.write(tmp_path / name, rng.normal(0, 0.1, round(length * 16000)), 16000)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    files = ["long.wav", "broken.wav", "missing.wav", "short.wav"]
    done = subprocess.run(
        [sys.executable, ROOT / "ray_jobs" / "transcribe.py", "--model", "model", *files, "--stream", "--words"],
        cwd=tmp_path,
        env=os.environ | {"MILLRACE_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    *lines, result = [json.loads(line) for line in done.stdout.splitlines()]
    assert result == {"files": 2, "skipped": 2, "doubtful": 2}
    updates = [line for line in lines if "heard_s" in line]
    ends = {line["file"]: line for line in lines if "heard_s" not in line}
    assert list(ends) == files
    assert ends["broken.wav"]["error"].startswith("The audio can't be decoded")
    assert ends["missing.wav"] == {
        "file": "missing.wav",
        "error": "The file can't be read (No such file or directory).",
    }
    assert {line["file"] for line in updates} == {"long.wav"}, "the short one is over before the first step"
    confirmed = [line["confirmed"].split() for line in updates]
    assert all(after[: len(before)] == before for before, after in zip(confirmed, confirmed[1:], strict=False))
    for name, length in seconds.items():
        words = ends[name]["words"]
        assert " ".join(word["text"] for word in words) == ends[name]["text"] != ""
        times = [0.0, *(time for word in words for time in (word["start_s"], word["end_s"])), length]
        assert times == sorted(times)
        assert ends[name]["doubtful"] is (ends[name]["confidence"] < 0.6)
