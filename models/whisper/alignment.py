"""When each token of a transcript is said: dynamic time warping over the decoder's attention to the audio.

After the word timestamps of OpenAI's Whisper (Radford et al., "Robust Speech Recognition via Large-Scale Weak
Supervision", 2022; the warping is that of Sakoe and Chiba, 1978), with two differences that short utterances need: the
attention is standardised over the audio and not over the tokens, of which there may be two, and a token spans only the
part of its stretch of the path that it looks at, so that silence belongs to no word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from torch import Tensor
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration

_SMOOTHED = 7
_HEARD = 0.2


def attention(network: WhisperForConditionalGeneration, encoded_1SD: Tensor, ids_T: Tensor) -> NDArray[np.float64]:
    """How much each token, while it is being chosen, looks at each position of the encoded audio: [H, T - 1, S].

    The first token is not chosen and has no row. The heads are `alignment_heads` of the generation configuration or,
    where there are none, all those of the decoder's upper half.
    """
    with torch.no_grad(), _eager(network):
        layers = cast(Any, network).get_decoder()(
            input_ids=ids_T[None, :-1], encoder_hidden_states=encoded_1SD, output_attentions=True, use_cache=False
        )["cross_attentions"]
    chosen = getattr(network.generation_config, "alignment_heads", None) or [
        (layer, head) for layer in range(len(layers) // 2, len(layers)) for head in range(layers[layer].shape[1])
    ]
    return torch.stack([layers[layer][0, head] for layer, head in chosen]).double().cpu().numpy()


def spans(weight_HTS: NDArray[np.float64]) -> NDArray[np.intp]:
    """The positions [T, 2], from and to (not included), at which each token is said, in order and without overlap.

    Args:
        weight_HTS: attention to the positions that hold audio, at least one; those after its end are left out.
    """
    spread_HT1 = weight_HTS.std(axis=-1, keepdims=True) + np.finfo(np.float64).tiny
    standard_HTS = (weight_HTS - weight_HTS.mean(axis=-1, keepdims=True)) / spread_HT1
    rows, columns = path(-median_filter(standard_HTS, size=(1, 1, _SMOOTHED), mode="mirror").mean(axis=0))
    found_T2 = np.zeros((weight_HTS.shape[1], 2), np.intp)
    for token, weight_S in enumerate(weight_HTS.mean(axis=0)):
        stretch = columns[rows == token]
        heard = stretch[weight_S[stretch] >= _HEARD * weight_S[stretch].max()]
        found_T2[token] = heard[0], heard[-1] + 1
    found_T2[:-1, 1] = np.minimum(found_T2[:-1, 1], found_T2[1:, 0])  # neighbours on the path may share a position
    return found_T2


def path(cost_TS: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The cheapest way from the first cell to the last by steps down, right or both: its rows and its columns."""
    total_TS = np.empty_like(cost_TS)
    reached_S = np.full(cost_TS.shape[1], np.inf)
    reached_S[0] = 0.0
    for row, cost_S in enumerate(cost_TS):
        along_S = np.cumsum(cost_S)
        total_TS[row] = along_S + np.minimum.accumulate(reached_S - along_S + cost_S)
        reached_S = np.minimum(total_TS[row], np.append(np.inf, total_TS[row, :-1]))
    cells = [(cost_TS.shape[0] - 1, cost_TS.shape[1] - 1)]
    while cells[-1] != (0, 0):
        row, column = cells[-1]
        before = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
        cells.append(min((cell for cell in before if min(cell) >= 0), key=lambda cell: total_TS[cell]))
    rows, columns = np.array(cells[::-1]).T
    return rows, columns


def words(tokens: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, slice]]:
    """The words of a text, which are what spaces separate, and each one's tokens.

    It works for every tokenizer that can decode the beginning of a text: a token belongs to the word that a letter
    after it would belong to.
    """
    beginnings = [cast(str, tokens.decode(ids[: end + 1], skip_special_tokens=True)) for end in range(len(ids))]
    texts = beginnings[-1].split() if beginnings else []
    places = [len(f"{beginning}x".split()) - 1 for beginning in beginnings]
    firsts = np.searchsorted(places, np.arange(len(texts) + 1))
    return [
        (text, slice(first, max(end, first + 1)))
        for text, (first, end) in zip(texts, pairwise(firsts.tolist()), strict=True)
    ]


@contextmanager
def _eager(network: WhisperForConditionalGeneration) -> Iterator[None]:
    """Let the network compute attention such that it can be looked at; the fused kernels return none."""
    usual = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(usual)
