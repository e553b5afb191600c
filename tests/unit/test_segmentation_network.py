"""The U-Net with its options, its loss, and a predictor that survives its folder."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.predictor import PredictorError, load
from models.segmentation.config import NetworkConfig, PreprocessConfig, SegmentationConfig
from models.segmentation.network import NetworkError, UNet, segmentation_loss
from models.segmentation.phantoms import phantom
from models.segmentation.predict import SegmentationPredictor, build
from models.segmentation.scans import DataError

SIZES = {
    "plain": {},
    "attention": {"attention": True},
    "residual": {"residual": True},
    "all": {"attention": True, "residual": True, "norm": "group", "activation": "silu", "dropout": 0.2},
    "instance": {"norm": "instance", "activation": "gelu"},
    "none": {"norm": "none", "activation": "leaky_relu"},
}


def small(options):
    torch.manual_seed(0)
    return build(NetworkConfig(features=(4, 8, 12), **options))


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
def test_the_answer_has_the_size_of_the_image_and_all_weights_learn(options):
    network = small(options)
    found = network(torch.rand(2, 1, 16, 24))
    assert found.shape == (2, 1, 16, 24)
    found.sum().backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in network.parameters())


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
def test_every_skip_has_the_size_of_its_decoder(options):
    network = small(options)
    seen = []
    for level, (encoder, rise) in enumerate(zip(network.encoders, network.rises, strict=True)):
        encoder.register_forward_hook(lambda _, __, out, level=level: seen.append((level, tuple(out.shape))))
        rise.register_forward_hook(lambda _, __, out, level=level: seen.append((level, tuple(out.shape))))
    network(torch.rand(1, 1, 40, 24))
    by_level = [[shape for at, shape in seen if at == level] for level in range(3)]
    assert by_level == [[(1, width, 40 // 2**n, 24 // 2**n)] * 2 for n, width in enumerate((4, 8, 12))]


@pytest.mark.parametrize("shape", [(1, 1, 20, 24), (1, 1, 24, 7), (1, 1, 0, 8), (1, 3, 24, 24), (24, 24)])
def test_a_size_that_does_not_halve_is_refused_by_a_sentence(shape):
    with pytest.raises(NetworkError, match=r"multiples of 8|grey images"):
        small({})(torch.zeros(shape))


def test_the_default_is_the_classic_size():
    with torch.device("meta"):
        network = UNet()
    # 31,037,698 with three colours and two classes, as milesial/Pytorch-UNet has it, less two colours and a class.
    assert sum(weight.numel() for weight in network.parameters()) == 31_037_698 - 2 * 9 * 64 - 65
    assert [block[0].out_channels for block in network.encoders] == [64, 128, 256, 512]


def test_gates_can_close_a_skip():
    network = small({"attention": True})
    for gate in network.gates:
        torch.nn.init.constant_(gate.weight.bias, -50.0)
    closed = network.gates[0](torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8))
    assert closed.abs().max() < 1e-6


@pytest.mark.parametrize(("dice", "bce"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_loss_is_each_images_own(dice, bce):
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 1, 8, 8), (torch.rand(3, 1, 8, 8) > 0.6).float()
    truth[2] = 0
    found = segmentation_loss(logits, truth, dice, bce)
    for one, logit, true in zip(found, logits.double().numpy(), truth.numpy(), strict=True):
        p = 1 / (1 + np.exp(-logit))
        soft = 1 - (2 * (p * true).sum() + 1) / (p.sum() + true.sum() + 1)
        entropy = -(true * np.log(p) + (1 - true) * np.log(1 - p)).mean()
        assert float(one) == pytest.approx(dice * soft + bce * entropy, rel=1e-4)


def test_the_loss_of_an_empty_mask_falls_with_what_is_predicted():
    truth = torch.zeros(1, 1, 8, 8)
    losses = [float(segmentation_loss(torch.full_like(truth, logit), truth, 1, 0)) for logit in (2.0, 0.0, -3.0, -20.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-4)


def predictor(**options):
    return SegmentationPredictor(small({}), NetworkConfig(features=(4, 8, 12)), PreprocessConfig(size_px=32), **options)


@pytest.fixture
def images():
    return [phantom(0, 0, 0, 96).image, phantom(0, 0, 1, 64).image[:, :50]]


def test_masks_have_the_size_of_their_images(images):
    found = predictor(threshold=0.4).segment(images)
    assert [one.mask.shape for one in found] == [(96, 96), (64, 50)]
    for one in found:
        assert np.array_equal(one.mask, one.probability >= 0.4)
        assert 0 <= one.probability.min() and one.probability.max() <= 1


def test_a_batch_is_its_images_one_by_one(images):
    whole = predictor().segment(images * 10)
    for number, one in enumerate(whole):
        assert np.allclose(one.probability, predictor().segment([images[number % 2]])[0].probability, atol=1e-5)
    assert predictor().segment([]) == []


def test_with_test_time_augmentation_a_mirrored_image_gets_the_mirrored_answer(images):
    image = images[0]
    plain, flipped = predictor(), predictor(flip=True)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    assert not np.allclose(plain.segment([image])[0].probability[:, ::-1], plain.segment([mirrored])[0].probability)
    both = flipped.segment([image, mirrored])
    assert np.allclose(both[0].probability[:, ::-1], both[1].probability, atol=1e-5)


def test_a_saved_model_is_the_same_model(images, tmp_path):
    before = predictor(threshold=0.35, peak=0.6, flip=True)
    before.save(tmp_path / "model")
    after = load(tmp_path / "model")
    assert isinstance(after, SegmentationPredictor)
    assert (after.task, after.threshold, after.peak, after.flip) == ("segmentation", 0.35, 0.6, True)
    for one, other in zip(before.segment(images), after.segment(images), strict=True):
        assert np.array_equal(one.probability, other.probability)


@pytest.mark.parametrize("spoil", ["weights", "network", "missing", "truncated"])
def test_a_damaged_folder_is_one_sentence(tmp_path, spoil):
    predictor().save(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    if spoil == "weights":
        (tmp_path / "weights.pt").unlink()
    elif spoil == "truncated":
        (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:200])
    else:
        changed = {"features": [4, 8]} if spoil == "network" else None
        description["network"] = changed
        (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(PredictorError, match="holds no segmentation model") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4, 5), np.float32), np.zeros((0, 4), np.float32), np.full((4, 4), 200.0, np.float32)]
)
def test_what_is_no_grey_image_is_refused(image):
    with pytest.raises(DataError, match="An image must"):
        predictor().segment([image])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preprocess": {"size_px": 100}}, "must be a multiple of 16"),
        ({"network": {"norm": "group", "features": [6]}}, "multiples of 4"),
        ({"network": {"features": []}}, "one or more positive numbers"),
        ({"loss": {"dice": 0, "bce": 0}}, "must not both be 0"),
        ({"predict": {"threshold": 1.5}}, "between 0 and 1"),
        ({"predict": {"peak": 1.0}}, "from 0 to below 1"),
        ({"data": {"phantoms": 0}}, "phantoms must be at least 1"),
        ({"preprocess": {"steps": [{"name": "median"}]}}, "lee"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        SegmentationConfig.model_validate(settings)
