"""Train a U-Net on ultrasound images with Ray Train and register it: `train_segmentation.py --config FILE`."""

from models.segmentation import data
from models.segmentation.config import SegmentationConfig
from models.segmentation.train import train
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import parser, ray_session, run


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
