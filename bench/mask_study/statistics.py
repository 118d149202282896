"""Means, differences paired by seed with their Student-t intervals, and what they say about the claims."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev

from .arms import CLAIMS, Claim

CONFIDENCE = 0.95
MIN_SEEDS = 3
# The 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

BETTER, WORSE, HIGHER, LOWER = "better", "worse", "higher", "lower"
NO_DIFFERENCE, TOO_FEW = "no difference shown", "not enough seeds"
SUPPORTED, NOT_SUPPORTED, CONTRADICTED = "supported", "not supported", "contradicted"


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval around it; without an interval where there is one value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def sign(self) -> int:
        """1 above zero, -1 below it, with 95 % confidence; else 0."""
        if self.low is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def t_interval(values: list[float]) -> Interval | None:
    """Student's t interval of the mean; None of no values. Beyond 31 values it is a little too wide."""
    if not values:
        return None
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    half = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1] * stdev(values) / count**0.5
    return Interval(mean, mean - half, mean + half, count)


def values_of(runs: list[dict], arm: str, metric: str) -> dict[int, float]:
    """seed -> value, of the arm's runs that have one."""
    return {
        run["seed"]: run["metrics"][metric]
        for run in runs
        if run["arm"] == arm and run["metrics"].get(metric) is not None
    }


def paired(runs: list[dict], metric: str, first: str, second: str) -> Interval | None:
    """The difference first - second over the seeds that both have."""
    one, other = values_of(runs, first, metric), values_of(runs, second, metric)
    return t_interval([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def compare(difference: Interval | None, up: bool | None) -> str:
    """The first arm beside the second, in words; `up`: more is better, None: neither is."""
    if difference is None or difference.count < MIN_SEEDS:
        return TOO_FEW
    if difference.sign == 0:
        return NO_DIFFERENCE
    if up is None:
        return HIGHER if difference.sign > 0 else LOWER
    return BETTER if (difference.sign > 0) == up else WORSE


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim."""

    claim: Claim
    first: Interval | None
    second: Interval | None
    difference: Interval | None
    word: str


def judge(runs: list[dict]) -> list[Verdict]:
    """A verdict for each claim."""
    verdicts = []
    for claim in CLAIMS:
        first, second = (
            t_interval(list(values_of(runs, arm, claim.metric).values())) for arm in (claim.first, claim.second)
        )
        difference = paired(runs, claim.metric, claim.first, claim.second)
        verdicts.append(Verdict(claim, first, second, difference, claim_word(difference)))
    return verdicts


def claim_word(difference: Interval | None) -> str:
    """Supported: the whole interval lies above zero; contradicted: below it; not supported: it holds zero."""
    if difference is None or difference.count < MIN_SEEDS:
        return TOO_FEW
    return {1: SUPPORTED, -1: CONTRADICTED, 0: NOT_SUPPORTED}[difference.sign]
