"""Train a U-Net on ultrasound images with Ray Train and register it: `train_segmentation.py --config FILE`."""

import os

# Read by Ray Train's controller, so they must be set before Ray starts: notice a dead worker soon, and don't wait
# long for its process group.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")

from models.segmentation import data  # noqa: E402
from models.segmentation.config import SegmentationConfig  # noqa: E402
from models.segmentation.train import train  # noqa: E402
from ops.configuration import load  # noqa: E402
from ops.environment import Environment  # noqa: E402
from ops.jobs import parser, ray_session, run  # noqa: E402


def main() -> dict[str, object]:
    """Load the data, train, and export where the configuration says so."""
    arguments = parser(__doc__ or "", config="configs/segmentation/exp_006.yaml").parse_args()
    environment = Environment.read()
    environment.export()
    config = load(SegmentationConfig, arguments.config, arguments.overrides)
    found = data.splits(config.data, environment.data)
    with ray_session():
        outcome = train(config, found, home=environment.home, tracking_uri=environment.tracking_uri)
    return dict(outcome.result)


if __name__ == "__main__":
    run(main)
