"""Fine-tunes a Whisper, measures what it gained on the test split, and registers it."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor, WhisperForConditionalGeneration

from models import trainer
from models.registry import BASELINE, Registry
from models.runs import flatten
from models.training_run import training_run
from models.whisper import network as networks
from models.whisper import predict
from models.whisper.augment import distort, disturb
from models.whisper.config import WhisperConfig
from models.whisper.predict import WhisperPredictor
from models.whisper.preprocess import prepare
from models.whisper.scores import by_subset, each_errors, errors, rates_of, sums
from models.whisper.utterances import Pool, Splits, Utterance

logger = logging.getLogger(__name__)

REGISTERED = "models:/"
"""Before NAME@ALIAS: a base that is in the registry."""


@dataclass(frozen=True)
class WhisperTask:
    """What `models.trainer` trains: utterances drawn anew from a pool, validated by WER."""

    config: WhisperConfig
    pool: Pool
    validation: tuple[Utterance, ...]

    primary = "wer"
    higher_is_better = False

    @property
    def size(self) -> int:
        """Utterances of an epoch."""
        return self.config.data.train_utterances

    @cached_property
    def tokens(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base, or one learnt from the pool's transcripts."""
        network = self.config.network
        texts = {one.text for one in self.pool.utterances}
        return networks.tokenizer(network.base, texts, network.vocabulary, network.language)

    @cached_property
    def features(self) -> WhisperFeatureExtractor:
        """The log-mel features of the base, or small ones."""
        data, network = self.config.data, self.config.network
        found = networks.extractor(
            network.base, data.sample_rate_hz, data.max_seconds, network.mel_bins, network.hop_ms
        )
        if (found.sampling_rate, found.chunk_length >= data.max_seconds) != (data.sample_rate_hz, True):
            raise networks.NetworkError(
                f"{network.base} takes {found.sampling_rate} Hz and at most {found.chunk_length} s; "
                f"set data.sample_rate_hz={found.sampling_rate} and data.max_seconds accordingly."
            )
        return found

    def build(self) -> nn.Module:
        """The network to train, with adapters where they are configured."""
        size, lora = self.config.network, self.config.network.lora
        if size.base is not None:
            network = networks.load(size.base, size.language)
        else:
            network = networks.small(
                self.tokens,
                self.features,
                width=size.width,
                layers=size.layers,
                heads=size.heads,
                dropout=size.dropout,
                max_tokens=size.max_tokens,
            )
        whole: nn.Module = network
        if lora is not None:
            whole = networks.adapt(network, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
        return networks.with_ctc_head(whole, network.config.d_model, len(self.tokens)) if size.ctc else whole

    def batch(self, samples: Sequence[trainer.Sample]) -> Mapping[str, Tensor]:
        """`input_features` float32[B, mel, frames] and `labels` int64[B, T], padded with -100."""
        generators = [np.random.default_rng([self.config.train.seed, *sample]) for sample in samples]
        drawn = [self.pool.draw(rng, epoch) for rng, (epoch, _) in zip(generators, samples, strict=True)]
        rate_hz = self.config.data.sample_rate_hz
        longest = self.config.data.max_seconds * rate_hz
        waves = [
            prepare(disturb(one.wave, rate_hz, self.config.augment, rng)[:longest], rate_hz, self.config.preprocess)
            for one, rng in zip(drawn, generators, strict=True)
        ]
        mel_BFT = networks.log_mel(self.features, waves, self.config.preprocess).numpy()
        distorted = [
            distort(mel_FT, len(wave) // self.features.hop_length, self.config.augment, rng)
            for mel_FT, wave, rng in zip(mel_BFT, waves, generators, strict=True)
        ]
        texts = [one.text for one in drawn]
        return {
            "input_features": torch.from_numpy(np.stack(distorted)),
            "labels": networks.labels(self.tokens, texts, self._start_token),
        }

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the tokens' cross-entropies, and how many tokens there are."""
        count = int((batch["labels"] != -100).sum())
        output = network(**batch)
        if not self.config.network.ctc:
            return output.loss * count, count
        share, heard_BSD = self.config.network.ctc, output.encoder_last_hidden_state
        head = getattr(getattr(network, "module", network), networks.CTC_HEAD)
        of_encoder = networks.ctc_loss(head, heard_BSD, batch["labels"], self.tokens)
        return (1 - share) * output.loss * count + share * of_encoder, count

    def validate(self, network: nn.Module, rank: int, world_size: int) -> Mapping[str, tuple[float, float]]:
        """WER and CER of one rank's share of the validation split, as edits and length."""
        return errors(self.predictor(network), self.validation[rank::world_size])

    def tensor_plan(self, network: nn.Module) -> Mapping[str, ParallelStyle]:
        """The feed-forward layers of encoder and decoder."""
        return networks.tensor_plan(network)

    def predictor(self, network: nn.Module) -> WhisperPredictor:
        """The network as it is used after training."""
        plain = network if isinstance(network, WhisperForConditionalGeneration) else network.get_base_model()  # type: ignore[operator]
        device = str(next(network.parameters()).device)
        return WhisperPredictor(plain, self.tokens, self.features, device, self.config.preprocess)

    @cached_property
    def _start_token(self) -> int:
        base = self.config.network.base
        return int(networks.start_token(base) if base is not None else self.tokens.bos_token_id)


def sample_errors(found: Splits, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Edits and lengths of each utterance of the test split, in all and by kind of sentence, by a folder's model."""
    each = each_errors(predict.load(folder), found.test)
    scores = {name: [one[name] for one in each] for name in ("wer", "cer")}
    for subset in sorted({one.subset for one in found.test}):
        own = [one.subset == subset for one in found.test]
        for name in ("wer", "cer"):
            pairs = zip(scores[name], own, strict=True)
            scores[f"{name}/{subset}"] = [edits if here else (0.0, 0.0) for edits, here in pairs]
    return scores


def train(config: WhisperConfig, found: Splits, *, home: Path, tracking_uri: str) -> dict[str, object]:
    """Train, evaluate on the test split before and after, register; the result of the job.

    An unfinished run of the same name goes on. Ray must be initialised.

    Raises:
        RunError: the name is in use or belongs to another configuration.
        RegistryError: the base is not registered.
        NetworkError: the base model can't be loaded or doesn't fit the data.
    """
    registry = Registry(tracking_uri)
    pinned, config = _resolved(config, registry, home / "models")
    config_hash = _fingerprint(pinned, found)
    task = WhisperTask(config, found.train, found.validation)
    parameters = _parameters(pinned, found)
    with training_run(config.registered_name, config.train, config_hash, parameters, home, tracking_uri) as training:
        torch.manual_seed(config.train.seed)
        baseline = task.predictor(networks.merged(task.build()))
        before = rates_of(errors(baseline, found.test))
        logger.info(json.dumps({"event": "before training", "run": training.claim.name, **before}))
        fitted = training.fit(WhisperTask(config, found.train, found.validation))
        trained = trainer.trained(task, fitted.weights)
        predictor = task.predictor(networks.merged(trained))
        each = each_errors(predictor, found.test)
        after = rates_of(sums(each))
        rates = {f"before_{key}": value for key, value in before.items()} | after
        training.run.log_metrics({f"test_{key}": value for key, value in rates.items()}, fitted.steps)
        if (config.registered_name, BASELINE) not in registry.aliases():
            untrained = training.register("baseline", baseline.save, _tags(found, before))
            registry.set_alias(untrained.name, BASELINE, untrained.version, "the network before any training")
        entered = training.enter(training.register("model", predictor.save, _tags(found, after)), fitted)
    return {
        "wer_before": before["wer"],
        "wer_after": after["wer"],
        "cer_after": after["cer"],
        "wer_by": by_subset(found.test, each),
        **entered,
        "source": found.source,
        "skipped": found.skipped,
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
    }


def _tags(found: Splits, rates: Mapping[str, float]) -> dict[str, str]:
    tags = {"task": "whisper", "split_hash": found.hash, "source": found.source}
    return tags | {key: f"{value:.6f}" for key, value in rates.items()}


def _resolved(config: WhisperConfig, registry: Registry, cache: Path) -> tuple[WhisperConfig, WhisperConfig]:
    """The configuration with the version of a registered base in place of its alias, and with the base's folder."""
    base = config.network.base
    if base is None or not base.startswith(REGISTERED):
        return config, config
    name, _, alias = base.removeprefix(REGISTERED).partition("@")
    version = registry.resolve(name, alias)
    places = (f"{REGISTERED}{name}/{version.version}", str(registry.download(version, cache)))
    networks_of = (config.network.model_copy(update={"base": place}) for place in places)
    pinned, local = (config.model_copy(update={"network": network}) for network in networks_of)
    return pinned, local


def _fingerprint(config: WhisperConfig, found: Splits) -> str:
    """A hash of what decides the weights: data, network and recipe, but not how the work is scheduled."""
    deciding = config.model_dump(
        mode="json", exclude={"evaluate": True, "registered_name": True, "train": set(trainer.SCHEDULING)}
    )
    total = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for one in (*found.train.utterances, *found.validation, *found.test):
        total.update(f"{one.id}\0{one.text}\0".encode())
        total.update(np.ascontiguousarray(one.wave).tobytes())
    return total.hexdigest()


def _parameters(config: WhisperConfig, found: Splits) -> dict[str, object]:
    counts = {"train": len(found.train.utterances), "validation": len(found.validation), "test": len(found.test)}
    return (
        flatten(config.model_dump(mode="json", exclude={"evaluate"}))
        | {f"data.{part}_count": count for part, count in counts.items()}
        | {
            "data.hash": found.hash,
            "data.used_source": found.source,
            "data.skipped": found.skipped,
        }
    )
