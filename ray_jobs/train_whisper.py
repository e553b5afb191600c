"""Fine-tune a Whisper on digits or dictation with Ray Train and register it: `train_whisper.py --config FILE`."""

from models.whisper.config import WhisperConfig
from models.whisper.data import splits
from models.whisper.train import train
from models.whisper.utterances import write_features
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import parser, ray_session, run


def main() -> dict[str, object]:
    """Load the data, write the held-out split's features for the evaluation, train."""
    arguments = parser(__doc__ or "", config="configs/whisper/digits.yaml").parse_args()
    environment = Environment.read()
    environment.export()
    config = load(WhisperConfig, arguments.config, arguments.overrides)
    with ray_session():
        found = splits(config.data, environment.data, environment.home)
        write_features(found, environment.home / "features" / "offline" / "utterance_audio")
        return train(config, found, home=environment.home, tracking_uri=environment.tracking_uri)


if __name__ == "__main__":
    run(main)
