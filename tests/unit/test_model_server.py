"""The model server in plain Python: loading, swapping, errors and figures.

Models are small fakes, because what is tested is who answers, not what.
"""

import asyncio
import gc
import json
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from models.registry import ModelVersion, RegistryError
from serving.errors import ServingError
from serving.metrics import ModelMetrics
from serving.server import ModelServer
from serving.settings import BatchSettings
from serving.tasks import Rows, Tabular
from serving.watcher import Watcher

LIMITS = {"tabular": BatchSettings(max_batch_size=8, max_queue=4)}
ROWS = Rows(None, {"x": np.array([0.25])}, 1)


class Threshold:
    """Probability is the feature `x` plus the version's own number."""

    task = "tabular"
    feature_service = ""
    features = ("x",)
    threshold = 0.5

    def __init__(self, offset):
        self.offset = offset
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def predict(self, rows):
        self.started.set()
        assert self.go_on.wait(30)
        if np.isinf(rows["x"]).any():
            raise ValueError("infinite")
        return rows["x"] + self.offset


class Shelf:
    """A registry in memory: versions by (name, alias), folders with the version's number in them."""

    def __init__(self, folder):
        self.folder = folder
        self.versions = {}

    def aliases(self):
        return dict(self.versions)

    def resolve(self, name, alias):
        if (name, alias) not in self.versions:
            raise RegistryError(f"{name}@{alias} is not registered.")
        return ModelVersion(name, self.versions[(name, alias)], "run", {}, "source")

    def download(self, version, cache):
        path = cache / f"{version.name}-{version.version}.json"
        path.write_text(json.dumps(version.version))
        return path


class World:
    def __init__(self, folder: Path, aliases=("champion",)):
        self.now = 0.0
        self.shelf = Shelf(folder)
        self.opened = []
        self.metrics = ModelMetrics()
        self.server = ModelServer(
            self.shelf,
            folder,
            open_task=self.open_task,
            limits=LIMITS,
            aliases=aliases,
            metrics=self.metrics,
            clock=lambda: self.now,
        )

    def open_task(self, path):
        number = json.loads(path.read_text())
        if number == 13:
            raise ValueError("the folder is damaged")
        self.opened.append(Threshold(number / 100))
        return Tabular(self.opened[-1], None)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_loaded_model_predicts(world):
    world.shelf.versions[("edits", "champion")] = 3
    status = world.server.load_model("edits")
    assert (status.id, status.version, status.variant, status.state) == ("edits", 3, "champion", "ready")
    prediction = world.server.predict("edits", ROWS)
    assert prediction.output.probability.tolist() == [0.28]
    assert prediction.output.decision.tolist() == [False]
    assert (prediction.model, prediction.version, prediction.variant) == ("edits", 3, "champion")


def test_other_aliases_have_ids_of_their_own_and_a_version_is_in_memory_once(tmp_path):
    world = World(tmp_path, aliases=("champion", "baseline"))
    world.server.follow({("edits", "champion"): 1, ("edits", "baseline"): 1, ("edits", "shadow"): 1})
    assert [model.state for model in world.server.models()] == ["failed", "failed"]  # the shelf does not know them
    world.shelf.versions = {("edits", "champion"): 1, ("edits", "baseline"): 1}
    world.now = 60
    world.server.follow(world.shelf.aliases())
    assert [model.id for model in world.server.models()] == ["edits", "edits@baseline"]
    assert len(world.opened) == 1
    assert world.server.predict("edits@baseline", ROWS).variant == "baseline"


def test_following_loads_swaps_and_unloads(world):
    for version in (1, 2):
        world.shelf.versions[("edits", "champion")] = version
        world.server.follow(world.shelf.aliases())
        assert world.server.predict("edits", ROWS).version == version
    world.server.follow(world.shelf.aliases())
    assert len(world.opened) == 2
    world.server.follow({})
    with pytest.raises(ServingError, match="not registered yet: run ray_jobs/train_edits.py") as refused:
        world.server.predict("edits", ROWS)
    assert refused.value.status == 404


def test_a_swap_loses_no_request_and_the_old_version_is_freed_after_its_last(world):
    world.shelf.versions[("edits", "champion")] = 1
    world.server.follow(world.shelf.aliases())
    old = world.opened.pop()
    old.go_on.clear()

    async def swap(old):
        waiting = [asyncio.create_task(world.server.predict_async("edits", ROWS)) for _ in range(3)]
        assert await asyncio.to_thread(old.started.wait, 30)
        world.shelf.versions[("edits", "champion")] = 2
        world.server.follow(world.shelf.aliases())
        new = await world.server.predict_async("edits", ROWS)
        old.go_on.set()
        return new, await asyncio.gather(*waiting)

    new, answers = asyncio.run(swap(old))
    assert new.version == 2
    assert [answer.version for answer in answers] == [1, 1, 1]
    freed = weakref.ref(old)
    del old
    gc.collect()
    assert freed() is None


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_tried_again_later(world):
    world.shelf.versions[("edits", "champion")] = 1
    world.server.follow(world.shelf.aliases())
    world.shelf.versions[("edits", "champion")] = 13
    world.server.follow(world.shelf.aliases())
    health = world.server.health_check()
    assert health.status == "degraded"
    assert health.models[0].error == "version 13: the folder is damaged"
    assert world.server.predict("edits", ROWS).version == 1
    world.shelf.versions[("edits", "champion")] = 2
    world.server.follow(world.shelf.aliases())
    assert world.server.health_check().status == "ready"


def test_a_first_version_that_cannot_be_loaded_gives_503_with_the_reason(world):
    world.shelf.versions[("edits", "champion")] = 13
    world.server.follow(world.shelf.aliases())
    with pytest.raises(ServingError, match="the folder is damaged") as refused:
        world.server.predict("edits", ROWS)
    assert refused.value.status == 503


def test_a_registered_model_that_is_still_loading_gives_503(world):
    """Seen from inside the load, as another request would see it."""
    seen = []

    def slow(path):
        with pytest.raises(ServingError, match="still loading") as refused:
            world.server.predict("edits", ROWS)
        seen.append((refused.value.status, world.server.health_check().status))
        return Tabular(Threshold(0), None)

    world.server._open_task = slow
    world.shelf.versions[("edits", "champion")] = 1
    world.server.follow(world.shelf.aliases())
    assert seen == [(503, "loading")]
    assert world.server.health_check().status == "ready"


@pytest.mark.parametrize(
    ("model", "version", "message"),
    [
        ("edit", None, "did you mean edits"),
        ("nothing", None, "served are: edits"),
        ("edits", 7, "version 7 .* version 1 is"),
    ],
)
def test_unknown_models_and_versions_are_404_with_a_hint(world, model, version, message):
    world.shelf.versions[("edits", "champion")] = 1
    world.server.load_model("edits")
    with pytest.raises(ServingError, match=message) as refused:
        world.server.predict(model, ROWS, version=version)
    assert refused.value.status == 404


def test_a_batch_keeps_the_order_and_one_bad_item_fails_alone(world):
    world.shelf.versions[("edits", "champion")] = 0
    world.server.load_model("edits")
    values = [0.1, np.inf, 0.3, 0.9]
    answers = world.server.predict_batch("edits", [Rows(None, {"x": np.array([value])}, 1) for value in values])
    assert isinstance(answers[1], ValueError)
    good = [float(answer.output.probability[0]) for answer in answers if not isinstance(answer, Exception)]
    assert good == [0.1, 0.3, 0.9]


def test_a_deadline_gives_504_and_the_server_goes_on(world):
    world.shelf.versions[("edits", "champion")] = 0
    world.server.load_model("edits")
    model = world.opened[0]
    model.go_on.clear()
    with pytest.raises(ServingError) as refused:
        world.server.predict("edits", ROWS, timeout_s=0.01)
    assert refused.value.status == 504
    with pytest.raises(ServingError) as refused:
        asyncio.run(world.server.predict_async("edits", ROWS, timeout_s=0.01))
    assert refused.value.status == 504
    model.go_on.set()
    assert world.server.predict("edits", ROWS).version == 0


def test_figures_count_requests_errors_and_batches(world):
    world.shelf.versions[("edits", "champion")] = 1
    world.server.load_model("edits")
    world.server.predict("edits", ROWS)
    with pytest.raises(ValueError, match="infinite"):
        world.server.predict("edits", Rows(None, {"x": np.array([np.inf])}, 1))
    figures = world.server.get_metrics()["edits"]
    assert (figures["requests"], figures["errors"], figures["queue_size"]) == (2, 1, 0)
    assert figures["mean_batch_size"] == 1
    text = world.metrics.render()
    assert 'millrace_model_version{model="edits",variant="champion"} 1.0' in text
    assert 'millrace_model_errors_total{code="model_error",model="edits"} 1.0' in text


def test_a_model_that_needs_an_entity_says_so(world):
    world.shelf.versions[("edits", "champion")] = 1
    world.server.load_model("edits")
    with pytest.raises(ServingError, match="x-entity-id") as refused:
        world.server.predict("edits", Rows(None, {}, 1))
    assert (refused.value.status, refused.value.param) == (400, "x-entity-id")


def test_the_watcher_keeps_what_it_has_while_the_registry_is_away():
    polls = [{("edits", "champion"): 1}, OSError("refused"), {("edits", "champion"): 2}]
    followed = []

    def aliases():
        found = polls.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    watcher = Watcher(aliases, followed.append)
    assert not watcher.seen
    watcher.poll()
    watcher.poll()
    assert watcher.seen
    assert watcher.error == "the model registry does not answer: refused"
    watcher.poll()
    assert watcher.error == ""
    assert [each[("edits", "champion")] for each in followed] == [1, 2]
