"""The utterances of a configuration, wherever they come from."""

from pathlib import Path

from models.whisper import dictation, digits, recordings
from models.whisper.config import DataConfig, DictationConfig, DigitsConfig
from models.whisper.utterances import Splits


def splits(config: DataConfig, data: Path | None, home: Path) -> Splits:
    """Load or synthesise what the configuration names, and split it.

    Args:
        config: what to load; the same values give the same splits.
        data: the folder of real data sets, or None where there is none.
        home: below it `speech/` keeps synthetic dictation, which is made on the running Ray.

    Raises:
        DataError: the data folder or its recordings are missing, or too few to split.
    """
    if isinstance(config, DigitsConfig):
        return digits.splits(config, data)
    if isinstance(config, DictationConfig):
        return dictation.splits(config, data, dictation.Studio(home / "speech"))
    return recordings.splits(config, data)
