"""Which alias a segmentation model gets: compared on one split, never on images that the champion may have seen."""

from dataclasses import replace

import torch

from models.registry import CHALLENGER, CHAMPION, Registry
from models.runs import start
from models.segmentation.config import SegmentationConfig
from models.segmentation.data import splits
from models.segmentation.predict import find
from models.segmentation.train import SegmentationTask, _register

CONFIG = SegmentationConfig.model_validate(
    {
        "registered_name": "segmentation-alias",
        "data": {"phantoms": 4, "validation_phantoms": 2, "test_phantoms": 3, "phantom_size_px": 32},
        "preprocess": {"size_px": 32},
        "network": {"features": [4]},
    }
)


def test_the_better_one_is_champion(mlflow_uri, tmp_path):
    torch.manual_seed(0)
    registry, run = Registry(mlflow_uri), start(mlflow_uri, "segmentation-alias", "test")
    found = splits(CONFIG.data, None)
    task = SegmentationTask(CONFIG, found.train, found.validation)
    predictor = task.predictor(task.build())

    def register(dice, split=found):
        version, alias = _register(registry, CONFIG, predictor, run, split, {"dice": dice})
        reason = registry.resolve(CONFIG.registered_name, alias).tags[f"{alias}.reason"]
        return version.version, alias, reason

    assert register(0.5) == (1, CHAMPION, "the first version")
    assert register(0.5)[1] == CHALLENGER
    assert register(0.6)[:2] == (3, CHAMPION)
    other = replace(found, hash="other")
    version, alias, reason = register(1.0, other)
    assert (version, alias) == (4, CHAMPION) and "of version 3 on split other" in reason
    assert find("champion", CONFIG.registered_name, mlflow_uri, tmp_path).size == CONFIG.network


def test_a_champion_of_another_split_of_real_images_stays(mlflow_uri):
    config = CONFIG.model_copy(update={"registered_name": "segmentation-photos"})
    registry, run = Registry(mlflow_uri), start(mlflow_uri, "segmentation-photos", "test")
    found = replace(splits(config.data, None), source="images")
    task = SegmentationTask(config, found.train, found.validation)
    predictor = task.predictor(task.build())
    assert _register(registry, config, predictor, run, found, {"dice": 0.4})[1] == CHAMPION
    assert _register(registry, config, predictor, run, found, {"dice": 0.5})[1] == CHAMPION
    assert _register(registry, config, predictor, run, replace(found, hash="x"), {"dice": 0.9})[1] == CHALLENGER
    reason = registry.resolve(config.registered_name, CHALLENGER).tags["challenger.reason"]
    assert "perhaps trained on samples of test split x" in reason
