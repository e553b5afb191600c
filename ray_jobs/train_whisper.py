"""Fine-tune a small Whisper on spoken digits with Ray Train and register it: `train_whisper.py --config FILE`."""

import os

# Read by Ray Train's controller, so they must be set before Ray starts: notice a dead worker soon, and don't wait
# long for its process group.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")

from models.whisper import data  # noqa: E402
from models.whisper.config import WhisperConfig  # noqa: E402
from models.whisper.train import train  # noqa: E402
from ops.configuration import load  # noqa: E402
from ops.environment import Environment  # noqa: E402
from ops.jobs import parser, ray_session, run  # noqa: E402


def main() -> dict[str, object]:
    """Load the data, write the held-out split's features for the evaluation, train."""
    arguments = parser(__doc__ or "", config="configs/whisper/digits.yaml").parse_args()
    environment = Environment.read()
    environment.export()
    config = load(WhisperConfig, arguments.config, arguments.overrides)
    found = data.splits(config.data, environment.data)
    data.write_features(found, environment.home / "features" / "offline" / "utterance_audio")
    with ray_session():
        return train(config, found, home=environment.home, tracking_uri=environment.tracking_uri)


if __name__ == "__main__":
    run(main)
