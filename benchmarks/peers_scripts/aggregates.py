"""The ten aggregates in plain Python, as little work an event as they take: sums instead of Welford's steps."""

from math import sqrt


def first(added: int, score: float) -> list[float]:
    """Return the state after one event."""
    return [1, added, added * added, added, added, score, score * score, score, score]


def add(state: list[float], added: int, score: float) -> list[float]:
    """Take one more event in, in place."""
    state[0] += 1
    state[1] += added
    state[2] += added * added
    if added < state[3]:
        state[3] = added
    elif added > state[4]:
        state[4] = added
    state[5] += score
    state[6] += score * score
    if score < state[7]:
        state[7] = score
    elif score > state[8]:
        state[8] = score
    return state


def result(state: list[float]) -> tuple[float, ...]:
    """Return count; sum, mean, min, max and std of `added`; mean, min, max and std of `score`."""
    count, added, added2, added_min, added_max, score, score2, score_min, score_max = state
    return (
        *(count, added, added / count, added_min, added_max, _std(count, added, added2)),
        *(score / count, score_min, score_max, _std(count, score, score2)),
    )


def _std(count: float, total: float, squares: float) -> float:
    return sqrt(max(0.0, squares - total * total / count) / (count - 1)) if count > 1 else 0.0
