"""Events with features of Feast's online store as they are when the events are processed.

Each key of a batch is asked for once. A feature that the store does not have is null, and so is one that is older than
the ttl of its view, which Feast's own reading would still give. A store that does not answer is away, so that the
events wait.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from streaming.deriving.derivation import Derivation
from streaming.deriving.join_input import Events, key_type
from streaming.deriving.lookup import Lookup
from streaming.deriving.raw_json import read_only
from streaming.keys import KeyIndex
from streaming.plan import PlanError
from streaming.records import Bytes, Ints

if TYPE_CHECKING:
    from feast import FeatureStore

KEYS_A_QUESTION = 1_000


class FeatureLookup(Lookup):
    """Looks events up in a feature store.

    Args:
        derivation: The features and the events.
        store: Whose online store is read.

    Raises:
        PlanError: A feature is unknown, or not one of the events' key.
    """

    def __init__(self, derivation: Derivation, store: "FeatureStore") -> None:
        super().__init__(derivation)
        self._store, self._on = store, derivation.on
        self._key_type = key_type(derivation.inputs[0], derivation.on)
        self._fields = [name for name, _ in derivation.features]
        self._references = [reference for _, reference in derivation.features]
        self._ttls_s = [_ttl_s(store, derivation, reference) for reference in self._references]
        self._nulls = _bytes(_tail(self._fields, [None] * len(self._fields)))

    def _find(self, events: Events, now_us: int) -> tuple[Bytes, Ints, Bytes]:
        index = KeyIndex()
        ids = index.ids(events.text, events.entities, events.readable)
        keys = index.entities(np.arange(len(index)), self._key_type).to_pylist()
        tails: list[bytes] = []
        for start in range(0, len(keys), KEYS_A_QUESTION):
            tails += self._ask(keys[start : start + KEYS_A_QUESTION], now_us)
        ends = np.cumsum([0, *map(len, tails)], dtype=np.int64)
        spans = np.full((len(ids), 2), -1, dtype=np.int64)
        known = ids[events.readable]
        spans[events.readable] = np.stack([ends[known], ends[known + 1]], axis=1)
        return _bytes(b"".join(tails)), spans, self._nulls

    def _ask(self, keys: list[Any], now_us: int) -> list[bytes]:
        from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
        from feast.type_map import feast_value_type_to_python_type

        try:
            answer = self._store.get_online_features(
                features=self._references, entity_rows={self._on: keys}, full_feature_names=True
            ).proto
        except Exception as error:  # of whichever store it is
            raise OSError(f"The feature store does not answer: {error!r}") from error
        results = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
        columns = []
        for reference, ttl_s in zip(self._references, self._ttls_s, strict=True):
            result = results[reference.replace(":", "__")]
            oldest_s = now_us / 1e6 - ttl_s if ttl_s else -np.inf
            columns.append(
                [
                    feast_value_type_to_python_type(value)
                    if status == FieldStatus.PRESENT and stamp.seconds + stamp.nanos / 1e9 >= oldest_s
                    else None
                    for value, status, stamp in zip(
                        result.values, result.statuses, result.event_timestamps, strict=True
                    )
                ]
            )
        return [_tail(self._fields, values) for values in zip(*columns, strict=True)]


def _ttl_s(store: "FeatureStore", derivation: Derivation, reference: str) -> float:
    """The ttl of the view of a feature, 0 for none."""
    from feast.errors import FeastObjectNotFoundException

    where = f"Derived topic '{derivation.name}'"
    name, _, feature = reference.partition(":")
    try:
        view: Any = store.registry.get_any_feature_view(name, store.project)
    except FeastObjectNotFoundException:
        raise PlanError(f"{where}: there is no feature view '{name}' in the registry: run `feast apply`.") from None
    if feature not in {field.name for field in view.features}:
        raise PlanError(f"{where}: feature view '{name}' has no feature '{feature}'.")
    keys = [column.name for column in view.entity_columns]
    if keys != [derivation.on]:
        raise PlanError(f"{where}: feature view '{name}' is keyed by {', '.join(keys)}, not by '{derivation.on}'.")
    return view.ttl.total_seconds() if getattr(view, "ttl", None) else 0.0


def _bytes(text: bytes) -> Bytes:
    return read_only(np.frombuffer(text, dtype=np.uint8))


def _tail(fields: list[str], values: Any) -> bytes:
    return b"," + orjson.dumps(dict(zip(fields, values, strict=True)), option=orjson.OPT_UTC_Z)[1:]
