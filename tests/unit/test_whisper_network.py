"""The small Whisper: spelling, features, adapters, saving, loading, a base model, and transcripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import lfilter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from models import predictor as predictors
from models.whisper import network as networks
from models.whisper.audio import AudioError
from models.whisper.augment import distort, disturb
from models.whisper.config import AugmentConfig, DigitsConfig, WhisperConfig
from models.whisper.digits import Sequences
from models.whisper.predict import Transcript, WhisperPredictor
from models.whisper.preprocess import PreprocessConfig
from models.whisper.scores import errors
from models.whisper.train import WhisperTask
from models.whisper.utterances import Utterance
from ops.configuration import load

RATE_HZ = 8000
EOS, SOT = "<|endoftext|>", "<|startoftranscript|>"
CONFIGS = Path(__file__).parents[2] / "configs" / "whisper"
SMALL = {"width": 16, "layers": 1, "heads": 2, "mel_bins": 20, "max_tokens": 12, "dropout": 0.0}
DATA = {"max_seconds": 1, "digits": [1, 2], "train_utterances": 50}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_builds(path: Path) -> None:
    config = load(WhisperConfig, path, ["network.base=null"])  # neither registry nor hub is there
    rate_hz = config.data.sample_rate_hz
    one = WhisperTask(config, pool([utterance("one", rate_hz=rate_hz), utterance("two", 900.0, rate_hz)]), ())
    frames = one.batch([(0, 0)])["input_features"].shape[-1]
    assert frames == one.features.nb_max_frames
    assert sum(parameter.numel() for parameter in one.build().parameters()) > 0


def utterance(text: str, hz: float = 300.0, rate_hz: int = RATE_HZ) -> Utterance:
    wave = np.sin(2 * np.pi * hz * np.arange(rate_hz // 4) / rate_hz).astype(np.float32)
    return Utterance("", wave, text, "ann", rate_hz)


def vowel(pitch_hz: float, formant_hz: float) -> NDArray[np.float32]:
    """Half a second of pulses through one resonance 100 Hz wide."""
    pulses = np.diff(np.floor(np.arange(RATE_HZ // 2 + 1) * pitch_hz / RATE_HZ))
    radius = np.exp(-np.pi * 100 / RATE_HZ)
    poles = [1, -2 * radius * np.cos(2 * np.pi * formant_hz / RATE_HZ), radius**2]
    return (0.1 * lfilter([1], poles, pulses)).astype(np.float32)


def pool(utterances: Sequence[Utterance]) -> Sequences:
    return Sequences(utterances, DigitsConfig.model_validate(DATA | {"sample_rate_hz": utterances[0].sample_rate_hz}))


def task(**network: object) -> WhisperTask:
    config = WhisperConfig.model_validate({"data": DATA, "network": SMALL | network})
    return WhisperTask(config, pool([utterance("one"), utterance("two", 900.0)]), (utterance("one"),))


def test_tokens_round_trip_and_end() -> None:
    tokens = networks.tokenizer(None, ["one", "two", "six"])
    rows = networks.labels(tokens, ["one two", "six"], start_token=1)
    assert rows.shape == (2, 3), "words of the texts are one token each"
    assert tokens.decode(rows[0], skip_special_tokens=True) == "one two"
    assert rows[1].tolist()[1:] == [tokens.eos_token_id, -100]
    assert tokens.decode(tokens("nine oxen").input_ids) == "nine oxen", "other words are spelt"
    assert tokens.decode(tokens("naïve").input_ids, skip_special_tokens=True) == "nave"


def test_hops_that_do_not_fill_the_window_evenly_are_refused() -> None:
    with pytest.raises(networks.NetworkError, match="hop_ms=15 doesn't divide 2 s"):
        networks.extractor(None, RATE_HZ, 2, 20, 15.0)


def test_sound_far_below_the_loudest_is_not_heard() -> None:
    features = networks.extractor(None, RATE_HZ, 1, 20, 20.0)
    loud, faint = utterance("one").wave, 1e-3 * utterance("two", 900.0).wave
    waves = [loud + faint, faint]
    everything, near = PreprocessConfig(), PreprocessConfig(range_db=40)
    whole = networks.log_mel(features, waves, everything)
    assert torch.equal(whole, features(waves, sampling_rate=RATE_HZ, return_tensors="pt").input_features)
    heard = networks.log_mel(features, waves, near)
    assert (heard.amax(dim=(1, 2)) - heard.amin(dim=(1, 2))).tolist() == pytest.approx([1, 1]), "40 dB are one unit"
    above = whole > heard.amin(dim=(1, 2), keepdim=True)
    assert torch.equal(heard[above], whole[above])
    alone = networks.log_mel(features, [loud], near)[0]
    torch.testing.assert_close(heard[0], alone, rtol=0, atol=0.02)
    assert (whole[0] - networks.log_mel(features, [loud], everything)[0]).abs().max() > 0.2, "80 dB hold it"


def test_a_lifter_hides_the_pitch_and_leaves_the_vowel() -> None:
    features = networks.extractor(None, RATE_HZ, 1, 20, 20.0)
    waves = [vowel(pitch_hz, formant_hz) for pitch_hz, formant_hz in ((110, 500), (160, 500), (110, 1500))]
    plain, liftered = (
        networks.log_mel(features, waves, PreprocessConfig(range_db=40, lifter_ms=lifter_ms))
        for lifter_ms in (None, 2.5)
    )

    def apart(mel_BFT: torch.Tensor, other: int) -> float:
        return float((mel_BFT[0] - mel_BFT[other]).abs().mean())

    assert apart(liftered, 1) < 0.7 * apart(plain, 1), "another pitch"
    assert apart(liftered, 2) > 0.8 * apart(plain, 2), "another vowel"


def test_a_lifter_that_leaves_nothing_out_changes_nothing() -> None:
    features = networks.extractor(None, RATE_HZ, 1, 20, 20.0)
    waves = [utterance("one").wave, vowel(110, 500)]
    whole_ms = features.n_fft / 2 / RATE_HZ * 1000
    plain, liftered = (networks.log_mel(features, waves, PreprocessConfig(lifter_ms=ms)) for ms in (None, whole_ms))
    assert liftered.shape == plain.shape
    torch.testing.assert_close(liftered, plain, rtol=0, atol=0.02)


def test_batches_depend_on_nothing_but_their_numbers() -> None:
    first, second = task(), task()
    samples = [(0, 3), (1, 3), (2, 49)]
    left = first.batch(samples)
    first.batch([(5, 5)])
    right = second.batch(samples)
    alone = second.batch(samples[2:])
    assert torch.equal(left["input_features"], right["input_features"])
    assert torch.equal(left["labels"], right["labels"])
    assert torch.equal(alone["input_features"][0], right["input_features"][2])


def test_the_loss_is_a_sum_over_tokens() -> None:
    one = task()
    torch.manual_seed(0)
    network = one.build().eval()
    samples = [(0, 1), (0, 2), (0, 3)]
    whole, count = one.loss(network, one.batch(samples))
    parts = [one.loss(network, one.batch([sample])) for sample in samples]
    assert count == sum(part for _, part in parts)
    assert whole.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-4)


def test_a_saved_network_transcribes_the_same(tmp_path: Path) -> None:
    one = task()
    torch.manual_seed(1)
    made = one.predictor(one.build())
    made.save(tmp_path / "model")
    again = predictors.load(tmp_path / "model")
    assert isinstance(again, WhisperPredictor)
    assert (again.task, again.sample_rate_hz, again.max_seconds) == ("whisper", RATE_HZ, 1.0)
    waves = [utterance("one").wave, utterance("two", 900.0).wave[:700]]
    assert again.transcribe(waves) == made.transcribe(waves)
    assert [again.transcribe([wave])[0].text for wave in waves] == [one.text for one in again.transcribe(waves)]
    assert again.transcribe([]) == []


@pytest.mark.parametrize(("samples", "message"), [(0, "no samples"), (8001, "at most 1 s")])
def test_waves_that_do_not_fit_are_refused(samples: int, message: str) -> None:
    one = task()
    with pytest.raises(AudioError, match=message):
        one.predictor(one.build()).transcribe([np.zeros(samples, np.float32)])


def test_a_local_folder_is_a_base_and_adapters_merge_into_it(tmp_path: Path) -> None:
    plain = task()
    torch.manual_seed(2)
    plain.predictor(plain.build()).save(tmp_path / "base")
    adapted = task(base=str(tmp_path / "base"), lora={"r": 2, "alpha": 4, "dropout": 0.0})
    network = adapted.build()
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    network.eval()
    batch = adapted.batch([(0, 1), (0, 2)])
    with torch.no_grad():
        before = network(**batch).logits
        merged = networks.merged(network)
        after = merged(**batch).logits
    assert torch.allclose(before, after, atol=1e-4)
    adapted.predictor(merged).save(tmp_path / "merged")
    wave = utterance("one").wave
    assert predictors.load(tmp_path / "merged").transcribe([wave]) == adapted.predictor(merged).transcribe([wave])


def multilingual(folder: Path) -> Path:
    """A Whisper of 100 languages, as `openai/whisper-tiny`, but tiny and with the bytes as its tokens."""
    spoken = [f"<|{code}|>" for code in LANGUAGES]
    asked = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    special = [EOS, SOT, *spoken, *asked]
    vocabulary = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokens = WhisperTokenizer(vocab=vocabulary, merges=[], bos_token=EOS, eos_token=EOS, pad_token=EOS)
    tokens.add_special_tokens({"additional_special_tokens": special})
    features = networks.extractor(None, RATE_HZ, 1, 20, 12.5)
    network = networks.small(tokens, features, width=16, layers=1, heads=2, dropout=0.0, max_tokens=12)
    network.config.decoder_start_token_id = vocabulary[SOT]
    known = {
        "is_multilingual": True,
        "decoder_start_token_id": vocabulary[SOT],
        "lang_to_id": {token: vocabulary[token] for token in spoken},
        "task_to_id": {name: vocabulary[f"<|{name}|>"] for name in ("transcribe", "translate")},
        "no_timestamps_token_id": vocabulary["<|notimestamps|>"],
    }
    for name, value in known.items():
        setattr(network.generation_config, name, value)
    for part in (network, tokens, features):
        part.save_pretrained(folder)
    return folder


def test_a_multilingual_base_is_trained_with_the_tokens_that_it_is_asked_with(tmp_path: Path) -> None:
    german = task(base=str(multilingual(tmp_path / "base")), language="german")
    prompt = [SOT, "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    labels = german.batch([(0, 1)])["labels"][0]
    assert german.tokens.convert_ids_to_tokens(labels.tolist())[:4] == [*prompt[1:], *german.tokens.tokenize("one")[:1]]
    german.predictor(networks.merged(german.build())).save(tmp_path / "saved")
    loaded = cast(WhisperPredictor, predictors.load(tmp_path / "saved"))
    asked: list[list[int]] = []
    decoder = loaded._network.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, __, named: asked.append(named["input_ids"][0].tolist()), with_kwargs=True
    )
    loaded.transcribe([utterance("one").wave])
    assert loaded._tokens.convert_ids_to_tokens(asked[0]) == prompt


def test_a_base_without_a_generation_config_is_taken_as_one_of_a_single_language(tmp_path: Path) -> None:
    plain = task()
    plain.predictor(plain.build()).save(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    again = task(base=str(tmp_path / "base"), language="german")
    assert torch.equal(again.batch([(0, 1)])["labels"], plain.batch([(0, 1)])["labels"])
    assert isinstance(again.build(), torch.nn.Module)


def test_a_base_that_is_none_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(networks.NetworkError, match="no Whisper can be loaded"):
        networks.load(tmp_path / "nothing")
    plain = task()
    plain.predictor(plain.build()).save(tmp_path / "base")
    data = DATA | {"sample_rate_hz": 16000}
    config = WhisperConfig.model_validate({"data": data, "network": {"base": str(tmp_path / "base")}})
    with pytest.raises(networks.NetworkError, match="set data.sample_rate_hz=8000"):
        _ = WhisperTask(config, pool([utterance("one")]), ()).features


def test_learns_to_tell_two_tones_apart() -> None:
    one = task()
    torch.manual_seed(3)
    network = one.build()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    losses = []
    for step in range(40):
        total, count = one.loss(network, one.batch([(step, index) for index in range(4)]))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach()) / count)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_the_encoder_is_asked_for_the_letters_in_their_order() -> None:
    tokens = networks.tokenizer(None, ["ab"], vocabulary=32)
    rows = networks.labels(tokens, ["ab", "a"], start_token=1)
    space, a, b = rows[0].tolist()[:3]
    heard = torch.zeros(2, 8, 32)
    for row, said in enumerate(([0, space, space, a, 0, b, b, 0], [space, a, a, 0, 0, 0, 0, 0])):
        heard[row, range(8), said] = 30.0
    letters = torch.nn.Identity()
    assert networks.ctc_loss(letters, heard, rows, tokens).item() < 1e-3
    assert networks.ctc_loss(letters, heard.flip(1), rows, tokens).item() > 30
    apart = [networks.ctc_loss(letters, heard.flip(1)[one], rows[one], tokens) for one in (slice(0, 1), slice(1, 2))]
    assert networks.ctc_loss(letters, heard.flip(1), rows, tokens).item() == pytest.approx(
        torch.stack(apart).sum().item(), rel=1e-4
    )


@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4, "dropout": 0.0}])
def test_the_encoders_loss_trains_the_encoder_alone_too(lora: dict[str, float] | None) -> None:
    one = task(ctc=0.5, lora=lora)
    network = one.build()
    total, _ = one.loss(network, one.batch([(0, 1), (0, 2)]))
    total.backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
    assert not [name for name, _ in networks.merged(network).named_parameters() if networks.CTC_HEAD in name]
    with pytest.raises(ValueError, match="network.ctc needs train.parallelism=ddp"):
        WhisperConfig.model_validate({"network": {"ctc": 0.5}, "train": {"parallelism": "fsdp"}})


@given(seed=st.integers(0, 10**6), frames=st.integers(0, 50), share=st.floats(0, 0.5), masks=st.integers(0, 3))
def test_masks_hide_no_more_than_their_share(seed: int, frames: int, share: float, masks: int) -> None:
    mel_FT = np.random.default_rng(seed).normal(size=(20, 50)).astype(np.float32)
    config = AugmentConfig(masks=masks, mask_share=share)
    masked = distort(mel_FT, frames, config, np.random.default_rng(seed))
    hidden = masked != mel_FT
    whole_bins, whole_frames = hidden.all(axis=1).sum(), hidden.all(axis=0).sum()
    assert whole_bins <= masks * round(20 * share)
    assert whole_frames <= masks * round(frames * share)
    assert not hidden[~hidden.all(axis=1)][:, frames:].any(), "what comes after the speech is no span of it"
    again = distort(mel_FT, frames, config, np.random.default_rng(seed))
    assert np.array_equal(masked, again)


def test_a_tilt_moves_the_ends_most() -> None:
    flat = np.zeros((21, 5), np.float32)
    tilted = distort(flat, 5, AugmentConfig(tilt=0.3), np.random.default_rng(1))
    assert tilted[10] == pytest.approx(np.zeros(5), abs=1e-6)
    assert tilted[0] == pytest.approx(-tilted[-1])
    assert 0 < abs(tilted[0][0]) <= 0.3


class Parrot(WhisperPredictor):
    """Says what it is told, so that the error rates are tested without a network."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.sample_rate_hz = RATE_HZ
        self.max_seconds = 1.0

    def transcribe(self, waves: object) -> list[Transcript]:
        return [Transcript(text, 1.0) for text in self.texts]


def test_error_rates_are_those_of_jiwer() -> None:
    references = ["one two three", "six", "nine nine zero"]
    hypotheses = ["one too three", "", "nine zero zero one"]
    sums = errors(Parrot(hypotheses), [utterance(text) for text in references])
    assert sums["wer"][0] / sums["wer"][1] == pytest.approx(jiwer.wer(references, hypotheses))
    assert sums["cer"][0] / sums["cer"][1] == pytest.approx(jiwer.cer(references, hypotheses))


def test_augmentation_without_strength_changes_nothing() -> None:
    wave = utterance("one").wave
    calm = AugmentConfig(speed=0.0, noise_db=-300.0)
    assert np.abs(disturb(wave, RATE_HZ, calm, np.random.default_rng(0)) - wave[:-1]).max() < 1e-6


def test_a_share_of_the_utterances_is_heard_in_a_room() -> None:
    wave = np.concatenate([utterance("one").wave, np.zeros(RATE_HZ // 2, np.float32)])
    half = AugmentConfig(speed=0.0, noise_db=-300.0, reverberant=0.5, rt60_s=(0.2, 0.3))
    heard = [disturb(wave, RATE_HZ, half, np.random.default_rng(seed)) for seed in range(100)]
    assert {len(one) for one in heard} == {len(wave) - 1}
    echoing = sum(float(np.abs(one[len(wave) // 2 :]).max()) > 1e-4 for one in heard)
    assert 30 <= echoing <= 70
