"""The Whisper network, its tokenizer and its features: small and from scratch, or a pretrained base, with adapters."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from models.whisper.preprocess import PreprocessConfig

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
CHARACTERS = "'abcdefghijklmnopqrstuvwxyz"
WINDOW_S = 0.032
MEL_UNIT_DB = 40
"""Whisper's features are decimal logarithms of power, divided by 4."""
TINY_POWER = 1e-10
"""What Whisper's features take for silence."""
CTC_HEAD = "ctc_head"
TASK = "transcribe"
"""What a multilingual Whisper is asked to do."""


class NetworkError(ValueError):
    """A base model that can't be loaded or doesn't fit, in one sentence."""


def tokenizer(
    base: str | Path | None, texts: Iterable[str] = (), vocabulary: int = 256, language: str | None = None
) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, or byte-pair encoding (Sennrich et al., 2016) learnt from texts.

    That of a multilingual base begins every text with the tokens with which `load` has the decoder begin.

    Words that the texts hold become one token each, as far as the size of the vocabulary goes; other words are spelt
    with smaller ones, down to the `CHARACTERS`, and what those lack is `<unk>`.
    """
    if base is not None:
        own: Any = AutoTokenizer.from_pretrained(str(base))
        if language is not None and _is_multilingual(base):
            own.set_prefix_tokens(language=language, task=TASK)
        return cast(PreTrainedTokenizerBase, own)
    pairs = Tokenizer(BPE(unk_token=UNKNOWN))
    pairs.pre_tokenizer = pre_tokenizers.Metaspace()
    pairs.decoder = decoders.Metaspace()
    learning = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, UNKNOWN],
        initial_alphabet=list(CHARACTERS),
        show_progress=False,
    )
    pairs.train_from_iterator(sorted(texts), learning)
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=pairs, **special)  # type: ignore[no-untyped-call]


def extractor(
    base: str | Path | None, sample_rate_hz: int, max_seconds: int, mel_bins: int, hop_ms: float
) -> WhisperFeatureExtractor:
    """The base's log-mel features, or ones of the given sizes, which count only without a base.

    Raises:
        NetworkError: `max_seconds` doesn't hold an even number of hops, or a hop no whole number of samples.
    """
    if base is not None:
        return WhisperFeatureExtractor.from_pretrained(str(base))
    hop = round(sample_rate_hz * hop_ms / 1000)
    if hop < 1 or max_seconds * sample_rate_hz % (2 * hop):
        raise NetworkError(
            f"network.hop_ms={hop_ms:g} doesn't divide {max_seconds} s into an even number of frames; try 12.5 or 20."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter")
        return WhisperFeatureExtractor(  # type: ignore[no-untyped-call]
            feature_size=mel_bins,
            sampling_rate=sample_rate_hz,
            hop_length=hop,
            n_fft=round(sample_rate_hz * WINDOW_S),
            chunk_length=max_seconds,
        )


def log_mel(
    features: WhisperFeatureExtractor,
    waves: Sequence[NDArray[np.float32]],
    config: PreprocessConfig,
    device: str = "cpu",
) -> torch.Tensor:
    """Features float32[B, mel, frames] of prepared waves float32[N], as `lifter_ms` and `range_db` say."""
    if config.lifter_ms is None:
        rate_hz = int(features.sampling_rate)
        heard = features([*waves], sampling_rate=rate_hz, return_tensors="pt", device=device)
        mel_BFT: torch.Tensor = heard.input_features.to(device)
    else:
        mel_BFT = _log_mel_of_envelopes(features, waves, config.lifter_ms, device)
    return torch.maximum(mel_BFT, mel_BFT.amax(dim=(1, 2), keepdim=True) - config.range_db / MEL_UNIT_DB)


def _log_mel_of_envelopes(
    features: WhisperFeatureExtractor, waves: Sequence[NDArray[np.float32]], lifter_ms: float, device: str
) -> torch.Tensor:
    """What the extractor gives, with each frame's spectrum smoothed by its cepstrum (Oppenheim and Schafer, 1968)."""
    size, rate_hz = features.n_fft, int(features.sampling_rate)
    padded_BN = torch.zeros(len(waves), features.n_samples, device=device)
    for row_N, wave in zip(padded_BN, waves, strict=True):
        row_N[: len(wave)] = torch.from_numpy(wave[: features.n_samples])
    window = torch.hann_window(size, device=device)
    spectrum_BFT = torch.stft(padded_BN, size, features.hop_length, window=window, return_complex=True)[..., :-1]
    cepstrum_BQT = torch.fft.irfft(spectrum_BFT.abs().square().clamp(min=TINY_POWER).log(), n=size, dim=1)
    first = max(1, round(lifter_ms * rate_hz / 1000))
    cepstrum_BQT[:, first : size - first + 1] = 0
    power_BFT = torch.fft.rfft(cepstrum_BQT, dim=1).real.exp()
    filters_MF = torch.from_numpy(features.mel_filters.T).to(device, torch.float32)
    mel_BMT: torch.Tensor = filters_MF @ power_BFT
    return (mel_BMT.clamp(min=TINY_POWER).log10() + 4) / 4


def small(
    tokens: PreTrainedTokenizerBase,
    features: WhisperFeatureExtractor,
    *,
    width: int,
    layers: int,
    heads: int,
    dropout: float,
    max_tokens: int,
) -> WhisperForConditionalGeneration:
    """A new network with random weights whose encoder takes exactly the frames that the features give."""
    special = {
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "decoder_start_token_id": tokens.bos_token_id,
    }
    network = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokens),
            num_mel_bins=features.feature_size,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            dropout=dropout,
            max_source_positions=features.nb_max_frames // 2,
            max_target_positions=max_tokens + 1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            init_std=width**-0.5,  # with Whisper's own 0.02 so narrow a network doesn't start to learn
            **special,
        )
    )
    network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_length=max_tokens, is_multilingual=False, return_timestamps=False, **special
    )
    return network


def load(folder: str | Path, language: str | None = None) -> WhisperForConditionalGeneration:
    """A pretrained network from a hub id or a local folder; a multilingual one will transcribe the language.

    Raises:
        NetworkError: it can't be found or isn't a Whisper.
    """
    try:
        network: WhisperForConditionalGeneration = WhisperForConditionalGeneration.from_pretrained(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise NetworkError(f"{folder}: no Whisper can be loaded from this hub id or folder ({reason}).") from None
    generation: Any = network.generation_config
    if language is not None and getattr(generation, "is_multilingual", False):
        generation.language, generation.task = language, TASK
    return network


def _is_multilingual(base: str | Path) -> bool:
    try:
        return bool(getattr(GenerationConfig.from_pretrained(str(base)), "is_multilingual", False))
    except OSError:  # a base without this file, as transformers takes it too
        return False


def adapt(network: nn.Module, *, r: int, alpha: int, dropout: float, targets: tuple[str, ...]) -> PeftModel:
    """Freeze a network and add low-rank adapters to the linear layers of these names."""
    # WhisperForConditionalGeneration takes input_features, which no task type of peft passes on.
    config = PeftLoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type=None)
    return cast(PeftModel, get_peft_model(network, config))


def tensor_plan(network: nn.Module) -> dict[str, ParallelStyle]:
    """How the feed-forward layers, two thirds of the weights, are sliced: fc1 by columns, fc2 by rows, adapters alike.

    Attention stays whole: transformers takes the number of heads of its keys from the configuration, so those of a
    slice would be read as heads of other positions.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in network.named_modules():
        layer = name.rpartition(".")[2]
        if layer in ("fc1", "fc2"):
            style, adapter = (ColwiseParallel, "lora_B") if layer == "fc1" else (RowwiseParallel, "lora_A")
            parts = [".base_layer", f".{adapter}.default"] if isinstance(module, LoraLayer) else [""]
            plan |= {name + part: style() for part in parts}
    return plan


def with_ctc_head(network: nn.Module, width: int, tokens: int) -> nn.Module:
    """Add the layer that `ctc_loss` needs, for as long as the network is trained."""
    network.add_module(CTC_HEAD, nn.Linear(width, tokens))
    return network


def merged(network: nn.Module) -> WhisperForConditionalGeneration:
    """The network as it is used after training: adapters added into its weights, without the head for `ctc_loss`."""
    if hasattr(network, CTC_HEAD):
        delattr(network, CTC_HEAD)
    if isinstance(network, PeftModel):
        network = cast(Any, network).merge_and_unload()
    return cast(WhisperForConditionalGeneration, network)


def labels(tokens: PreTrainedTokenizerBase, texts: list[str], start_token: int) -> torch.Tensor:
    """Token ids int64[B, T] of transcripts with their end, padded with -100.

    The start token, which the network puts before the labels itself, is dropped where the tokenizer adds it.
    """
    rows = [[*tokens(text).input_ids] for text in texts]
    rows = [row[1:] if row[:1] == [start_token] else row for row in rows]
    rows = [row if row[-1:] == [tokens.eos_token_id] else [*row, tokens.eos_token_id] for row in rows]
    longest = max(map(len, rows))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in rows], dtype=torch.int64)


def ctc_loss(
    head: nn.Module, heard_BSD: torch.Tensor, labels_BT: torch.Tensor, tokens: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Sum over utterances of the loss of hearing the tokens in the encoder's output (Graves et al., 2006).

    Beside the decoder's loss as in Watanabe et al. (2017). The head maps a position to the tokens, padding being the
    blank; with the decoder's embedding in its place the encoder took many times longer to learn anything.
    """
    logs_SBV = head(heard_BSD).float().log_softmax(dim=-1).transpose(0, 1)
    said_BT = (labels_BT != -100) & (labels_BT != tokens.eos_token_id)
    return torch.nn.functional.ctc_loss(
        logs_SBV,
        labels_BT[said_BT],
        input_lengths=torch.full((len(labels_BT),), len(logs_SBV)),
        target_lengths=said_BT.sum(dim=1),
        blank=int(cast(int, tokens.pad_token_id)),
        reduction="sum",
        zero_infinity=True,
    )


def start_token(base: str | Path) -> int:
    """The token with which a base's decoder starts."""
    return int(WhisperConfig.from_pretrained(str(base)).decoder_start_token_id)
