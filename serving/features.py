"""Feature look-ups for predictions: one batched read a batch, within a deadline, with defaults for what is not there.

The default of a feature is null (NaN), exactly what training saw where history had no row. It stands for an entity that
the view does not know (`missing`), a row that is older than the view's ttl (`stale`; Feast does not enforce it online),
and for every row when the store is too slow (`timeout`) or fails (`error`): the prediction is given all the same, and
the rows are counted by view and reason.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from serving.errors import bad_request
from streaming.sqlite_store import OnlineStoreError

logger = logging.getLogger(__name__)

WARM_UP_S = 30.0

Floats = npt.NDArray[np.float64]
Count = Callable[[str, str, int], None]


class FeatureError(ValueError):
    """A feature service that a model needs cannot be read."""


class Lookup(NamedTuple):
    """Features of N entities: by feature name, float64[N] values and their event times (seconds; NaN: no value)."""

    values: dict[str, Floats]
    event_times_s: dict[str, Floats]


@dataclass(frozen=True)
class _View:
    name: str
    ttl_s: float
    features: tuple[str, ...]


def open_store(repo: Path) -> Any:
    """The Feast store of a repository.

    Raises:
        FeatureError: there is no `feature_store.yaml`.
    """
    if not (repo / "feature_store.yaml").is_file():
        raise FeatureError(f"{repo} has no feature_store.yaml: set features.repo to a Feast repository")
    from feast import FeatureStore

    return FeatureStore(repo_path=str(repo))


class FeatureReader:
    """Reads one feature service of a Feast store, for entities given by one key.

    Args:
        store: a `feast.FeatureStore`.
        service: name of the feature service.
        features: names that the model wants, with or without `view__` in front.
        clock: what ages are measured against: `stream`, the newest event of the view, or `wall`.
        deadline_s: a read that takes longer is given up.
        count: called with view, reason and a number of rows for everything that became a default.
        now: the wall clock, in seconds.

    Raises:
        FeatureError: the service is not applied, lacks a feature, or needs more than one key.
    """

    def __init__(
        self,
        store: Any,
        service: str,
        features: Sequence[str],
        *,
        clock: Literal["stream", "wall"],
        deadline_s: float,
        count: Count,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.features = tuple(features)
        self._store = store
        self._clock = clock
        self._deadline_s = deadline_s
        self._count = count
        self._now = now
        self._service = self._find(service)
        self._full_names, self._views = self._declared(service)
        self._key, self._integer_key = self._entity(service)
        self._newest_s = {view.name: _newest_row_s(store, view.name) for view in self._views}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._pending: Future[Lookup] | None = None
        self._warm_up()

    def _find(self, service: str) -> Any:
        known = [each.name for each in self._store.list_feature_services()]
        if service not in known:
            raise FeatureError(
                f"the feature service {service!r} is not in Feast's registry "
                f"({', '.join(sorted(known)) or 'it is empty'}): run feast apply"
            )
        return self._store.get_feature_service(service)

    def _declared(self, service: str) -> tuple[bool, list[_View]]:
        declared = {
            view.name_to_use(): [field.name for field in view.features]
            for view in self._service.feature_view_projections
        }
        short = {name for names in declared.values() for name in names}
        full = {f"{view}__{name}" for view, names in declared.items() for name in names}
        full_names = not set(self.features) <= short
        lacking = set(self.features) - (full if full_names else short)
        if lacking:
            raise FeatureError(
                f"the feature service {service!r} has no feature {sorted(lacking)[0]!r} that the model reads"
            )
        views = []
        for projection in self._service.feature_view_projections:
            view = self._store.registry.get_any_feature_view(projection.name, self._store.project)
            ttl_s = view.ttl.total_seconds() if getattr(view, "ttl", None) else math.inf
            prefix = f"{projection.name_to_use()}__" if full_names else ""
            names = tuple(prefix + field.name for field in projection.features if prefix + field.name in self.features)
            views.append(_View(projection.name_to_use(), ttl_s or math.inf, names))
        return full_names, views

    def _entity(self, service: str) -> tuple[str, bool]:
        columns = {
            column.name: column.dtype
            for projection in self._service.feature_view_projections
            for column in self._store.registry.get_any_feature_view(projection.name, self._store.project).entity_columns
        }
        if len(columns) != 1:
            raise FeatureError(
                f"the feature service {service!r} is keyed by {', '.join(sorted(columns)) or 'nothing'}: "
                "a request names one entity, so it must have one key"
            )
        name, dtype = next(iter(columns.items()))
        return name, str(dtype).lower().startswith("int")

    def _warm_up(self) -> None:
        """Open Feast's connections now, for the first request to keep its deadline; a store that is away may return."""
        try:
            self._reader.submit(self._ask, [0 if self._integer_key else ""]).result(WARM_UP_S)
        except Exception as error:
            logger.warning("the feature store does not answer yet: %s", error or type(error).__name__)

    def _ask(self, keys: Sequence[str | int]) -> Any:
        return self._store.get_online_features(
            features=self._service, entity_rows={self._key: list(keys)}, full_feature_names=self._full_names
        ).proto

    def key(self, entity: str) -> str | int:
        """The entity as the store wants it.

        Raises:
            ServingError: status 400, the key is an integer and the entity is none.
        """
        if not self._integer_key:
            return entity
        try:
            return int(entity)
        except ValueError:
            raise bad_request(f"the entity {entity!r} must be an integer ({self._key})", "x-entity-id") from None

    def read(self, entities: Sequence[str]) -> Lookup:
        """Features of entities in their order; always an answer, see the module's docstring."""
        if self._pending is not None and not self._pending.done():
            return self._defaults(len(entities), "timeout")
        self._pending = self._reader.submit(self._read, list(entities))
        try:
            return self._pending.result(self._deadline_s)
        except TimeoutError:
            return self._defaults(len(entities), "timeout")
        except Exception:
            logger.exception("feature look-up failed, defaults are used")
            return self._defaults(len(entities), "error")

    def _defaults(self, size: int, reason: str) -> Lookup:
        for view in self._views:
            self._count(view.name, reason, size)
        return Lookup(
            {name: np.full(size, np.nan) for name in self.features},
            {name: np.full(size, np.nan) for name in self.features},
        )

    def _read(self, entities: list[str]) -> Lookup:
        positions = {entity: position for position, entity in enumerate(dict.fromkeys(entities))}
        response = self._ask([self.key(entity) for entity in positions])
        columns = dict(zip(response.metadata.feature_names.val, response.results, strict=True))
        rows = np.array([positions[entity] for entity in entities])
        values: dict[str, Floats] = {}
        event_times_s: dict[str, Floats] = {}
        for view in self._views:
            for name, times_s in self._times(view, columns).items():
                column = np.array([_number(value) for value in columns[name].values])
                values[name] = np.where(np.isnan(times_s), np.nan, column)[rows]
                event_times_s[name] = times_s[rows]
        return Lookup(values, event_times_s)

    def _times(self, view: _View, columns: Mapping[str, Any]) -> dict[str, Floats]:
        """Event times of a view's features, NaN where there is no row or it is too old, which is counted."""
        times = {
            name: np.array([_seconds(stamp) for stamp in columns[name].event_timestamps], dtype=np.float64)
            for name in view.features
        }
        if not times:
            return {}
        first = next(iter(times.values()))
        known = ~np.isnan(first)
        if known.any():
            self._newest_s[view.name] = max(self._newest_s[view.name], float(first[known].max()))
        now_s = self._now() if self._clock == "wall" else self._newest_s[view.name]
        stale = known & (now_s - first > view.ttl_s)
        for reason, rows in (("missing", ~known), ("stale", stale)):
            if rows.any():
                self._count(view.name, reason, int(rows.sum()))
        return {name: np.where(stale, np.nan, stamps) for name, stamps in times.items()}


def _seconds(stamp: Any) -> float:
    seconds = stamp.seconds + stamp.nanos * 1e-9
    return seconds if seconds else math.nan


def _number(value: Any) -> float:
    kind = value.WhichOneof("val")
    return math.nan if kind is None or kind == "null_val" else float(getattr(value, kind))


def _newest_row_s(store: Any, view: str) -> float:
    """The newest event of a view in an online store of ours, so that a stale entity is seen from the first read.

    Other stores offer no such question: there the clock starts with the first rows that are read.
    """
    online = store._get_provider().online_store
    if not hasattr(online, "newest_event_us"):
        return -math.inf
    try:
        newest_us = online.newest_event_us(store.config, store.registry.get_any_feature_view(view, store.project))
    except OnlineStoreError:
        return -math.inf
    return -math.inf if newest_us is None else float(newest_us / 1e6)
