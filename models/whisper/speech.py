"""Speech synthesis with espeak-ng, as packaged by `espeakng-loader`.

The library carries its random state and phases from one text to the next. So that the same texts always give the same
samples, a fresh process (this module run as a program) speaks all texts of one call, in their order.
"""

import ctypes
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 22050
TIMEOUT_S = 300.0
_SYNCHRONOUS = 2
_UTF8 = 1
_RATE = 1
_PITCH = 3
_QUIET = 200
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(ValueError):
    """Speech that can't be synthesised, in one sentence."""


@dataclass(frozen=True)
class Spoken:
    """A text and how to say it.

    `voice` is a name of espeak-ng, also with a variant: `en` (British), `en-us`, `en-us+f3`; `rate_wpm` is 80 to 450
    words a minute, `pitch` 0 to 99.
    """

    text: str
    voice: str
    rate_wpm: int
    pitch: int = 50


def synthesise(texts: Sequence[Spoken]) -> list[NDArray[np.float32]]:
    """Speak texts: samples float32[N] in [-1, 1] at `SAMPLE_RATE_HZ` without the silence around them, in order.

    The same arguments give the same samples, in any process.

    Raises:
        SpeechError: an unknown voice, a text with nothing to say, or an espeak-ng that doesn't work here.
    """
    command = [sys.executable, "-m", "models.whisper.speech"]
    request = json.dumps([asdict(text) for text in texts]).encode()
    answer = subprocess.run(command, input=request, capture_output=True, timeout=TIMEOUT_S, check=False)
    if answer.returncode:
        reason = answer.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise SpeechError(reason or f"espeak-ng ended with {answer.returncode}; reinstall espeakng-loader.")
    with np.load(io.BytesIO(answer.stdout)) as spoken:
        return [spoken[str(number)] for number in range(len(texts))]


class _Espeak:
    """The initialised library; `chunks` fills while it synthesises."""

    def __init__(self) -> None:
        data = Path(espeakng_loader.get_data_path())
        self._variants = data / "voices" / "!v"
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        if self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0) != SAMPLE_RATE_HZ:
            raise SpeechError("espeak-ng can't be initialised; reinstall the package espeakng-loader.")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._chunks: list[NDArray[np.int16]] = []
        self._callback = _CALLBACK(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, spoken: Spoken) -> NDArray[np.float32]:
        self._chunks.clear()
        _, plus, variant = spoken.voice.partition("+")
        known = not plus or (self._variants / variant).is_file()  # the library ignores an unknown variant
        if not known or self._library.espeak_SetVoiceByName(spoken.voice.encode()) != 0:
            raise SpeechError(f"espeak-ng has no voice {spoken.voice!r}; `en`, `en-us` and en-us+f3 are voices.")
        self._library.espeak_SetParameter(_RATE, spoken.rate_wpm, 0)
        self._library.espeak_SetParameter(_PITCH, spoken.pitch, 0)
        text = spoken.text.encode()
        self._library.espeak_Synth(ctypes.c_char_p(text), ctypes.c_size_t(len(text) + 1), 0, 1, 0, _UTF8, None, None)
        samples = np.concatenate([*self._chunks, np.zeros(0, np.int16)])
        loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > _QUIET)
        if not loud.size:
            raise SpeechError(f"espeak-ng says nothing for {spoken.text!r}; give it words.")
        return samples[loud[0] : loud[-1] + 1].astype(np.float32) / 32768.0

    def _collect(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def main() -> None:
    """Read a JSON list of `Spoken` from standard input, write their samples as an npz file to standard output."""
    texts = [Spoken(**item) for item in json.load(sys.stdin)]
    try:
        espeak = _Espeak()
        waves = {str(number): espeak.speak(text) for number, text in enumerate(texts)}
    except SpeechError as error:
        sys.exit(str(error))
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **waves)
    sys.stdout.buffer.write(file.getvalue())


if __name__ == "__main__":
    main()
