"""Replayed series through broker and worker: what is logged equals pandas, for every function and window."""

from benchmarks.replays import REPLAYS, run
from ops.environment import Environment


def test_logged_features_of_a_replay_equal_pandas(tmp_path):
    told, _, agreement = run(REPLAYS[1], tmp_path, Environment.read(), rows=500, limit=4_000)
    assert told.startswith("4,000 processed, 0 dead, 0 late")
    assert agreement.rows >= 200
    assert max(agreement.relative.values()) < 1e-9
    assert max(agreement.rank.values()) < 0.03
