"""A trained Whisper in a folder: load it and transcribe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor, WhisperForConditionalGeneration

from models.predictor import DESCRIPTION, describe
from models.whisper import network as networks
from models.whisper.audio import AudioError


@dataclass(frozen=True)
class Transcript:
    """What was said; confidence in [0, 1] is the mean probability of the tokens, the end of the text included."""

    text: str
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
    ) -> None:
        self._network = cast(Any, network).to(device).eval()
        self._tokens = tokens
        self._features = features
        self._device = device
        self.sample_rate_hz = int(features.sampling_rate)
        self.max_seconds = float(features.chunk_length)

    def transcribe(self, waves: Sequence[NDArray[np.float32]]) -> list[Transcript]:
        """Transcribe mono float32[N] samples at `sample_rate_hz`, in order.

        Raises:
            AudioError: one is empty or longer than `max_seconds`.
        """
        if not waves:
            return []
        for wave in waves:
            self._check(wave)
        mel_BFT = self._features(
            list(waves), sampling_rate=self.sample_rate_hz, return_tensors="pt", device=self._device
        ).input_features.to(self._device)
        return [Transcript(text, confidence) for text, confidence in self._generate(mel_BFT)]

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self._network.save_pretrained(folder)
        self._tokens.save_pretrained(folder)
        self._features.save_pretrained(folder)
        description = {"task": self.task, "sample_rate_hz": self.sample_rate_hz, "max_seconds": self.max_seconds}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")

    def _generate(self, mel_BFT: torch.Tensor) -> list[tuple[str, float]]:
        with torch.no_grad():
            made = self._network.generate(mel_BFT, return_dict_in_generate=True, output_scores=True)
            logs_BT = self._network.compute_transition_scores(made["sequences"], made["scores"], normalize_logits=True)
        made_BT = made["sequences"][:, -logs_BT.shape[1] :]
        ended_BT = (made_BT == self._tokens.eos_token_id).cumsum(dim=1) - (made_BT == self._tokens.eos_token_id).long()
        real_BT = (ended_BT == 0).float()
        confidence_B = (logs_BT.exp() * real_BT).nan_to_num(0.0).sum(dim=1) / real_BT.sum(dim=1)
        texts = self._tokens.batch_decode(made["sequences"], skip_special_tokens=True)
        return [(text.strip(), float(confidence)) for text, confidence in zip(texts, confidence_B, strict=True)]

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
    describe(folder)
    return WhisperPredictor(
        networks.load(folder), networks.tokenizer(folder), networks.extractor(folder, 0, 0, 0, 0.0), device
    )
