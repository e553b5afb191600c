"""Export a trained segmentation model as ONNX for small devices (fp16, int8, pruned) and compare what each costs."""

import json
from pathlib import Path

from models.registry import Registry
from models.segmentation import data, edge, predict
from models.segmentation.config import SegmentationConfig
from models.segmentation.train import SegmentationTask
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import parser, run


def main() -> dict[str, object]:
    """Make and measure all variants on the configuration's test split; write `edge.md` and `edge.json` beside them."""
    arguments = parser(__doc__ or "", config="configs/segmentation/exp_006.yaml")
    arguments.add_argument("--model", default="champion", help="folder, version or alias of a model (%(default)s)")
    arguments.add_argument("--output", type=Path, help="folder (default MILLRACE_HOME/edge/NAME)")
    given = arguments.parse_args()
    environment = Environment.read()
    environment.export()
    config = load(SegmentationConfig, given.config, given.overrides)
    output = (given.output or environment.home / "edge" / config.registered_name).absolute()
    folder, _ = Registry(environment.tracking_uri).find(
        given.model, config.registered_name, environment.home / "models"
    )
    predictor = predict.load(folder)
    found = data.splits(config.data, environment.data)
    task = SegmentationTask(config, found.train, found.validation)
    made = edge.variants(predictor, task, found.test, output)
    table = edge.table(made)
    rows = {
        one.name: {"file": one.path.name, "bytes": one.bytes, "latency_ms": round(one.latency_ms, 3)}
        | {"parameters": one.parameters, "dice": round(one.dice, 4), "iou": round(one.iou, 4)}
        for one in made
    }
    (output / "edge.md").write_text(table, encoding="utf-8")
    (output / "edge.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return {"folder": str(output), "images": len(found.test), "variants": rows}


if __name__ == "__main__":
    run(main)
