"""Faster, slower, or no difference: a ratio of medians with a bootstrap interval, beside the run's own noise.

Providers are measured in rounds, one sample of each a round, so sample i of two providers saw the same clocks and
the same neighbours. The bootstrap draws whole rounds (Efron, 1979, the paired form), which keeps that pairing: drift
that hits both widens neither. The noise floor comes from an A/A pair of the same run: one provider measured twice
under two names, whose true ratio is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99  # wide on purpose: a report makes a hundred such statements
RESAMPLES = 2000
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"


@dataclass(frozen=True)
class Comparison:
    """How many times as fast: `ratio` with its interval, and what may be said about it."""

    ratio: float
    low: float
    high: float
    verdict: str


def compare(ours: Sequence[float], baseline: Sequence[float], noise: float = 0.0) -> Comparison:
    """Speed-up of `ours` over `baseline`, both seconds a round: 2 means twice as fast.

    The verdict is "no difference" unless the whole interval lies outside [1 / (1 + noise), 1 + noise].

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if len(ours) != len(baseline) or not len(ours):
        raise ValueError(f"paired samples needed, got {len(ours)} and {len(baseline)}: measure them in one run")
    a, b = np.asarray(ours, dtype=float), np.asarray(baseline, dtype=float)
    rounds = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    ratios = np.median(b[rounds], axis=1) / np.median(a[rounds], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Comparison(float(np.median(b) / np.median(a)), float(low), float(high), _verdict(low, high, noise))


def _verdict(low: float, high: float, noise: float) -> str:
    if low > 1 + noise:
        return FASTER
    if high < 1 / (1 + noise):
        return SLOWER
    return NO_DIFFERENCE


def noise_floor(samples: Sequence[float], twin: Sequence[float]) -> float:
    """How far an A/A pair is from 1: 0.02 means that this run cannot tell 2 % from nothing."""
    ratio = float(np.median(samples) / np.median(twin))
    return max(ratio, 1 / ratio) - 1
