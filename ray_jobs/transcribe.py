"""Transcribe audio files of any length: `transcribe.py --model champion FILE...`, or live with `--stream`.

Prints a JSON line a file; with `--stream` also one whenever something is confirmed or guessed anew.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.registry import Registry
from models.whisper import predict
from models.whisper.audio import AudioError, decode
from models.whisper.longform import Streaming, transcribe_long
from models.whisper.predict import Transcript, WhisperPredictor, Word
from ops.environment import Environment
from ops.jobs import JobError, run

logger = logging.getLogger(__name__)

LONGEST_S = 4 * 3600.0
PIECE_S = 0.1


def main() -> dict[str, object]:
    """Transcribe every file; one that can't be read is skipped, and said."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    folder, _ = Registry(environment.tracking_uri).find(arguments.model, arguments.name, environment.home / "models")
    predictor = predict.load(folder)
    skipped = doubtful = 0
    for path in arguments.files:
        try:
            wave = _read(path, predictor.sample_rate_hz)
        except AudioError as error:
            skipped += 1
            logger.warning(json.dumps({"event": "file skipped", "path": str(path), "reason": str(error)}))
            _print({"file": str(path), "error": str(error)})
            continue
        transcript = _stream(predictor, wave, path) if arguments.stream else transcribe_long(predictor, wave)
        found = _described(transcript, words=arguments.words, doubtful_below=arguments.doubtful_below)
        doubtful += bool(found["doubtful"])
        _print({"file": str(path), **found})
    return {"files": len(arguments.files) - skipped, "skipped": skipped, "doubtful": doubtful}


def _read(path: Path, sample_rate_hz: int) -> NDArray[np.float32]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AudioError(f"The file can't be read ({error.strerror}).") from None
    return decode(data, sample_rate_hz, LONGEST_S)


def _stream(predictor: WhisperPredictor, wave: NDArray[np.float32], path: Path) -> Transcript:
    """Transcribe as if the wave arrived piece by piece, and print what is new."""
    streaming = Streaming(predictor)
    piece = round(PIECE_S * predictor.sample_rate_hz)
    shown = ("", "")
    for start in range(0, len(wave), piece):
        update = streaming.feed(wave[start : start + piece])
        confirmed = " ".join(word.text for word in update.confirmed)
        if (confirmed, update.partial) != shown:
            shown = (confirmed, update.partial)
            heard_s = min(start + piece, len(wave)) / predictor.sample_rate_hz
            _print({"file": str(path), "heard_s": round(heard_s, 3), "confirmed": confirmed, "partial": update.partial})
    return streaming.finish()


def _described(transcript: Transcript, *, words: bool, doubtful_below: float) -> dict[str, object]:
    found: dict[str, object] = {
        "text": transcript.text,
        "confidence": round(transcript.confidence, 4),
        "doubtful": transcript.confidence < doubtful_below,
    }
    return found | ({"words": [_word(word) for word in transcript.words]} if words else {})


def _word(word: Word) -> dict[str, object]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(word).items()}


def _print(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("files", type=Path, nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    arguments.add_argument("--model", default="champion", help="folder, version or alias of a model (%(default)s)")
    arguments.add_argument("--name", default="whisper", help="registered name, where --model is no folder")
    arguments.add_argument("--stream", action="store_true", help="as if the audio arrived live: print what is heard")
    arguments.add_argument("--words", action="store_true", help="with each word's times and confidence")
    arguments.add_argument(
        "--doubtful-below", type=float, default=0.6, help="confidence below which a file is flagged (%(default)s)"
    )
    found = arguments.parse_args()
    if not 0 <= found.doubtful_below <= 1:
        raise JobError(f"--doubtful-below {found.doubtful_below:g} must be from 0 to 1.")
    return found


if __name__ == "__main__":
    run(main)
