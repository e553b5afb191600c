"""Variants of a trained U-Net for small devices, as ONNX files: half precision, int8, fewer channels, both.

int8 is static: activations are quantised too, by ranges seen on training images, since dynamic quantisation leaves
convolutions as they are. Pruning removes whole channels, since zeroed weights shrink no file; what it leaves is a U-Net
with fewer features, fine-tuned for some steps.
"""

import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.segmentation.config import PreprocessConfig, SegmentationConfig
from models.segmentation.network import UNet
from models.segmentation.predict import SegmentationPredictor
from models.segmentation.preprocess import normalise
from models.segmentation.prune import pruned
from models.segmentation.scans import Image, Scan
from models.segmentation.scores import mean_scores
from models.segmentation.train import SegmentationTask

INPUT, OUTPUT = "image", "logits"


class EdgeError(ValueError):
    """A variant that can't be made, in one sentence."""


@dataclass(frozen=True)
class Variant:
    """One file: its size, the median latency of a single image on one thread, and how well it does on a test split."""

    name: str
    path: Path
    bytes: int
    latency_ms: float
    parameters: int
    dice: float
    iou: float


class OnnxNetwork(nn.Module):
    """An ONNX file in the place of the network that it was exported from, on one thread of the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, image_B1HW: Tensor) -> Tensor:
        """Logits float32[B, 1, H, W]."""
        return torch.from_numpy(self._session.run([OUTPUT], {INPUT: image_B1HW.numpy()})[0])


def variants(
    predictor: SegmentationPredictor,
    task: SegmentationTask,
    test: Sequence[Scan],
    folder: Path,
) -> list[Variant]:
    """Make and measure all variants of a trained model, the unchanged one first.

    Args:
        predictor: the trained model; its threshold, peak and flip count for all variants.
        task: gives the images for calibration and fine-tuning.
        test: scans of the comparison.
        folder: for the files.

    Raises:
        EdgeError: onnx, onnxruntime or onnxscript isn't installed.
        PruneError: the network can't be pruned by the configured share.
    """
    _require()
    folder.mkdir(parents=True, exist_ok=True)
    config = task.config
    network = predictor.network
    if not isinstance(network, UNet):
        raise EdgeError("Only a U-Net that is in memory can be exported.")
    calibration = task.training_images(config.export.calibration_images)
    slim, slim_size = pruned(network, predictor.size, config.export.prune)
    finetune(slim, task, config.export.finetune_steps)
    files: list[tuple[str, Path, nn.Module]] = []
    for name, small_name, one in (("fp32", "int8", network), ("pruned", "pruned int8", slim)):
        path = to_onnx(one, config.preprocess.size_px, folder / f"{name}.onnx")
        target = folder / f"{small_name.replace(' ', '-')}.onnx"
        small = to_int8(path, calibration, config.preprocess, target)
        files += [(name, path, one), (small_name, small, one)]
    files.insert(1, ("fp16", to_fp16(files[0][1], folder / "fp16.onnx"), network))
    SegmentationPredictor(
        slim,
        slim_size,
        predictor.preprocess,
        threshold=predictor.threshold,
        peak=predictor.peak,
        flip=predictor.flip,
    ).save(folder / "pruned")
    return _measured(files, predictor, config, test)


def to_onnx(network: nn.Module, size_px: int, path: Path) -> Path:
    """Export with any batch size and fixed sides, all weights in the one file."""
    example = torch.zeros(2, 1, size_px, size_px)
    program = torch.onnx.export(
        network.eval().cpu(),
        (example,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise EdgeError("The exporter gave no ONNX program.")
    program.save(str(path), external_data=False)
    return path


def to_fp16(path: Path, target: Path) -> Path:
    """Half precision inside, single precision at both ends."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), target)
    return target


def to_int8(path: Path, images: Sequence[Image], config: PreprocessConfig, target: Path) -> Path:
    """Weights by channel and activations by the ranges that these prepared images give."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "ready.onnx"
        quant_pre_process(str(path), str(ready))
        quantize_static(
            str(ready),
            str(target),
            _Calibration(images, config),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
    return target


def finetune(network: UNet, task: SegmentationTask, steps: int) -> None:
    """Train on in this process, with half the learning rate of the training."""
    train = task.config.train
    optimizer = torch.optim.AdamW(network.parameters(), 0.5 * train.learning_rate, weight_decay=train.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    network.train()
    for step in range(steps):
        numbers = range(step * train.batch_size, (step + 1) * train.batch_size)
        loss, count = task.loss(network, task.batch([divmod(number, task.size) for number in numbers]))
        optimizer.zero_grad(set_to_none=True)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    network.eval()


def table(found: Sequence[Variant]) -> str:
    """Markdown, each variant beside the unchanged one."""
    first = found[0]
    lines = [
        "| variant | parameters | file KiB | smaller | latency ms | faster | Dice | change | IoU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {one.parameters:,} | {one.bytes / 1024:.0f} | {first.bytes / one.bytes:.2f}x | "
        f"{one.latency_ms:.1f} | {first.latency_ms / one.latency_ms:.2f}x | {one.dice:.4f} | "
        f"{one.dice - first.dice:+.4f} | {one.iou:.4f} |"
        for one in found
    ]
    return "\n".join(lines) + "\n"


class _Calibration:
    """Gives the quantiser one image after another."""

    def __init__(self, images: Sequence[Image], config: PreprocessConfig) -> None:
        self._images: Iterator[Image] = iter([normalise(image, config) for image in images])

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: image[None, None]}


def _measured(
    files: Sequence[tuple[str, Path, nn.Module]],
    like: SegmentationPredictor,
    config: SegmentationConfig,
    test: Sequence[Scan],
) -> list[Variant]:
    running = [OnnxNetwork(path) for _, path, _ in files]
    latencies_ms = _latencies_ms(running, config.preprocess.size_px, config.export.repeats)
    found = []
    for (name, path, network), runs, latency_ms in zip(files, running, latencies_ms, strict=True):
        model = SegmentationPredictor(
            runs, like.size, like.preprocess, threshold=like.threshold, peak=like.peak, flip=like.flip
        )
        scores = mean_scores([one.mask for one in model.segment([scan.image for scan in test])], test)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found.append(Variant(name, path, path.stat().st_size, latency_ms, parameters, scores["dice"], scores["iou"]))
    return found


def _latencies_ms(networks: Sequence[nn.Module], size_px: int, repeats: int) -> list[float]:
    """Medians of single-image runs on one thread, in time on its core, so that a busy machine doesn't count.

    The networks run in turn; the first three runs of each are left out.
    """
    image = torch.zeros(1, 1, size_px, size_px)
    taken: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats + 3):
        for network, times in zip(networks, taken, strict=True):
            started = time.thread_time()
            network(image)
            times.append(time.thread_time() - started)
    return [1000 * float(np.median(times[3:])) for times in taken]


def _require() -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise EdgeError(f"Exporting needs the package {package}: pip install 'millrace[segmentation]'.")
