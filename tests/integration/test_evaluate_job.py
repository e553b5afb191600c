"""The evaluation job as it is typed: anybody's files, and the registered models of a configuration."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mlflow import MlflowClient

from models import runs
from models.registry import BASELINE, CHAMPION, Registry
from models.whisper.config import WhisperConfig
from models.whisper.data import splits
from models.whisper.train import WhisperTask
from models.whisper.utterances import Splits, write_features
from ops.configuration import load

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "whisper" / "tiny.yaml"
OVERRIDES = ("registered_name=whisper-to-evaluate", "data.test_utterances=40", "evaluate.replicates=200")
OTHER_STEPS = "evaluate.preprocess=[{denoise: wiener, trim: true}]"
TIME_LIMIT_S = 400


def job(arguments: Sequence[str | Path], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "ray_jobs" / "evaluate.py", *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )


def test_files_are_evaluated_and_a_wrong_one_is_one_clear_line(tmp_path: Path, home: Path) -> None:
    predictions, references = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    predictions.write_text('{"id": 1, "prediction": "X X Y Y"}\n{"id": 2, "prediction": "a b"}\n')
    references.write_text('{"id": 1, "reference": "X"}\n{"id": 2, "reference": "a b"}\n')
    files = ["--predictions", predictions, "--references", references]
    done = job([*files, "--metrics", "wer,cer", "--output", tmp_path / "out"], {})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["predictions"]["wer"] == 1.0
    assert result["predictions"]["cer"] == 1.5
    assert result["samples"] == 2
    assert all(Path(path).parent == tmp_path / "out" and Path(path).is_file() for path in result["report"].values())
    assert not list(home.iterdir()), "somebody's files need no state of ours"
    refused = job([*files, "--metrics", "werr"], {})
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == "error: There is no metric 'werr': did you mean 'wer'?"


def test_champion_and_baseline_are_compared_with_slices_from_feast(repo: Path, home: Path, mlflow_uri: str) -> None:
    config = load(WhisperConfig, TINY, OVERRIDES)
    found = splits(config.data, None, home)
    register(config, found, mlflow_uri, home)
    write_features(found, home / "features" / "offline" / "utterance_audio")
    overrides = [part for override in (*OVERRIDES, OTHER_STEPS) for part in ("--set", override)]
    done = job(["--config", TINY, *overrides, "--repo", repo], {"MLFLOW_TRACKING_URI": mlflow_uri})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["samples"], result["features_found"], result["features_missing"]) == (40, 40, 0)
    for system in ("champion", "baseline", "champion: wiener and trim"):
        assert result[system]["wer_low"] <= result[system]["wer"] <= result[system]["wer_high"]
    difference = result["champion"]["cer"] - result["baseline"]["cer"]
    assert abs(result["difference"]["cer"] - difference) < 1e-9
    report = json.loads(Path(result["report"]["json"]).read_text())
    assert report["dataset"]["hash"] == result["data_hash"] == found.hash
    assert report["systems"][0]["version"] == "whisper-to-evaluate version 1"
    assert not report["slices"]["shown"], "one voice, one kind of sentence, no noise: nothing to tell apart"
    assert {part["dimension"] for part in report["slices"]["hidden"]} == {"duration_s", "level_db"}
    assert MlflowClient(mlflow_uri).get_run(result["run_id"]).data.metrics["champion_wer"] == result["champion"]["wer"]


def register(config: WhisperConfig, found: Splits, mlflow_uri: str, home: Path) -> None:
    """Two untrained networks, which say different things and do not take the time of training."""
    task = WhisperTask(config, found.train, found.validation)
    registry = Registry(mlflow_uri)
    with runs.opened(mlflow_uri, config.registered_name, "untrained") as run:
        for seed, alias in enumerate((CHAMPION, BASELINE)):
            torch.manual_seed(seed)
            folder = home / alias
            task.predictor(task.build()).save(folder)
            version = registry.register(config.registered_name, folder, run_id=run.id, tags={})
            registry.set_alias(config.registered_name, alias, version.version, "untrained")
