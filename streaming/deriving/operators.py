"""The operator of each kind of derivation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streaming.derived import Operator
from streaming.deriving.as_of_join import AsOfJoin
from streaming.deriving.buffered_join import BufferedJoin
from streaming.deriving.derivation import Derivation
from streaming.deriving.feature_lookup import FeatureLookup
from streaming.deriving.interval_join import IntervalJoin
from streaming.deriving.rekeying import Rekeying
from streaming.deriving.table_lookup import TableLookup

if TYPE_CHECKING:
    from feast import FeatureStore


def open_operator(derivation: Derivation, store: "FeatureStore") -> Callable[[int, Sequence[bytes]], Operator]:
    """What makes the operator of a partition, given its number, and its snapshot and deltas (none yet: empty).

    Raises:
        PlanError: the derivation does not fit its kind.
    """
    match derivation.kind:
        case "rekeyed":
            return lambda partition, states: Rekeying(derivation)
        case "interval_join" | "as_of_join" as kind:
            join: type[BufferedJoin] = IntervalJoin if kind == "interval_join" else AsOfJoin
            return lambda partition, states: join.restore(derivation, *states) if states else join(derivation)
        case "table_lookup":
            return lambda partition, states: TableLookup(derivation, str(store.repo_path))
        case "feature_lookup":
            return lambda partition, states: FeatureLookup(derivation, store)
