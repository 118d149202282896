"""Whether a call gives the same bits every time: atomics do not promise it, one run in a hundred may differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST_RUNS = {"cuda": 100, "cpu": 3}
SECONDS = 0.5
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def repeats_bit_for_bit(call: Callable[[], Sequence[Tensor]], device: str) -> tuple[bool, int]:
    """(whether all runs gave the first one's bits, how many runs were compared with it).

    Stops at the first that differs, after `MOST_RUNS` or `SECONDS`.
    """
    first, runs, start = call(), 0, time.perf_counter()
    while runs == 0 or (runs < MOST_RUNS[device] and time.perf_counter() - start < SECONDS):
        runs += 1
        if not all(map(_same_bits, call(), first)):
            return False, runs
    return True, runs


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike equality, it knows -0 from 0 and finds NaN the same as itself."""
    integer = _INTEGERS[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))
