"""Fine-tune a small Whisper on spoken digits with Ray Train and register it: `train_whisper.py --config FILE`."""

from models.whisper import data
from models.whisper.config import WhisperConfig
from models.whisper.train import train
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import parser, ray_session, run


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
