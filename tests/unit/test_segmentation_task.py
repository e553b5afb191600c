"""What the harness is given: batches decided by sample numbers, validation that ranks can share."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.segmentation.config import PredictConfig, SegmentationConfig
from models.segmentation.data import splits
from models.segmentation.predict import Segmented, spots
from models.segmentation.scores import mean_scores
from models.segmentation.train import SegmentationTask, chosen_limits, fingerprint, sample_scores

TINY = {
    "data": {"phantoms": 6, "validation_phantoms": 5, "test_phantoms": 3, "phantom_size_px": 32},
    "preprocess": {"size_px": 32},
    "network": {"features": [4, 8]},
}


def config(**changes):
    return SegmentationConfig.model_validate(TINY | changes)


def task(**changes):
    made = config(**changes)
    found = splits(made.data, None)
    return SegmentationTask(made, found.train, found.validation)


def test_a_batch_is_decided_by_its_sample_numbers():
    samples = [(0, 3), (2, 1), (2, 3)]
    whole = task().batch(samples)
    assert whole["image"].shape == whole["truth"].shape == (3, 1, 32, 32)
    other = task()
    other.batch([(5, 2)])
    for number, sample in enumerate(samples):
        one = other.batch([sample])
        assert torch.equal(one["image"][0], whole["image"][number])
        assert torch.equal(one["truth"][0], whole["truth"][number])
    assert not torch.equal(whole["image"][0], whole["image"][2])  # another epoch, another augmentation


def test_ranks_share_validation_without_loss():
    network = task().build()
    whole = task().validate(network, 0, 1)
    shares = [task().validate(network, rank, 2) for rank in range(2)]
    assert list(whole) == list(shares[0])
    for name, (total, count) in whole.items():
        assert sum(share[name][0] for share in shares) == pytest.approx(total, abs=1e-4)
        assert sum(share[name][1] for share in shares) == count
    assert task().primary in whole


def test_a_task_travels():
    one = task()
    one.batch([(0, 0)])
    again = pickle.loads(pickle.dumps(task()))
    assert torch.equal(again.batch([(0, 0)])["image"], one.batch([(0, 0)])["image"])


def test_it_learns():
    torch.manual_seed(0)
    one = task(network={"features": [8, 16]}, data=TINY["data"] | {"phantoms": 8})
    network = one.build()
    losses = []
    for step in range(25):
        loss, count = one.loss(network, one.batch([(step, index) for index in range(8)]))
        assert count == 8
        network.zero_grad()
        (loss / count).backward()
        with torch.no_grad():
            for weight in network.parameters():  # torch.optim would import the compiler, which takes 10 s
                weight -= 0.01 * weight.grad.sign()
        losses.append(float(loss.detach()) / count)
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


class Graded:
    """A predictor whose probabilities are right from .3 on."""

    def segment(self, images):
        return [Segmented(np.where(image > 0, 0.32, 0.22).astype(np.float32), image > 0) for image in images]


def test_the_limits_are_the_best_on_the_scans_that_they_are_given():
    found = splits(config().data, None)
    scans = [replace(scan, image=scan.mask.astype(np.float32)) for scan in found.test]
    limits = [PredictConfig(threshold=one, peak=other) for one, other in (("validation", 0), (0.7, 0.8))]
    assert chosen_limits(Graded(), scans, limits[0]) == (0.3, 0.0)
    assert chosen_limits(Graded(), scans, limits[1]) == (0.7, 0.8)


class Unsure:
    """Finds every lesion with .95, and in images without one a spot with .75."""

    def segment(self, images):
        made = [np.where(image > 0, 0.95, 0.1) if image.any() else np.eye(32) * 0.75 for image in images]
        return [Segmented(one.astype(np.float32), one > 0.5) for one in made]


def test_a_peak_keeps_images_without_a_lesion_empty():
    found = splits(config().data, None)
    scans = [replace(scan, image=scan.mask.astype(np.float32)) for scan in found.test]
    empty = replace(scans[0], image=np.zeros((32, 32), np.float32), mask=np.zeros((32, 32), bool))
    assert chosen_limits(Unsure(), scans, PredictConfig(peak="validation")) == (0.5, 0.0)
    threshold, peak = chosen_limits(Unsure(), [*scans, empty], PredictConfig(peak="validation"))
    assert threshold == 0.5 and 0.75 <= peak < 0.95


def test_spots_are_kept_whole_or_not_at_all():
    probability = np.zeros((6, 10), np.float32)
    probability[1:4, 1:4] = 0.6
    probability[2, 2] = 0.97
    probability[1:4, 6:9] = 0.7
    assert np.array_equal(spots(probability, 0.5, 0.0), probability >= 0.5)
    assert np.argwhere(spots(probability, 0.5, 0.9)).max(axis=0).tolist() == [3, 3]
    assert spots(probability, 0.5, 0.9).sum() == 9
    assert not spots(probability, 0.5, 0.98).any()


def test_a_fingerprint_changes_with_what_decides_the_weights_only():
    found = splits(config().data, None)
    one = fingerprint(config(), found)
    assert one == fingerprint(config(predict={"flip": True}, registered_name="x", train={"workers": 1}), found)
    assert one != fingerprint(config(train={"seed": 1}), found)
    assert one != fingerprint(config(loss={"bce": 2}), found)
    assert one != fingerprint(config(), splits(config(data=TINY["data"] | {"seed": 3}).data, None))


def test_scores_by_sample_are_those_of_the_mean(tmp_path):
    one, found = task(), splits(config().data, None)
    predictor = one.predictor(one.build())
    predictor.save(tmp_path)
    scores = sample_scores(found, tmp_path)
    means = mean_scores([each.mask for each in predictor.segment([scan.image for scan in found.test])], found.test)
    for name, pairs in scores.items():
        assert len(pairs) == len(found.test)
        assert sum(value for value, _ in pairs) / sum(count for _, count in pairs) == pytest.approx(means[name])
