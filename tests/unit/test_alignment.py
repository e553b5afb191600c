"""When words are said: the warping against brute force, words of tokens, and times by small networks."""

from collections.abc import Iterator
from dataclasses import replace
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from models.whisper import alignment
from models.whisper import network as networks
from models.whisper.predict import WhisperPredictor

RATE_HZ = 8000


def ways(row: int, column: int) -> Iterator[list[tuple[int, int]]]:
    """Every way from the first cell to this one."""
    if (row, column) == (0, 0):
        yield [(0, 0)]
    for before in ((row - 1, column - 1), (row - 1, column), (row, column - 1)):
        if min(before) >= 0:
            yield from ([*way, (row, column)] for way in ways(*before))


@settings(max_examples=200, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(-9, 9)))
def test_no_path_is_cheaper(cost: np.ndarray) -> None:
    rows, columns = alignment.path(cost)
    every = list(ways(cost.shape[0] - 1, cost.shape[1] - 1))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) in every
    assert cost[rows, columns].sum() == min(sum(cost[cell] for cell in way) for way in every)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(5, 15)), min_size=1, max_size=8), st.integers(0, 20))
def test_a_token_spans_what_it_looks_at(blocks: list[tuple[int, int]], rest: int) -> None:
    edges = np.cumsum([length for block in blocks for length in block]).reshape(-1, 2)
    weight = np.zeros((2, len(blocks), edges[-1, 1] + rest))
    for token, (start, end) in enumerate(edges):
        weight[:, token, start:end] = 1 / (end - start)
    assert alignment.spans(weight).tolist() == edges.tolist()


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.tuples(st.just(2), st.integers(1, 6), st.integers(1, 9)), elements=st.floats(0, 1)))
def test_spans_follow_one_another(weight: np.ndarray) -> None:
    found = alignment.spans(weight)
    assert found.shape == (weight.shape[1], 2)
    assert found.ravel().tolist() == sorted(found.ravel().tolist())
    assert found[0, 0] >= 0 and found[-1, 1] <= weight.shape[2]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that pretrained Whispers have."""
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator([" one two"] * 3, BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=pairs)


@pytest.mark.parametrize("tokens", [networks.tokenizer(None, ["one two"]), byte_level()], ids=["ours", "byte level"])
@pytest.mark.parametrize("text", ["", "one", "one two", "one sixteen two two", "don't one"])
def test_tokens_make_up_words(tokens: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokens(text).input_ids
    found = alignment.words(tokens, ids)
    assert [word for word, _ in found] == text.split()
    assert [place for _, part in found for place in range(len(ids))[part]] == list(range(len(ids)))
    assert [tokens.decode(ids[part]).strip() for _, part in found] == text.split()


def test_letters_of_several_tokens_and_punctuation_stay_with_their_word() -> None:
    tokens = byte_level()
    found = alignment.words(tokens, tokens(" Café, naïve — end.").input_ids)
    assert [word for word, _ in found] == ["Café,", "naïve", "—", "end."]


def predictor() -> WhisperPredictor:
    """A network with random weights that says letters, many of them as words."""
    tokens, features = (
        networks.tokenizer(None, [" ".join(ascii_lowercase)]),
        networks.extractor(None, RATE_HZ, 1, 20, 20),
    )
    network = networks.small(tokens, features, width=16, layers=2, heads=2, dropout=0.0, max_tokens=12)
    return WhisperPredictor(network, tokens, features)


def test_words_of_any_network_are_in_order_and_within_the_audio() -> None:
    torch.manual_seed(0)
    waves = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in (1, 100, 3001, 8000)]
    counts = []
    for one in (predictor(), predictor(), predictor()):
        plain, timed = one.transcribe(waves), one.transcribe(waves, timestamps=True)
        assert plain == [replace(each, words=()) for each in timed]
        for wave, transcript in zip(waves, timed, strict=True):
            counts.append(len(transcript.words))
            assert [word.text for word in transcript.words] == transcript.text.split()
            times = [time for word in transcript.words for time in (word.start_s, word.end_s)]
            assert times == sorted(times)
            assert all(0 <= time <= len(wave) / RATE_HZ for time in times)
            assert all(0 <= word.confidence <= 1 for word in transcript.words)
    assert max(counts) > 5


def test_attention_is_that_of_the_chosen_heads_and_leaves_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    tokens, features = networks.tokenizer(None, ["one two"]), networks.extractor(None, RATE_HZ, 1, 20, 20.0)
    network = networks.small(tokens, features, width=16, layers=3, heads=2, dropout=0.0, max_tokens=12).eval()
    encoded, ids = torch.randn(1, 25, 16), torch.tensor([1, 5, 6, 7])
    usual = network.config._attn_implementation
    upper = alignment.attention(network, encoded, ids)
    assert network.config._attn_implementation == usual != "eager"
    assert upper.shape == (4, 3, 25), "two heads in each of the upper two layers"
    assert upper.sum(axis=-1) == pytest.approx(1)
    network.generation_config.alignment_heads = [[2, 1], [0, 0]]
    chosen = alignment.attention(network, encoded, ids)
    assert chosen.shape == (2, 3, 25)
    assert np.array_equal(chosen[0], upper[3])


TONES_HZ = {"a": 250.0, "b": 400.0, "c": 640.0, "d": 1024.0}


def tones(rng: np.random.Generator, count: int) -> tuple[np.ndarray, str, list[float]]:
    """A second of noise with `count` tones anywhere in it; what they are called, and when they begin."""
    lengths = rng.integers(1200, 2000, count)
    starts = np.sort(rng.integers(0, RATE_HZ - lengths.sum(), count)) + np.cumsum(lengths) - lengths
    names = [str(rng.choice(list(TONES_HZ))) for _ in range(count)]
    wave = rng.normal(0, 0.01, RATE_HZ)
    for name, start, length in zip(names, starts, lengths, strict=True):
        wave[start : start + length] += np.sin(2 * np.pi * TONES_HZ[name] * np.arange(length) / RATE_HZ)
    return wave.astype(np.float32), " ".join(names), (starts / RATE_HZ).tolist()


def test_a_trained_network_says_when_tones_begin() -> None:
    """Its encoder hears 100 ms around each position only, so that soon it must look where the tone is."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokens, features = networks.tokenizer(None, [" ".join(TONES_HZ)]), networks.extractor(None, RATE_HZ, 1, 20, 25.0)
    network = networks.small(tokens, features, width=32, layers=1, heads=2, dropout=0.0, max_tokens=6)
    for parameter in network.model.encoder.layers[0].self_attn.out_proj.parameters():
        parameter.requires_grad_(False).zero_()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=150, pct_start=0.1)
    for step in range(150):
        waves, texts, _ = zip(
            *(tones(rng, 1 if step < 50 else int(rng.integers(1, 3))) for _ in range(16)), strict=True
        )
        mel = features(list(waves), sampling_rate=RATE_HZ, return_tensors="pt").input_features
        loss = network(input_features=mel, labels=networks.labels(tokens, list(texts), tokens.bos_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    waves, texts, starts = zip(*(tones(rng, 2) for _ in range(30)), strict=True)
    found = WhisperPredictor(network, tokens, features).transcribe(waves, timestamps=True)
    right = [(one, truth) for one, text, truth in zip(found, texts, starts, strict=True) if one.text == text]
    errors_s = [word.start_s - at_s for one, truth in right for word, at_s in zip(one.words, truth, strict=True)]
    assert len(right) >= 10
    assert np.median(np.abs(errors_s)) < 0.08, "always saying the same would be wrong by 0.12 s"
