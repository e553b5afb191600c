"""Find lesions in a folder of images: a mask and an overlay each, and one line a picture in `results.jsonl`."""

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from models.registry import Registry
from models.segmentation import predict
from models.segmentation.figures import overlay
from models.segmentation.images import is_mask, read_image
from models.segmentation.predict import SegmentationPredictor
from models.segmentation.scans import DataError
from ops.environment import Environment
from ops.jobs import JobError, run

logger = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def main() -> dict[str, object]:
    """Segment every image of the folder; one that can't be read is skipped, and said."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    files = sorted(path for path in arguments.input.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths = [path for path in files if not is_mask(path)]
    if not paths:
        raise JobError(f"{arguments.input}: holds no image ({', '.join(sorted(SUFFIXES))}).")
    folder, _ = Registry(environment.tracking_uri).find(arguments.model, arguments.name, environment.home / "models")
    predictor = predict.load(folder)
    stems = Counter(path.with_suffix("") for path in paths)
    skipped = 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "results.jsonl").open("w", encoding="utf-8") as lines:
        for path in paths:
            try:
                name = path if stems[path.with_suffix("")] > 1 else path.with_suffix("")
                found = _segment(predictor, path, arguments.output / name.relative_to(arguments.input))
            except DataError as error:
                skipped += 1
                found = {"error": str(error)}
                logger.warning(json.dumps({"event": "image skipped", "path": str(path), "reason": str(error)}))
            lines.write(json.dumps({"image": str(path.relative_to(arguments.input)), **found}) + "\n")
    return {"images": len(paths) - skipped, "skipped": skipped, "output": str(arguments.output.absolute())}


def _segment(predictor: SegmentationPredictor, path: Path, target: Path) -> dict[str, object]:
    image = read_image(path)
    (found,) = predictor.segment([image])
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((found.mask * 255).astype(np.uint8)).save(target.with_name(f"{target.name}_mask.png"))
    Image.fromarray(overlay(image, found.mask)).save(target.with_name(f"{target.name}_overlay.png"))
    return {
        "area": round(float(found.mask.mean()), 5),
        "confidence": round(float(found.probability[found.mask].mean()), 4) if found.mask.any() else None,
    }


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--input", type=Path, required=True, help="folder of images, searched below too")
    arguments.add_argument("--output", type=Path, required=True, help="folder of what is found")
    arguments.add_argument("--model", default="champion", help="folder, version or alias of a model (%(default)s)")
    arguments.add_argument("--name", default="segmentation", help="registered name, where --model is an alias")
    return arguments.parse_args()


if __name__ == "__main__":
    run(main)
