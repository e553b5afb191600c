"""The commands of segmentation as a user types them: train on a Ray of its own, export, find, evaluate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.segmentation.phantoms import phantom

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "segmentation" / "tiny.yaml"


def job(script: str, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(ROOT / "ray_jobs" / script), *arguments],
        cwd=home.parent,
        env=os.environ | {"MILLRACE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def result(done: "subprocess.CompletedProcess[str]") -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def variants_answer_as_the_network(folder: Path, home: Path) -> None:
    """Compare the files with the network that they were made of; int8 within what eight bits can hold."""
    import torch

    from models.registry import Registry
    from models.segmentation.edge import OnnxNetwork
    from models.segmentation.predict import load

    registry = Registry(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    champion, _ = registry.find("champion", "segmentation-tiny", home / "models")
    image = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(champion).network(image).sigmoid()
        slim = load(folder / "pruned").network(image).sigmoid()
    for name, truth, most in (
        ("fp32", expected, 1e-4),
        ("fp16", expected, 0.02),
        ("int8", expected, 0.2),
        ("pruned", slim, 1e-4),
        ("pruned-int8", slim, 0.2),
    ):
        assert not list(folder.glob(f"{name}.onnx.data"))
        assert (OnnxNetwork(folder / f"{name}.onnx")(image).sigmoid() - truth).abs().max() < most


def test_train_evaluate_export_and_find(home: Path) -> None:
    from mlflow import MlflowClient

    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    trained = result(job("train_segmentation.py", home, "--config", str(TINY)))
    assert trained["steps"] == 8 and trained["alias"] == "champion"
    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    artifacts = Path(client.get_run(trained["run_id"]).info.artifact_uri.removeprefix("file://"))
    assert {one.name for one in (artifacts / "figures").iterdir()} == {"learning_curves.png", "predictions.png"}
    metrics = client.get_run(trained["run_id"]).data.metrics
    assert {"validation_dice", "validation_iou", "validation_train_dice", "test_dice", "train_loss"} <= set(metrics)
    assert [one.step for one in client.get_metric_history(trained["run_id"], "validation_dice")] == [4, 8]

    tiny = ("--config", str(TINY))
    exported = result(job("export_segmentation.py", home, *tiny))
    sizes = {name: one["bytes"] for name, one in exported["variants"].items()}
    assert list(sizes) == ["fp32", "fp16", "int8", "pruned", "pruned int8"]
    assert exported["variants"]["fp32"]["dice"] == pytest.approx(trained["dice"], abs=1e-3)
    assert exported["variants"]["fp16"]["dice"] == pytest.approx(trained["dice"], abs=0.02)
    assert (Path(exported["folder"]) / "edge.md").read_text().count("\n") == 7
    assert sizes["fp16"] < sizes["fp32"] and sizes["pruned int8"] < sizes["pruned"] < sizes["fp32"]
    variants_answer_as_the_network(Path(exported["folder"]), home)

    pictures = home.parent / "pictures"
    pictures.mkdir()
    made = phantom(0, 0, 0, 96).image
    Image.fromarray((made * 255).astype(np.uint8)).save(pictures / "one.png")
    Image.fromarray((made * 255).astype(np.uint8)).save(pictures / "one.bmp")
    Image.new("L", (96, 96)).save(pictures / "one_mask.png")
    (pictures / "broken.png").write_bytes(b"no image")
    folder = str(Path(exported["folder"]) / "pruned")
    found = result(
        job("infer_segmentation.py", home, "--input", str(pictures), "--output", str(home / "out"), "--model", folder)
    )
    assert (found["images"], found["skipped"]) == (2, 1)
    for name in ("one.png", "one.bmp"):
        assert np.asarray(Image.open(home / "out" / f"{name}_mask.png")).shape == (96, 96), "both are there"
    lines = [json.loads(line) for line in (home / "out" / "results.jsonl").read_text().splitlines()]
    assert ["error" in line for line in lines] == [True, False, False]
