"""Online learning: river's models as a stage between reading events and aggregating them.

A model follows the events of a partition in the order of their offsets and adds a column to them, so that what it finds
is aggregated by entity and window like any field. It sees every event that is not dead and that the transformation has
kept, late ones too, so its state is a function of the log alone, whoever computes which entities.

HalfSpaceTrees: Tan, Ting and Liu, "Fast anomaly detection for streaming data" (2011). ADWIN: Bifet and Gavalda,
"Learning from time-changing data with adaptive windowing" (2007).
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from river.__version__ import __version__
from river.anomaly import HalfSpaceTrees
from river.drift import ADWIN
from river.preprocessing import MinMaxScaler

from streaming.decode import Columns
from streaming.plan import Model, Plan
from streaming.records import Drift, Floats, Ints

_NODE_BYTES = 230
_DETECTOR_BYTES = 8_192


class _Learner(Protocol):
    """One of river's models with its state as arrays."""

    detections: int
    nbytes: int

    def learn(self, values: Floats) -> tuple[Floats, dict[int, str]]:
        """Of [N, C] inputs in order what the model says of each (NaN: nothing), and by row what it has detected."""

    def state(self) -> list[npt.NDArray[Any]]: ...  # noqa: D102
    def restore(self, arrays: Iterator[npt.NDArray[Any]]) -> None: ...  # noqa: D102


class Models:
    """The models of one partition.

    Attributes:
        followed: How many events they have seen, learned or not.
        version: Of river, whose state only the same version can read.
    """

    version: str = __version__

    def __init__(self, plan: Plan) -> None:
        at = {column.name: at for at, column in enumerate(plan.fields) if column.role == "number"}
        self.followed = 0
        self._first = len(plan.fields)
        self._models = [
            (model, [at[name] for name in model.inputs], _LEARNERS[model.function](model)) for model in plan.models
        ]

    @property
    def nbytes(self) -> int:
        """Memory that they take, about."""
        return sum(learner.nbytes for _, _, learner in self._models)

    @property
    def detections(self) -> int:
        """How often drift was detected."""
        return sum(learner.detections for _, _, learner in self._models)

    def follow(self, columns: Columns, rows: Ints, offsets: Ints, partition: int) -> list[Drift]:
        """Lets the models see some events, in order, and writes their columns.

        Args:
            columns: Of N records; changed.
            rows: Which of them to follow, rising.
            offsets: [N].
            partition: In Kafka.
        """
        drifts: list[Drift] = []
        for added, (model, inputs, learner) in enumerate(self._models, self._first):
            chosen = rows[-self.followed % model.every :: model.every]
            values = columns.values[chosen[:, None], inputs]
            whole = columns.present[chosen[:, None], inputs].all(axis=1)
            learned = chosen[whole]
            found, detected = learner.learn(values[whole])
            columns.present[learned, added] = ~np.isnan(found)
            columns.values[learned, added] = np.nan_to_num(found)
            for at, reason in detected.items():
                row = int(learned[at])
                drifts.append(Drift(model.column, partition, int(offsets[row]), int(columns.times[row]), reason))
        self.followed += len(rows)
        return drifts

    def state(self) -> list[npt.NDArray[Any]]:
        """Everything, as arrays."""
        return [np.array([self.followed]), *(array for _, _, learner in self._models for array in learner.state())]

    def restore(self, arrays: Iterator[npt.NDArray[Any]]) -> None:
        """Takes what `state` gave from the front of `arrays`."""
        self.followed = int(next(arrays)[0])
        for _, _, learner in self._models:
            learner.restore(arrays)


class _Anomaly:
    """HalfSpaceTrees over inputs scaled to [0, 1] by the range so far: scores an event, then learns it.

    It says nothing before its first window of events is full, when there is nothing to compare with.
    """

    detections = 0

    def __init__(self, model: Model) -> None:
        self._inputs = model.inputs
        parameters: dict[str, Any] = dict(model.parameters)
        trees: Any = HalfSpaceTrees(**parameters)
        self._scaler: Any = MinMaxScaler()
        trees.learn_one(dict.fromkeys(self._inputs, 0.0))  # at the first event river grows the trees, of the seed alone
        self._trees = trees
        self._nodes = [node for nodes in trees._tree_nodes for node in nodes]
        self._set(0, True, np.zeros((2, len(self._nodes)), dtype=np.int32))
        self.nbytes = _NODE_BYTES * len(self._nodes)

    def learn(self, values: Floats) -> tuple[Floats, dict[int, str]]:
        """The scores, from 0 for the usual to 1."""
        scores = np.full(len(values), np.nan)
        for at, row in enumerate(values.tolist()):
            event = dict(zip(self._inputs, row, strict=True))
            if not self._trees._first_window:
                scores[at] = self._trees.score_one(self._scaler.transform_one(event))
            self._scaler.learn_one(event)
            self._trees.learn_one(self._scaler.transform_one(event))
        return scores, {}

    def state(self) -> list[npt.NDArray[Any]]:
        """Events in the window and whether it is the first, the range of each input, two masses of each node."""
        bounds = [[extremes[name].get() for name in self._inputs] for extremes in (self._scaler.min, self._scaler.max)]
        masses = [[node.l_mass for node in self._nodes], [node.r_mass for node in self._nodes]]
        window = np.array([self._trees.counter, self._trees._first_window])
        return [window, np.array(bounds), np.array(masses, dtype=np.int32)]

    def restore(self, arrays: Iterator[npt.NDArray[Any]]) -> None:
        """Takes what `state` gave."""
        (counter, first), bounds, masses = next(arrays).tolist(), next(arrays), next(arrays)
        self._set(counter, bool(first), masses)
        self._scaler = MinMaxScaler()
        if np.isfinite(bounds).all():
            for extremes in bounds.tolist():
                self._scaler.learn_one(dict(zip(self._inputs, extremes, strict=True)))

    def _set(self, counter: int, first: bool, masses: npt.NDArray[np.int32]) -> None:
        self._trees.counter, self._trees._first_window = counter, first
        for node, learning, reference in zip(self._nodes, *masses.tolist(), strict=True):
            node.l_mass, node.r_mass = learning, reference


class _Drift:
    """ADWIN over one input: 1.0 for the event at which it detects that the mean has changed, else 0.0."""

    nbytes = _DETECTOR_BYTES

    def __init__(self, model: Model) -> None:
        self._name = model.inputs[0]
        adwin: Any = ADWIN
        self._adwin = adwin(**dict(model.parameters))
        self.detections = 0

    def learn(self, values: Floats) -> tuple[Floats, dict[int, str]]:
        """Where it detects drift, and what it sees since."""
        found = np.zeros(len(values))
        detected = {}
        adwin = self._adwin
        for at, value in enumerate(values[:, 0].tolist()):
            adwin.update(value)
            if adwin.drift_detected:
                found[at] = 1.0
                detected[at] = (
                    f"the mean of {self._name} has changed to {adwin.estimation:.6g} ({int(adwin.width)} events)"
                )
        self.detections += len(detected)
        return found, detected

    def state(self) -> list[npt.NDArray[Any]]:
        """Whether the last event was a detection, how many there were, and the window in river's own bytes."""
        window = np.frombuffer(self._adwin._helper.__getstate__(), dtype=np.uint8)
        return [np.array([self._adwin.drift_detected, self.detections]), window]

    def restore(self, arrays: Iterator[npt.NDArray[Any]]) -> None:
        """Takes what `state` gave."""
        self._adwin._drift_detected, self.detections = next(arrays).tolist()
        self._adwin._helper.__setstate__(next(arrays).tobytes())


_LEARNERS: dict[str, Any] = {"half_space_trees": _Anomaly, "adwin": _Drift}
