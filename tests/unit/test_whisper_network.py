"""The small Whisper: spelling, features, adapters, saving, loading, a base model, and transcripts."""

from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch

from models import predictor as predictors
from models.whisper import network as networks
from models.whisper.audio import AudioError
from models.whisper.config import AugmentConfig, WhisperConfig
from models.whisper.data import Utterance
from models.whisper.predict import Transcript, WhisperPredictor
from models.whisper.train import WhisperTask, disturb, errors
from ops.configuration import load

RATE_HZ = 8000
CONFIGS = Path(__file__).parents[2] / "configs" / "whisper"
SMALL = {"width": 16, "layers": 1, "heads": 2, "mel_bins": 20, "max_tokens": 12, "dropout": 0.0}
DATA = {"max_seconds": 1, "digits": [1, 2], "train_utterances": 50}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_builds(path: Path) -> None:
    config = load(WhisperConfig, path)
    one = WhisperTask(config, (utterance("one"), utterance("two", 900.0)), ())
    frames = one.batch([(0, 0)])["input_features"].shape[-1]
    assert frames == one.features.nb_max_frames
    assert sum(parameter.numel() for parameter in one.build().parameters()) > 0


def utterance(text: str, hz: float = 300.0) -> Utterance:
    wave = np.sin(2 * np.pi * hz * np.arange(2000) / RATE_HZ).astype(np.float32)
    return Utterance("", wave, text, "ann", RATE_HZ)


def task(**network: object) -> WhisperTask:
    config = WhisperConfig.model_validate({"data": DATA, "network": SMALL | network})
    return WhisperTask(config, (utterance("one"), utterance("two", 900.0)), (utterance("one"),))


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


def test_a_base_that_is_none_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(networks.NetworkError, match="no Whisper can be loaded"):
        networks.load(tmp_path / "nothing")
    plain = task()
    plain.predictor(plain.build()).save(tmp_path / "base")
    data = DATA | {"sample_rate_hz": 16000}
    config = WhisperConfig.model_validate({"data": data, "network": {"base": str(tmp_path / "base")}})
    with pytest.raises(networks.NetworkError, match="set data.sample_rate_hz=8000"):
        _ = WhisperTask(config, (), ()).features


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


class Parrot(WhisperPredictor):
    """Says what it is told, so that the error rates are tested without a network."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.sample_rate_hz = RATE_HZ

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
    assert np.abs(disturb(wave, calm, np.random.default_rng(0)) - wave[:-1]).max() < 1e-6
