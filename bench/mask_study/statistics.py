"""Means, differences paired by seed with their Student-t intervals, and what they say about the claims."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import fmean, stdev

from .arms import ARMS, CLAIMS, THRESHOLDS, Claim

CONFIDENCE = 0.95
MIN_SEEDS = 3
# The 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

BETTER, WORSE, HIGHER, LOWER = "better", "worse", "higher", "lower"
NO_DIFFERENCE, TOO_FEW, EQUAL = "no difference shown", "not enough seeds", "equal in every pair"
SUPPORTED, NOT_SUPPORTED, CONTRADICTED = "supported", "not supported", "contradicted"
# Masks that fill less of the box than this, on average, are none.
EMPTY = 0.05
# Masks whose IoU is not this far above that of the whole box as a mask hardly tell the object from what is around it.
BEYOND_BOX = 0.05
AT_BEST, AT_FIXED = "best_", "given_"  # how the metrics at an arm's best threshold and at THRESHOLD begin


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
    if difference.mean == difference.low == difference.high == 0:
        return EQUAL
    if difference.sign == 0:
        return NO_DIFFERENCE
    if up is None:
        return HIGHER if difference.sign > 0 else LOWER
    return BETTER if (difference.sign > 0) == up else WORSE


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim; `fixed` is the same at THRESHOLD, where the claim is judged at the best one."""

    claim: Claim
    first: Interval | None
    second: Interval | None
    difference: Interval | None
    word: str
    fixed: Verdict | None = None

    @property
    def depends_on_threshold(self) -> bool:
        """Whether the two thresholds lead to other words, or to means of opposite signs."""
        if self.difference is None or self.fixed is None or self.fixed.difference is None:
            return False
        return self.word != self.fixed.word or self.difference.mean * self.fixed.difference.mean < 0


def judge(runs: list[dict]) -> list[Verdict]:
    """A verdict for each claim."""
    return [_verdict(runs, claim) for claim in CLAIMS]


def _verdict(runs: list[dict], claim: Claim) -> Verdict:
    first, second = (
        t_interval(list(values_of(runs, arm, claim.metric).values())) for arm in (claim.first, claim.second)
    )
    difference = paired(runs, claim.metric, claim.first, claim.second)
    fixed = None
    if claim.metric.startswith(AT_BEST):
        metric = AT_FIXED + claim.metric.removeprefix(AT_BEST)
        fixed = _verdict(runs, dataclasses.replace(claim, metric=metric))
    return Verdict(claim, first, second, difference, claim_word(difference), fixed)


def claim_word(difference: Interval | None) -> str:
    """Supported: the whole interval lies above zero; contradicted: below it; not supported: it holds zero."""
    if difference is None or difference.count < MIN_SEEDS:
        return TOO_FEW
    return {1: SUPPORTED, -1: CONTRADICTED, 0: NOT_SUPPORTED}[difference.sign]


@dataclass(frozen=True)
class Unlearned:
    """Arms whose masks are not there yet, by what shows it: arm -> the number that does."""

    empty: dict[str, Interval]  # the share of the box that is filled at THRESHOLD
    lowest: dict[str, tuple[int, int]]  # runs whose best threshold is the lowest of the grid, of how many
    box_like: dict[str, Interval]  # mask IoU at the best threshold above that of the whole box as a mask


def unlearned(runs: list[dict]) -> Unlearned:
    """What a verdict about an arm must be read with.

    Empty: fills less than EMPTY of the box, on average. Lowest: the best threshold is at the low end in more than half
    of the runs. Box-like: the 95 % interval of the IoU above the box's, paired by seed, is not wholly above BEYOND_BOX.
    """
    empty, lowest, box_like = {}, {}, {}
    for arm in ARMS:
        fill = t_interval(list(values_of(runs, arm, "given_fill").values()))
        if fill is not None and fill.mean < EMPTY:
            empty[arm] = fill
        found = values_of(runs, arm, "best_threshold").values()
        count = sum(threshold <= THRESHOLDS[0] for threshold in found)
        if 2 * count > len(found):
            lowest[arm] = (count, len(found))
        above = above_box(runs, arm)
        if above is not None and (above.mean if above.low is None else above.low) <= BEYOND_BOX:
            box_like[arm] = above
    return Unlearned(empty, lowest, box_like)


def above_box(runs: list[dict], arm: str) -> Interval | None:
    """Mask IoU of an arm at its best threshold, less that of the whole box as a mask, run by run."""
    best, box = values_of(runs, arm, "best_iou"), values_of(runs, arm, "given_object_fill")
    return t_interval([best[seed] - box[seed] for seed in sorted(best.keys() & box.keys())])
