"""Feature look-ups: defaults, freshness and deadlines, over a fake store that answers in Feast's own protobuf.

The store is a fake because time, slowness and failure have to be exact; the real one is in the integration tests.
"""

import threading
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from feast.types import Int64, String

from serving.errors import ServingError
from serving.features import FeatureError, FeatureReader, open_store
from serving.tasks import Rows, Tabular

DAY_S = 86_400


class Store:
    """Rows of one view, `activity`: entity -> (event time in seconds, {feature: value})."""

    project = "test"

    def __init__(self, rows, keys=(("user", String),)):
        self.rows = rows
        self.reads = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.config = None
        fields = [SimpleNamespace(name=name) for name in ("count", "mean")]
        projection = SimpleNamespace(name="activity", features=fields, name_to_use=lambda: "activity")
        self.service = SimpleNamespace(name="robots", feature_view_projections=[projection])
        columns = [SimpleNamespace(name=name, dtype=dtype) for name, dtype in keys]
        view = SimpleNamespace(ttl=timedelta(days=1), entity_columns=columns)
        self.registry = SimpleNamespace(get_any_feature_view=lambda name, project: view)

    def _get_provider(self):
        return SimpleNamespace(online_store=SimpleNamespace())

    def list_feature_services(self):
        return [self.service]

    def get_feature_service(self, name):
        return self.service

    def get_online_features(self, features, entity_rows, full_feature_names):
        ((key, entities),) = entity_rows.items()
        self.reads.append(list(entities))
        assert self.go_on.wait(30)
        prefix = "activity__" if full_feature_names else ""
        response = GetOnlineFeaturesResponse()
        for name in ("count", "mean"):
            response.metadata.feature_names.val.append(prefix + name)
            vector = response.results.add()
            for entity in entities:
                time_s, values = self.rows.get(entity, (0, {}))
                value = vector.values.add()
                if values.get(name) is not None:
                    value.double_val = values[name]
                vector.event_timestamps.add(seconds=time_s)
        return SimpleNamespace(proto=response)


def reader(store, misses=None, **options):
    counts = misses if misses is not None else Counter()

    def count(view, reason, rows):
        counts[(view, reason)] += rows

    options = {"clock": "stream", "deadline_s": 30.0, "features": ("count", "mean")} | options
    features = options.pop("features")
    opened = FeatureReader(store, "robots", features, count=count, **options)
    store.reads.clear()  # the first look-up of all is the reader's own, to open connections
    return opened


def test_one_read_a_batch_with_each_entity_once_in_the_order_of_the_rows():
    store = Store({"a": (100, {"count": 1, "mean": 5.5}), "b": (100, {"count": 2, "mean": None})})
    found = reader(store).read(["b", "a", "b"])
    assert store.reads == [["b", "a"]]
    np.testing.assert_array_equal(found.values["count"], [2, 1, 2])
    np.testing.assert_array_equal(found.values["mean"], [np.nan, 5.5, np.nan])
    np.testing.assert_array_equal(found.event_times_s["count"], [100, 100, 100])


def test_an_unknown_entity_gets_nulls_and_is_counted():
    misses = Counter()
    found = reader(Store({"a": (100, {"count": 1})}), misses).read(["a", "nobody"])
    np.testing.assert_array_equal(found.values["count"], [1, np.nan])
    assert np.isnan(found.event_times_s["count"][1])
    assert misses == {("activity", "missing"): 1}


def test_by_the_stream_s_clock_old_history_is_fresh_and_what_lags_behind_it_is_stale():
    misses = Counter()
    features = reader(
        Store({"a": (100, {"count": 1}), "b": (100 + DAY_S, {"count": 2}), "c": (99, {"count": 3})}), misses
    )
    np.testing.assert_array_equal(features.read(["a"]).values["count"], [1])
    np.testing.assert_array_equal(features.read(["a", "b", "c"]).values["count"], [1, 2, np.nan])
    assert misses == {("activity", "stale"): 1}


def test_by_the_wall_clock_old_history_is_stale():
    misses = Counter()
    features = reader(Store({"a": (100, {"count": 1})}), misses, clock="wall", now=lambda: 101.0 + DAY_S)
    assert np.isnan(features.read(["a"]).values["count"][0])
    assert misses == {("activity", "stale"): 1}


def test_a_slow_store_gives_the_defaults_in_time_and_is_not_asked_again_meanwhile():
    misses = Counter()
    store = Store({"a": (100, {"count": 1, "mean": 2})})
    features = reader(store, misses, deadline_s=0.01)
    store.go_on.clear()
    assert np.isnan(features.read(["a"]).values["count"][0])
    assert np.isnan(features.read(["a", "a"]).values["mean"]).all()
    assert misses == {("activity", "timeout"): 3}
    assert store.reads == [["a"]]
    store.go_on.set()


def test_a_store_that_fails_gives_the_defaults():
    misses = Counter()
    store = Store({})
    features = reader(store, misses)
    store.rows = None
    assert np.isnan(features.read(["a"]).values["count"][0])
    assert misses == {("activity", "error"): 1}


def test_names_may_carry_the_view():
    found = reader(Store({"a": (100, {"count": 1})}), features=("activity__count",)).read(["a"])
    assert list(found.values) == ["activity__count"]


def test_integer_keys_are_converted_and_others_refused():
    store = Store({7: (100, {"count": 1})}, keys=(("id", Int64),))
    features = reader(store)
    assert features.read(["7"]).values["count"].tolist() == [1]
    with pytest.raises(ServingError, match="must be an integer"):
        features.key("seven")


@pytest.mark.parametrize(
    ("store", "service", "names", "message"),
    [
        (Store({}), "robot", ("count",), "'robot' is not in Feast's registry .robots."),
        (Store({}), "robots", ("median",), "'median'"),
        (Store({}, keys=(("a", String), ("b", String))), "robots", ("count",), "keyed by a, b"),
    ],
)
def test_what_cannot_be_read_is_said_when_the_model_is_loaded(store, service, names, message):
    with pytest.raises(FeatureError, match=message):
        FeatureReader(store, service, names, clock="stream", deadline_s=1, count=lambda *_: None)


def test_a_folder_without_a_repository_is_named(tmp_path):
    with pytest.raises(FeatureError, match=r"feature_store\.yaml"):
        open_store(tmp_path)


class Sum:
    """Probability is the sum of what is known of `count` and `mean`."""

    task = "tabular"
    feature_service = "robots"
    features = ("count", "mean")
    threshold = 0.5

    def predict(self, rows):
        return np.nansum([rows["count"], rows["mean"]], axis=0)


def test_stated_features_go_before_the_store_s_and_requests_share_one_read():
    store = Store({"a": (100, {"count": 0.25, "mean": 0.5}), "b": (200, {"count": 0.125, "mean": 0})})
    task = Tabular(Sum(), reader(store))
    full = {"count": np.array([9.0]), "mean": np.array([1.0])}
    scores = task.execute(
        [
            Rows(("a", "b"), {}, 2),
            Rows(None, full, 1),
            Rows(("b",), {"mean": np.array([0.5])}, 1),
        ]
    )
    assert store.reads == [["a", "b"]]
    assert [each.probability.tolist() for each in scores] == [[0.75, 0.125], [10.0], [0.625]]
    assert [each.decision.tolist() for each in scores] == [[True, False], [True], [True]]
    assert scores[0].event_times_s["count"].tolist() == [100, 200]
    assert np.isnan(scores[1].event_times_s["count"]).all()
    assert scores[2].event_times_s["count"].tolist() == [200]
    assert np.isnan(scores[2].event_times_s["mean"]).all()


def test_requests_that_state_everything_need_no_store():
    store = Store({})
    full = {"count": np.array([0.5]), "mean": np.array([0.0])}
    scores = Tabular(Sum(), reader(store)).execute([Rows(("a",), full, 1)])
    assert scores[0].probability.tolist() == [0.5]
    assert store.reads == []
