"""The command itself, as a user types it without a cluster: one JSON line, or one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "ray_jobs" / "train_whisper.py"


def job(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=home.parent,
        env=os.environ | {"MILLRACE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_trains_on_a_ray_of_its_own(home: Path) -> None:
    tiny = str(ROOT / "configs" / "whisper" / "tiny.yaml")
    done = job(home, "--config", tiny, "--set", "train.steps=4", "--set", "train.log_every=2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 4
    assert result["source"] == "synthetic"
    said = done.stderr + done.stdout
    assert '"event": "progress"' in said
    assert "actor state" not in said, "nothing asks the dashboard that isn't there"
    (features,) = (home / "features" / "offline" / "utterance_audio").glob("*.parquet")
    assert pq.read_table(features).num_rows == 4


def test_a_domain_is_adapted_from_the_registered_base(home: Path) -> None:
    small = [
        *("data.sentences=12", "data.takes=1", "data.test_sentences=2", "data.validation_utterances=2"),
        *("data.noise.noises=[wind]", "data.noise.snr_db=[5]", "train.steps=2", "train.batch_size=2"),
    ]
    network = ["network.width=16", "network.layers=1", "network.heads=2", "network.mel_bins=20"]
    settings = [word for setting in small for word in ("--set", setting)]
    sizes = [word for setting in network for word in ("--set", setting)]
    configs = ROOT / "configs" / "whisper"
    base = job(home, "--config", str(configs / "dictation-general.yaml"), *settings, *sizes)
    assert base.returncode == 0, base.stderr
    assert set(json.loads(base.stdout.splitlines()[-1])["wer_by"]) == {"general, clean", "general, noisy"}
    spoken = sorted((home / "speech").iterdir())
    assert len(spoken) == 1
    field = job(home, "--config", str(configs / "dictation-field.yaml"), *settings)
    assert field.returncode == 0, field.stderr
    result = json.loads(field.stdout.splitlines()[-1])
    assert set(result["wer_by"]) == {"general, clean", "general, noisy", "field, clean", "field, noisy"}
    assert result["source"] == "synthetic field"
    features = [pq.read_table(path) for path in (home / "features" / "offline" / "utterance_audio").glob("*.parquet")]
    conditions = {condition for table in features for condition in table["condition"].to_pylist()}
    assert conditions == {"general, clean", "general, wind 5 dB", "field, clean", "field, wind 5 dB"}


def test_a_bad_configuration_is_one_line(home: Path) -> None:
    digits = str(ROOT / "configs" / "whisper" / "digits.yaml")
    wrong = job(home, "--config", digits, "--set", "train.step=4")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    last = wrong.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "train.step " in last
    assert "did you mean steps?" in last
