"""Opens the worker of a view, the deriver of a derived topic and what they read and write; without Ray."""

from pathlib import Path
from typing import NamedTuple

from feast import FeatureStore
from feast.data_source import PushMode

from streaming.allowance import Allowance
from streaming.changelog import ChangelogSink, Published
from streaming.checkpoint import CheckpointStore
from streaming.consumer import Consumer
from streaming.control import DriftLog
from streaming.deriving.commits import DELTAS
from streaming.deriving.derivation import Derivation
from streaming.deriving.deriver import Deriver
from streaming.deriving.operators import open_operator
from streaming.deriving.transactions import Transactions, group
from streaming.holding import NoOffline, NoOnline, Online
from streaming.offline import OfflineLog
from streaming.plan import Plan
from streaming.rejects import RejectLog
from streaming.sinks import OnlineSink
from streaming.views import log_place
from streaming.worker import Worker


class Settings(NamedTuple):
    """What all actors of a stream have in common.

    Attributes:
        home: Folder for what has no other place.
        checkpoints: Path or URI of the folder where checkpoints are kept; all workers reach it.
        flush_s: Pause between writes to the online store.
        until_caught_up: End when nothing is left to read.
        by_group: Partitions come from a Kafka consumer group.
        max_state_bytes: Memory that the states of an actor may take together.
    """

    home: str
    checkpoints: str
    flush_s: float
    until_caught_up: bool = False
    by_group: bool = False
    max_state_bytes: int | None = None


def open_worker(
    store: FeatureStore,
    plan: Plan,
    keyed: bool,
    settings: Settings,
    allowance: Allowance | None = None,
    to: PushMode = PushMode.ONLINE_AND_OFFLINE,
) -> Worker:
    """A worker with its consumer and the sinks of `to`, not started."""
    return Worker(
        plan,
        source=Consumer(plan.bootstrap_servers, plan.topic, group=f"millrace-{plan.view}"),
        online=NoOnline() if to == PushMode.OFFLINE else _online(store, plan),
        offline=NoOffline() if to == PushMode.ONLINE else open_offline_log(store, plan, Path(settings.home)),
        rejects=RejectLog(plan.bootstrap_servers, plan.topic, plan.view),
        checkpoints=CheckpointStore(settings.checkpoints),
        drifts=DriftLog(plan.bootstrap_servers, plan.view) if plan.models else None,
        ticking=not settings.until_caught_up,
        keyed=keyed,
        shared=settings.by_group,
        flush_s=settings.flush_s,
        allowance=allowance,
    )


def open_deriver(
    store: FeatureStore, derivation: Derivation, keyed: bool, settings: Settings, allowance: Allowance | None = None
) -> Deriver:
    """A deriver with its consumers and reject logs, not started."""
    inputs = derivation.inputs
    return Deriver(
        derivation,
        sources=[Consumer(each.bootstrap_servers, each.topic, group(derivation)) for each in inputs],
        rejects=[RejectLog(each.bootstrap_servers, each.topic, derivation.name) for each in inputs],
        checkpoints=CheckpointStore(settings.checkpoints, DELTAS),
        operator=open_operator(derivation, store),
        output=lambda partition: Transactions(derivation, partition),
        ticking=not settings.until_caught_up,
        keyed=keyed,
        shared=settings.by_group,
        allowance=allowance,
    )


def open_offline_log(store: FeatureStore, plan: Plan, home: Path) -> OfflineLog:
    """The log of a view, where its declaration says."""
    place = log_place(store, plan.view, home)
    return OfflineLog(place.folder, plan.topic, plan.entity, place.event_timestamp, place.created_timestamp)


def checkpoint_uri(home: Path) -> str:
    """Where checkpoints are kept unless somebody says otherwise."""
    return str(home / "stream" / "checkpoints")


def _online(store: FeatureStore, plan: Plan) -> Online:
    online = OnlineSink(store, plan.view)
    return Published(online, ChangelogSink(plan.bootstrap_servers, plan.changelog)) if plan.changelog else online
