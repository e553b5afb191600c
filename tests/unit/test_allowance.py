"""All partitions of a process share one limit."""

import threading

from streaming.allowance import Allowance

MIB = 1 << 20


def test_what_one_holds_the_others_cannot_have():
    allowance = Allowance(100 * MIB)
    one, other = ("view", 0), ("view", 1)
    assert allowance.grant(one, 60 * MIB)
    assert not allowance.grant(other, 50 * MIB)
    assert allowance.grant(other, 40 * MIB)
    assert "others of its worker take 40, " in allowance.limits(one)
    assert not allowance.grant(one, 70 * MIB, has_bytes=60 * MIB)
    assert allowance.grant(one, 60 * MIB, has_bytes=60 * MIB)
    allowance.shrink(one, 30 * MIB)
    assert not allowance.grant(other, 80 * MIB)
    assert allowance.grant(other, 70 * MIB)
    allowance.shrink(one, 90 * MIB)
    assert "others of its worker take 30, " in allowance.limits(other)
    allowance.free(one)
    assert allowance.grant(other, 100 * MIB)
    allowance.shrink(one, 0)
    assert "others of its worker take 0, " in allowance.limits(other)


def test_what_was_held_before_the_limit_was_reached_may_stay():
    allowance = Allowance(10)
    assert allowance.grant(("view", 0), 50, has_bytes=50)
    assert not allowance.grant(("view", 0), 51, has_bytes=50)


def test_threads_together_get_no_more_than_there_is():
    allowance, granted = Allowance(1_000), []

    def take(number: int) -> None:
        if allowance.grant(("view", number), 100):
            granted.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 10
