"""Exactly once: a crash between any two steps of a commit, a lost answer or a zombie change nothing that is derived."""

import json
import threading
from concurrent.futures import Executor, Future
from dataclasses import asdict, replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka import OffsetAndMetadata
from kafka.errors import KafkaError

from streaming import checkpoint
from streaming.allowance import Allowance
from streaming.checkpoint import CheckpointStore, StaleEpochError
from streaming.derived import Derived
from streaming.deriving.derivation import Derivation, Input
from streaming.deriving.derived_partition import COMMIT_S, DerivedPartition
from streaming.deriving.deriver import PENDING_ROWS, Deriver
from streaming.deriving.join_clock import JoinClock
from streaming.deriving.rekeying import Rekeying
from streaming.deriving.transactions import Progress
from streaming.keyed import WorkerError
from streaming.records import RecordBatch, Reject
from streaming.state import StateError

LEFT = Input("orders", "orders", "", "time timestamp, item string", "time", 0)
RIGHT = Input("prices", "prices", "", "time timestamp, item string", "time", 0)
REKEYED = Derivation("by_item", "rekeyed", (LEFT,), "item", LEFT.schema, 0)
JOINED = Derivation("counted", "as_of_join", (LEFT, RIGHT), "item", LEFT.schema, 0, on="item")


class Crash(BaseException):
    """The process is gone."""


class Inline(Executor):
    """Does a commit at once, so that a crash can be put between any two of its steps."""

    def submit(self, task, /, *args, **options):
        future = Future()
        try:
            future.set_result(task(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future


class Later(Inline):
    """Does commits when it is told to."""

    def __init__(self):
        self.jobs = []

    def submit(self, task, /, *args, **options):
        self.jobs.append((Future(), lambda: task(*args, **options)))
        return self.jobs[-1][0]

    def work(self):
        for future, job in self.jobs:
            future.set_result(job())
        self.jobs = []


class Broker:
    """Derived topics and offsets as a broker keeps them: what is committed, and one open transaction a partition.

    `fails` is asked before and after each step that changes something.
    """

    def __init__(self, fails=lambda step: None):
        self.records, self.offsets, self.fences, self.fails = {}, {}, {}, fails
        self.order = []

    def output(self, partition):
        return Writer(self, partition)


class Writer:
    def __init__(self, broker, partition):
        self.broker, self.partition, self.fence, self.open = broker, partition, None, None

    def take(self):
        self.broker.fails("before take")
        self.fence = self.broker.fences[self.partition] = self.broker.fences.get(self.partition, 0) + 1
        self.open = None
        self.broker.fails("after take")
        return self.broker.offsets.get(self.partition)

    def write(self, keys, values):
        self.broker.fails("before write")
        self.check()
        self.open = list(zip(keys, values, strict=True))
        self.broker.fails("after write")

    def commit(self, progress):
        self.broker.fails("before commit")
        self.check()
        self.broker.records.setdefault(self.partition, []).extend(self.open)
        self.broker.order.extend(value for _, value in self.open)
        self.broker.offsets[self.partition] = progress
        self.open = None
        self.broker.fails("after commit")

    def check(self):
        if self.fence != self.broker.fences[self.partition]:
            raise KafkaError("fenced")

    def close(self):
        pass


class Topic:
    """An input in memory, whose batches are small."""

    def __init__(self, logs, broker, batch=3):
        self.broker, self.logs, self.batch = broker, logs, batch
        self.at, self.held, self.lost, self.closed = {}, set(), {}, False
        self.silent_s = 0.0

    def assign(self, partitions):
        self.at = {partition: self.at.get(partition, 0) for partition in partitions}

    def seek(self, partition, offset):
        self.at[partition] = offset or 0
        return self.at[partition]

    def hold(self, partitions):
        self.held = set(partitions)

    def poll(self, timeout_s, max_records):
        batches = []
        for partition, at in self.at.items():
            values = self.logs[partition][at : at + self.batch] if partition not in self.held else []
            if values:
                self.at[partition] += len(values)
                keys = [json.loads(value)["item"].encode() for value in values]
                data = b"".join(values) + b"".join(keys)
                found = RecordBatch.of_values(values, at)
                ends = np.cumsum([found.values[-1, 1], *map(len, keys)])
                spans = np.stack([ends[:-1], ends[1:]], axis=1)
                buffer = np.frombuffer(data, dtype=np.uint8)
                batches.append(found._replace(partition=partition, buffer=buffer, keys=spans))
        return batches

    def position(self, partition):
        return self.at[partition]

    def unanswered_s(self):
        return dict.fromkeys(self.at, self.silent_s)

    def lag(self):
        return {partition: len(self.logs[partition]) - at for partition, at in self.at.items()}

    def end_offsets(self):
        return {partition: len(self.logs[partition]) for partition in self.at}

    def foreign(self):
        found = {}
        for number in self.logs.keys() - self.at.keys():
            progress = self.broker.offsets.get(number)
            note = progress and {name: value for name, value in asdict(progress).items() if name != "offsets"}
            committed = progress and OffsetAndMetadata(progress.offsets[0], json.dumps(note), -1)
            found[number] = committed, len(self.logs[number])
        return found

    def commit(self, offsets):
        raise AssertionError("offsets are committed with the records")

    def close(self):
        self.closed = True


class Rejects:
    def __init__(self):
        self.found = []

    def write(self, rejects):
        self.found.extend(rejects)

    def close(self):
        pass


class Counting:
    """An operator with state: numbers the records of each side, and shows what it has seen so far of the other one."""

    def __init__(self, states=(), sides=2):
        self.seen = [sum(counts) for counts in zip(*map(json.loads, states), strict=True)] or [0] * sides
        self.told = list(self.seen)
        self.clocks_us = (0,) * sides
        self.buffered_bytes = 0
        self.away = 0

    def process(self, side, batch, now_us):
        if self.away:
            self.away -= 1
            raise ConnectionError("the store is away")
        keys, values, rejects = [], [], []
        for row in range(len(batch.offsets)):
            self.seen[side] += 1
            event = json.loads(batch.value(row))
            if event.get("bad"):
                rejects.append((side, Reject("late", batch.partition, int(batch.offsets[row]), "bad", b"", b"")))
                continue
            clocks = list(self.clocks_us)
            clocks[side] = max(clocks[side], event["time"])
            self.clocks_us = tuple(clocks)
            keys.append(event["item"].encode())
            values.append(b"%d/%d" % (side, self.seen[side]))
        return Derived(keys, values, rejects)

    def tick(self, now_us, side):
        return Derived([], [], [])

    def leave_out(self, side, wall_us):
        pass

    def drain(self):
        return Derived([b"end"], [b"%d" % sum(self.seen)], [])

    def snapshot(self):
        self.told = list(self.seen)
        return json.dumps(self.seen).encode()

    def delta(self):
        more = [now - then for now, then in zip(self.seen, self.told, strict=True)]
        self.told = list(self.seen)
        return json.dumps(more).encode()


@pytest.fixture(params=[False, True], ids=["snapshots", "deltas"])
def deltas(request, monkeypatch):
    """Whether commits hold what has changed wherever they may."""
    if request.param:
        monkeypatch.setattr(checkpoint, "LARGE_BYTES", 0)
        monkeypatch.setattr(checkpoint, "DELTAS_SHARE", 100)
    return request.param


def log(first, records):
    return [json.dumps({"time": first + n, "item": f"item {n % 3}"}).encode() for n in range(records)]


def deriver(broker, folder, derivation=REKEYED, logs=None, operators=None, executor=None, **options):
    clock = count(step=COMMIT_S / 2)
    make = (operators or {}).get(derivation.kind) or (
        (lambda number, states: Rekeying(derivation))
        if derivation.kind == "rekeyed"
        else (lambda number, states: Counting(states))
    )
    logs = logs or [{0: log(0, 20), 1: log(5, 20)}] * len(derivation.inputs)
    made = Deriver(
        derivation,
        sources=[Topic(each, broker) for each in logs],
        rejects=[Rejects() for _ in logs],
        checkpoints=CheckpointStore(str(folder)),
        operator=make,
        output=broker.output,
        ticking=options.pop("ticking", False),
        executor=executor or Inline(),
        wall_us=lambda: 0,
        monotonic_s=lambda: next(clock),
        **options,
    )
    made.pauses = 0
    return made


def until_done(make, partitions=(0, 1), tries=60):
    """Run to the end as a supervisor would: one that crashed or failed is started again with the next epoch."""
    for _ in range(tries):
        one = make()
        try:
            one.start(dict.fromkeys(partitions, 0))
            one.run(threading.Event(), until_caught_up=True)
        except (Crash, KafkaError):
            continue
        return one
    raise AssertionError("never done")


def expected(derivation):
    if derivation is REKEYED:
        return {
            number: [(json.loads(value)["item"].encode(), value) for value in values]
            for number, values in {0: log(0, 20), 1: log(5, 20)}.items()
        }
    return None


STEPS = ["before take", "after take", "before write", "after write", "before commit", "after commit"]


class Failing:
    """Fails at the nth time of a step: by a crash of the process, or by an error that says nothing."""

    def __init__(self, step, nth, error):
        self.step, self.left, self.error = step, nth, error

    def __call__(self, step):
        if step == self.step:
            self.left -= 1
            if self.left == 0:
                raise self.error("here")


@pytest.mark.parametrize("error", [Crash, KafkaError])
@pytest.mark.parametrize(
    ("derivation", "deltas"),
    [(REKEYED, False), (JOINED, False), (JOINED, True)],
    ids=["stateless", "snapshots", "deltas"],
    indirect=["deltas"],
)
@pytest.mark.parametrize("step", STEPS)
def test_what_is_derived_is_the_same_wherever_it_fails(tmp_path, monkeypatch, deltas, step, derivation, error):
    monkeypatch.setattr(threading.Event, "wait", lambda self, pause_s=None: False)
    quiet = Broker()
    until_done(lambda: deriver(quiet, tmp_path / "quiet", derivation))
    for nth in (1, 2, 5):
        broker = Broker(Failing(step, nth, error))
        folder = tmp_path / f"{nth}"
        last = until_done(lambda broker=broker, folder=folder: deriver(broker, folder, derivation))
        assert in_sides(broker.records) == in_sides(quiet.records)
        if derivation is REKEYED:
            assert broker.records == expected(REKEYED)
        assert {number: one.processed for number, one in broker.offsets.items()} == dict.fromkeys(
            (0, 1), 20 * len(derivation.inputs)
        )
        assert {row["lag"] for row in last.status().values()} == {0}
        assert all(row["derived"] == len(broker.records[number]) for number, row in last.status().items())


def in_sides(records):
    """How the sides mingle depends on where a worker began to read; the order within each does not."""
    return {
        number: [[value for _, value in rows if value.startswith(prefix)] for prefix in (b"0/", b"1/", b"4", b"{")]
        for number, rows in records.items()
    }


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_crash_while_the_checkpoint_is_written_loses_and_repeats_nothing(tmp_path, monkeypatch, deltas, kind):
    quiet = Broker()
    until_done(lambda: deriver(quiet, tmp_path / "quiet", JOINED))
    save = CheckpointStore.save
    for nth in (1, 2, 3, 6):
        failing = Failing(kind, nth, Crash)

        def saving(self, *args, failing=failing, **options):
            failing("before")
            save(self, *args, **options)
            failing("after")

        monkeypatch.setattr(CheckpointStore, "save", saving)
        broker = Broker()
        until_done(lambda broker=broker, nth=nth: deriver(broker, tmp_path / f"{nth}", JOINED))
        assert in_sides(broker.records) == in_sides(quiet.records)


def test_two_crashes_in_a_row_still_find_the_state_of_the_last_commit(tmp_path, deltas):
    """Each leaves a checkpoint that was never committed, and the one that counts must not go with them."""
    quiet = Broker()
    until_done(lambda: deriver(quiet, tmp_path / "quiet", JOINED))
    broker = Broker()
    commits = count(1)

    def fails(step):
        if step == "before commit" and next(commits) in (4, 5, 6, 7):
            raise Crash

    broker.fails = fails
    until_done(lambda: deriver(broker, tmp_path / "crashed", JOINED))
    assert in_sides(broker.records) == in_sides(quiet.records)


@pytest.mark.parametrize("deltas", [True], indirect=True)
def test_a_commit_builds_on_the_one_before(tmp_path, deltas):
    last = until_done(lambda: deriver(Broker(), tmp_path, JOINED))
    saved = CheckpointStore(str(tmp_path)).load(last.plan.name, 0)
    assert len(saved.deltas) > 1
    assert Counting((saved.state, *saved.deltas)).seen == [20, 20]


def test_a_slow_snapshot_delays_the_next_snapshot_but_no_delta():
    commits = SimpleNamespace(epoch=1, wants_whole=lambda: True)
    held = DerivedPartition(
        JOINED,
        Counting(),
        commits,
        Progress(0, (0, 0), ""),
        [0, 0],
        began_s=0.0,
        heard_s=[0.0, 0.0],
        silences=[],
        saved_s=0.0,
    )
    held.begin(iter([100.0, 102.0]).__next__)
    held.commit, held.moved = None, True
    assert (held.due(103.0), held.due(119.0), held.due(120.0)) == (False, False, True)
    commits.wants_whole = lambda: False
    assert held.due(103.0)
    held.begin(iter([103.0]).__next__)
    held.commit, held.moved = None, True
    commits.wants_whole = lambda: True
    assert (held.due(119.0), held.due(120.0)) == (False, True)


class Clocked(Counting):
    """Shows the clock of a join."""

    def __init__(self, states=()):
        super().__init__(states)
        self.clock = JoinClock((0, 0))

    def process(self, side, batch, now_us):
        derived = super().process(side, batch, now_us)
        self.clock.times_us[side] = self.clocks_us[side]
        self.clock.heard(side, now_us)
        return derived

    def tick(self, now_us, side):
        self.clock.tick(now_us, side, level=False)
        self.clocks_us = tuple(self.clock.times_us.tolist())
        return Derived([], [], [])

    def leave_out(self, side, wall_us):
        self.clock.leave_out(side, wall_us)


def test_a_side_ages_by_time_that_passed_and_was_answered_for_and_by_the_rest_once_that_has_settled(tmp_path):
    operator, now = Clocked(), SimpleNamespace(s=1_000.0, us=10**15)
    logs = [{0: log(0, 3)}, {0: log(0, 3)}]
    one = deriver(
        Broker(), tmp_path, JOINED, logs, operators={"as_of_join": lambda number, states: operator}, ticking=True
    )
    one._monotonic_s, one._wall_us = lambda: now.s, lambda: now.us
    one.start({0: 0})

    def clocks_s(seconds, stepped_s=0):
        now.s, now.us = now.s + seconds, now.us + (seconds + stepped_s) * SECOND_US
        one.step()
        return tuple(clock // SECOND_US for clock in operator.clocks_us)

    assert clocks_s(0) == (0, 0)
    assert clocks_s(10) == (10, 10)
    one._sources[1].silent_s += 3_600
    assert clocks_s(3_600) == (3_610, 10)
    assert clocks_s(20) == (3_630, 30)
    assert clocks_s(10, stepped_s=86_400) == (3_640, 40)
    assert clocks_s(10, stepped_s=-2 * 86_400) == (3_650, 50)
    one._sources[1].silent_s += 100
    assert clocks_s(100) == (3_750, 50)
    assert clocks_s(299) == (4_049, 349)
    assert clocks_s(1) == (4_050, 4_050)


def test_a_zombie_is_fenced_and_ends(tmp_path):
    broker = Broker()
    old, new = (deriver(broker, tmp_path) for _ in range(2))
    old.start({0: 1, 1: 1})
    old.step()
    new.start({0: 2, 1: 2})
    with pytest.raises(StaleEpochError):
        for _ in range(20):
            old.step()
    new.run(threading.Event(), until_caught_up=True)
    assert broker.records == expected(REKEYED)
    assert {row["epoch"] for row in new.status().values()} == {2}


def test_a_zombie_that_fenced_the_new_owner_by_its_retry_changes_nothing(tmp_path, monkeypatch):
    """Between the check of its epoch and its taking of the topic, a new owner may have come: that one takes it back."""
    monkeypatch.setattr(threading.Event, "wait", lambda self, pause_s=None: False)
    broker = Broker()
    new = deriver(broker, tmp_path)
    new.start({0: 2, 1: 2})
    new.step()
    broker.output(0).take()
    new.run(threading.Event(), until_caught_up=True)
    assert broker.records == expected(REKEYED)


def test_a_shared_partition_that_was_taken_over_is_let_go(tmp_path):
    broker = Broker()
    old, new = (deriver(broker, tmp_path, shared=True) for _ in range(2))
    old.start({0: 0, 1: 0})
    new.start({0: 0})
    for _ in range(12):
        old.step()
    assert old.holds() == {1}
    new.run(threading.Event(), until_caught_up=True)
    old.run(threading.Event(), until_caught_up=True)
    assert broker.records == expected(REKEYED)


def test_partitions_that_move_are_committed_first(tmp_path):
    broker = Broker()
    one, two = (deriver(broker, tmp_path) for _ in range(2))
    one.start({0: 0, 1: 0})
    two.start({})
    one.step()
    one.assign({1: 0})
    one.step()
    assert broker.offsets[0].offsets == (3,)
    two.assign({0: 0})
    two.run(threading.Event(), until_caught_up=True)
    one.run(threading.Event(), until_caught_up=True)
    assert broker.records == expected(REKEYED)


def test_another_declaration_under_the_same_name_is_refused(tmp_path):
    broker = Broker()
    until_done(lambda: deriver(broker, tmp_path))
    changed = Derivation("by_item", "rekeyed", (LEFT,), "time", LEFT.schema, 0)
    with pytest.raises(StateError, match="another declaration: key 'item' became 'time'.*--reset by_item"):
        deriver(broker, tmp_path, changed).start({0: 0})
    CheckpointStore(str(tmp_path)).reset("by_item")
    with pytest.raises(StateError, match="another declaration: .* delete the topic and its consumer group"):
        deriver(broker, tmp_path, changed).start({0: 0})
    broker.offsets.clear()
    deriver(broker, tmp_path, changed).start({0: 0})


def test_a_lost_checkpoint_and_forgotten_offsets_are_said_so(tmp_path):
    broker = Broker()
    until_done(lambda: deriver(broker, tmp_path / "one", JOINED))
    with pytest.raises(StateError, match="has no checkpoint of its commit"):
        deriver(broker, tmp_path / "other", JOINED).start({0: 0})
    broker.offsets.clear()
    with pytest.raises(StateError, match="no longer knows how far"):
        deriver(broker, tmp_path / "one", JOINED).start({0: 0})


def test_a_side_that_is_ahead_waits_for_the_other_until_that_one_is_read(tmp_path):
    logs = [{0: log(0, 30)}, {0: log(12, 12)}]
    one = deriver(Broker(), tmp_path, JOINED, logs)
    one.start({0: 0})
    left, right = one._sources
    seen = []
    for _ in range(30):
        one.step()
        seen.append((left.at[0], right.at[0]))
    assert seen[-1] == (30, 12)
    operator = one._held[0].operator
    assert operator.clocks_us == (29, 23)
    # What was read while the other side had more is never more than one batch ahead in event time.
    assert all(at_left <= 12 + at_right + 6 or at_right == 12 for at_left, at_right in seen)


def test_a_store_that_is_away_is_waited_for_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Event, "wait", lambda self, pause_s=None: False)
    operator = Counting(sides=1)
    operator.away = 4
    broker = Broker()
    lookup = Derivation("looked_up", "feature_lookup", (LEFT,), "item", LEFT.schema, 0, on="item")
    one = deriver(
        broker, tmp_path, lookup, [{0: log(0, 10)}], operators={"feature_lookup": lambda number, states: operator}
    )
    one.start({0: 0})
    one.run(threading.Event(), until_caught_up=True)
    assert [value for _, value in broker.records[0]] == [b"0/%d" % n for n in range(1, 11)] + [b"10"]


def test_rejects_reach_their_side_and_the_counts_outlive_a_restart(tmp_path):
    bad = json.dumps({"time": 1, "item": "a", "bad": True}).encode()
    logs = [{0: [*log(0, 4), bad]}, {0: [bad, bad, *log(0, 2)]}]
    broker = Broker()
    one = until_done(lambda: deriver(broker, tmp_path, JOINED, logs), partitions=(0,))
    assert [len(rejects.found) for rejects in one._rejects] == [1, 2]
    again = deriver(broker, tmp_path, JOINED, logs)
    again.start({0: 0})
    figures = again.status()[0]
    assert (figures["processed"], figures["late"], figures["dead"], figures["read"]) == (6, 3, 0, 0)
    assert figures["derived"] == 7  # 6 and what came at the end
    assert figures["epoch"] == 2


def test_nothing_is_polled_while_too_much_waits_to_be_committed(tmp_path):
    later = Later()
    event = json.dumps({"time": 0, "item": "a"}).encode()
    many = [event] * (PENDING_ROWS // 2 + 1)
    one = deriver(Broker(), tmp_path, logs=[{0: many * 4}], executor=later)
    one._sources[0].batch = len(many)
    one.start({0: 0})
    for _ in range(9):
        one.step(0.0)
    assert one._sources[0].at[0] == 2 * len(many)
    later.work()
    one.step(0.0)
    one.step(0.0)
    assert one._sources[0].at[0] > 2 * len(many)


def test_records_of_a_join_must_be_keyed_by_what_they_are_joined_on(tmp_path):
    one = deriver(
        Broker(), tmp_path, Derivation("x", "as_of_join", (LEFT, RIGHT), "item", "", 0, on="time"), keyed=True
    )
    one.start({0: 0})
    with pytest.raises(WorkerError, match="keyed by time"):
        for _ in range(5):
            one.step()


def test_an_operator_that_holds_too_much_ends_with_a_sentence(tmp_path):
    operator = Counting()
    operator.buffered_bytes = 3 << 20
    one = deriver(
        Broker(),
        tmp_path,
        JOINED,
        operators={"as_of_join": lambda number, states: operator},
        allowance=Allowance(2 << 20),
    )
    one.start({0: 0})
    with pytest.raises(StateError, match="holds 3 MiB of events that wait for others; .* all together may take 2"):
        one.step()


SECOND_US = 1_000_000
MET = replace(REKEYED, drift_us=5 * SECOND_US)


def events(seconds: list[int], name: str) -> list[bytes]:
    """Events at these seconds, with one that cannot be read as one with a time, and one of the far future."""
    values = [json.dumps({"time": 1000 * second, "item": f"{name}{at}"}).encode() for at, second in enumerate(seconds)]
    values.insert(len(values) // 2, b'{"item": "no time"}')
    values.insert(len(values) // 3, b'{"time": 4102444800000, "item": "of 2100"}')
    return values


def run_together(workers: list[Deriver], turns) -> None:
    for turn in turns:
        workers[turn % len(workers)].step(0.0)
    for _ in range(3_000):
        for worker in workers:
            worker.step(0.0)
        if all(worker.caught_up() for worker in workers):
            break
    else:
        raise AssertionError("they wait for each other for ever")
    for worker in workers:
        worker.checkpoint()


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.lists(st.integers(0, 30), max_size=20),
    second=st.lists(st.integers(0, 30), max_size=20),
    third=st.lists(st.integers(0, 30), max_size=10),
    turns=st.lists(st.integers(0, 2), max_size=60),
    workers=st.integers(1, 3),
)
def test_partitions_whose_events_meet_stay_together_whoever_reads_them(
    tmp_path_factory, first, second, third, turns, workers
):
    """The gaps between events are random, so that partitions jump, end early and begin late."""
    folder, broker = tmp_path_factory.mktemp("met"), Broker()
    logs = [
        {number: events(np.cumsum(gaps).tolist(), f"{number}-") for number, gaps in enumerate((first, second, third))}
    ]
    made = [deriver(broker, folder, MET, logs, keyed=True) for _ in range(workers)]
    for at, worker in enumerate(made):
        worker.start({number: 0 for number in range(3) if number % workers == at})
    run_together(made, turns)
    assert {number: [value for _, value in rows] for number, rows in broker.records.items() if rows} == logs[0]
    times = [time for value in broker.order if (time := json.loads(value).get("time", 4e12)) < 4e12]
    behind_s = [
        (newest - time) / 1000 for time, newest in zip(times, np.maximum.accumulate(times or [0]), strict=False)
    ]
    assert max(behind_s, default=0) <= 5
