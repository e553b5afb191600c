"""When a worker writes: soon while it keeps up, seldom while it catches up, soon again when it has."""

from streaming.cadence import CATCH_UP_S, CHECKPOINT_S, Cadence


def after_flush(took_s: float, read: int = 0, flush_s: float = 0.05) -> Cadence:
    cadence = Cadence(flush_s, 0.0)
    cadence.flushed(10.0 - took_s, 10.0)
    cadence.read(read)
    return cadence


def test_a_worker_that_keeps_up_flushes_after_its_pause_or_after_as_long_as_a_flush_takes():
    assert abs(after_flush(0.01).flush_in_s(10.0, lag=0) - 0.05) < 1e-9
    assert after_flush(0.01).flush_in_s(10.06, lag=0) < 0
    assert abs(after_flush(0.4).flush_in_s(10.0, lag=0) - 0.4) < 1e-9


def test_a_little_lag_is_not_being_behind():
    assert after_flush(0.1, read=100_000).flush_in_s(10.2, lag=50_000) < 0


def test_a_worker_that_is_behind_spends_a_twentieth_of_its_time_on_flushes():
    cadence = after_flush(0.1, read=100_000)
    assert cadence.flush_in_s(10.2, lag=10_000_000) > 1.7
    cadence.read(900_000)
    assert cadence.flush_in_s(12.1, lag=9_000_000) < 0


def test_no_pause_is_longer_than_ten_seconds_or_than_the_backlog_takes():
    slow = after_flush(5.0, read=1_000_000)
    assert slow.flush_in_s(11.0, lag=10**9) == CATCH_UP_S - 1.0
    assert slow.flush_in_s(11.0, lag=6_000_000) == 5.0
    assert slow.flush_in_s(11.0, lag=0) == 4.0


def test_a_checkpoint_comes_each_second_and_costs_a_tenth_of_the_time_at_most():
    cadence = Cadence(0.05, 0.0)
    assert not cadence.checkpoint_due(0.5)
    assert cadence.checkpoint_due(CHECKPOINT_S)
    cadence.captured(1.0, 1.5)
    assert not cadence.checkpoint_due(6.4)
    assert cadence.checkpoint_due(6.5)
