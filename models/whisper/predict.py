"""A trained Whisper in a folder: load it and transcribe."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from models.predictor import DESCRIPTION, describe
from models.whisper import alignment
from models.whisper import network as networks
from models.whisper.audio import AudioError
from models.whisper.preprocess import PreprocessConfig, prepare


@dataclass(frozen=True)
class Word:
    """One word and when it was said, in seconds; confidence in [0, 1] is the mean probability of its tokens."""

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True)
class Transcript:
    """What was said; confidence in [0, 1] is the mean probability of the tokens, the end of the text included.

    `words`, where they were asked for, are in order, none begins before the one before it ends, and all lie within
    the audio. Words are what spaces separate, so a language without spaces has one a text.
    """

    text: str
    confidence: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class _Generated:
    """The token ids int64[T] of one utterance up to its end token, which is left out, and what was thought of them.

    The text begins at `first`, after the prompt; `probabilities` are those of the text's tokens.
    """

    ids: torch.Tensor
    first: int
    probabilities: NDArray[np.float32]
    confidence: float


class WhisperPredictor:
    """Transcribes batches of utterances with one greedy generation each; not safe for threads."""

    task = "whisper"

    def __init__(
        self,
        network: WhisperForConditionalGeneration,
        tokens: PreTrainedTokenizerBase,
        features: WhisperFeatureExtractor,
        device: str = "cpu",
        preprocess: PreprocessConfig | None = None,
    ) -> None:
        self._network = cast(Any, network).to(device).eval()
        self._tokens = tokens
        self._features = features
        self._device = device
        self.preprocess = preprocess or PreprocessConfig()
        self.sample_rate_hz = int(features.sampling_rate)
        self.max_seconds = float(features.chunk_length)

    def transcribe(self, waves: Sequence[NDArray[np.float32]], *, timestamps: bool = False) -> list[Transcript]:
        """Transcribe mono float32[N] samples at `sample_rate_hz`, in order; with `timestamps` also say when.

        With `timestamps` the waves are not trimmed, so that times count from their beginning.

        Raises:
            AudioError: one is empty or longer than `max_seconds`.
        """
        if not waves:
            return []
        for wave in waves:
            self._check(wave)
        steps = self.preprocess.model_copy(update={"trim": False}) if timestamps else self.preprocess
        heard = [prepare(wave, self.sample_rate_hz, steps) for wave in waves]
        mel_BFT = networks.log_mel(self._features, heard, steps, self._device)
        with torch.no_grad():
            encoded = self._network.get_encoder()(mel_BFT)
        made = self._generate(encoded)
        texts = self._tokens.batch_decode([one.ids.tolist() for one in made], skip_special_tokens=True)
        words: list[tuple[Word, ...]] = [()] * len(made)
        if timestamps:
            words = [self._words(*one) for one in zip(made, encoded["last_hidden_state"], waves, strict=True)]
        return [
            Transcript(text.strip(), one.confidence, said) for text, one, said in zip(texts, made, words, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self._network.save_pretrained(folder)
        self._tokens.save_pretrained(folder)
        self._features.save_pretrained(folder)
        description = {
            "task": self.task,
            "sample_rate_hz": self.sample_rate_hz,
            "max_seconds": self.max_seconds,
            "preprocess": self.preprocess.model_dump(),
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")

    def _generate(self, encoded: BaseModelOutput) -> list[_Generated]:
        with torch.no_grad():
            made = self._network.generate(encoder_outputs=encoded, return_dict_in_generate=True, output_scores=True)
            logs_BT = self._network.compute_transition_scores(made["sequences"], made["scores"], normalize_logits=True)
        first = made["sequences"].shape[1] - logs_BT.shape[1]
        is_end_BT = made["sequences"][:, first:] == self._tokens.eos_token_id
        real_BT = (is_end_BT.cumsum(dim=1) - is_end_BT.long() == 0).float()
        probability_BT = (logs_BT.exp() * real_BT).nan_to_num(0.0)
        confidence_B = probability_BT.sum(dim=1) / real_BT.sum(dim=1)
        lengths = (is_end_BT.cumsum(dim=1) == 0).sum(dim=1).tolist()
        return [
            _Generated(ids_T[: first + length], first, probability_T[:length].cpu().numpy(), float(confidence))
            for ids_T, length, probability_T, confidence in zip(
                made["sequences"], lengths, probability_BT, confidence_B, strict=True
            )
        ]

    def _words(self, made: _Generated, encoded_SD: torch.Tensor, wave: NDArray[np.float32]) -> tuple[Word, ...]:
        texts = alignment.words(self._tokens, made.ids[made.first :].tolist())
        if not texts:
            return ()
        weight_HTS = alignment.attention(self._network, encoded_SD[None], made.ids)[:, made.first - 1 :]
        samples = 2 * self._features.hop_length  # the encoder makes one position of two frames
        spans_T2 = alignment.spans(weight_HTS[..., : math.ceil(len(wave) / samples)])
        times_T2 = np.minimum(spans_T2 * samples, len(wave)) / self.sample_rate_hz
        return tuple(
            Word(
                text,
                start_s=float(times_T2[tokens, 0][0]),
                end_s=float(times_T2[tokens, 1][-1]),
                confidence=float(made.probabilities[tokens].mean()),
            )
            for text, tokens in texts
        )

    def _check(self, wave: NDArray[np.float32]) -> None:
        seconds = len(wave) / self.sample_rate_hz
        if not len(wave):
            raise AudioError("The audio holds no samples; send a recording that is longer than 0 s.")
        if seconds > self.max_seconds:
            raise AudioError(f"The audio lasts {seconds:.1f} s; this model takes at most {self.max_seconds:g} s.")


def load(folder: Path, device: str = "cpu") -> WhisperPredictor:
    """Load what `WhisperPredictor.save` wrote.

    Raises:
        PredictorError: the folder holds no model.
        NetworkError: its files are no Whisper.
    """
    preprocess = PreprocessConfig.model_validate(describe(folder).get("preprocess", {}))
    network, tokens = networks.load(folder), networks.tokenizer(folder)
    return WhisperPredictor(network, tokens, networks.extractor(folder, 0, 0, 0, 0.0), device, preprocess)
