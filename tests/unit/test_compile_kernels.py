"""Where machine code is kept: ours beside our sources, other people's where they want it."""

from pathlib import Path

import numba

import streaming
from streaming.compile_kernels import kernel


def test_only_our_kernels_lie_in_our_folder():
    before = numba.config.CACHE_DIR
    ours = kernel(lambda number: number)
    assert str(Path(streaming.__file__).parent) in ours.stats.cache_path
    assert numba.config.CACHE_DIR == before
    theirs = numba.njit(cache=True)(lambda number: number)
    assert "kernels-" not in theirs.stats.cache_path
