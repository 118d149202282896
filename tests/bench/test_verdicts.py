import numpy as np
import pytest

from bench.timing import FEWEST_ROUNDS
from bench.verdicts import compare, noise_floor

RUNS, ROUNDS = 300, 40


def simulate(rng, slowdown=1.0, rounds=ROUNDS):
    """Ours, the baseline and the baseline's twin as a noisy machine gives them: drift and jitter, some stalls.

    Clocks drift by 10 % during a run; each sample jitters by 2 %; 3 % of them are hit by something three times as long.
    """
    drift = 1 + 0.1 * np.sin(np.linspace(0, rng.uniform(1, 6), rounds) + rng.uniform(0, 6))

    def samples(factor):
        stalls = np.where(rng.random(rounds) < 0.03, 3.0, 1.0)
        return 1e-3 * factor * drift * stalls * np.exp(0.02 * rng.standard_normal(rounds))

    return samples(slowdown), samples(1.0), samples(1.0)


def verdicts(slowdown):
    rng = np.random.default_rng(7)
    for _ in range(RUNS):
        ours, baseline, twin = simulate(rng, slowdown)
        yield compare(ours, baseline, noise_floor(baseline, twin)).verdict


@pytest.mark.parametrize("rounds", [FEWEST_ROUNDS, ROUNDS])
@pytest.mark.parametrize("noise", [True, False])
def test_the_same_thing_twice_is_no_difference(noise, rounds):
    # The claim behind every verdict: an A/A pair is called different in fewer than 5 % of the runs, with and without
    # the help of the noise floor.
    rng = np.random.default_rng(11)
    called = []
    for _ in range(RUNS):
        ours, baseline, twin = simulate(rng, rounds=rounds)
        called.append(compare(ours, baseline, noise_floor(baseline, twin) if noise else 0.0).verdict)
    assert called.count("no difference") >= 0.95 * RUNS


def test_a_planted_slowdown_is_seen():
    # An instrument that always says "no difference" would pass the test above.
    found = list(verdicts(1.10))
    assert found.count("slower") >= 0.95 * RUNS and "faster" not in found
    assert list(verdicts(1 / 1.10)).count("faster") >= 0.95 * RUNS


def test_the_interval_holds_the_truth():
    # A 99 % interval that misses the planted ratio in more than a few of 300 runs is not one.
    rng, inside = np.random.default_rng(3), 0
    for _ in range(RUNS):
        ours, baseline, _ = simulate(rng, 1.25)
        found = compare(ours, baseline)
        inside += found.low <= 1 / 1.25 <= found.high
    assert inside >= 0.97 * RUNS


def test_the_ratio_is_a_speed_up():
    # Upside down, every loss would be reported as a win.
    found = compare([1.0] * 20, [2.0] * 20)
    assert (found.ratio, found.low, found.high, found.verdict) == (2.0, 2.0, 2.0, "faster")
    assert compare([2.0] * 20, [1.0] * 20).verdict == "slower"


def test_pairing_takes_out_common_drift():
    # Both get five times slower halfway: unpaired medians would be all over the place.
    rng = np.random.default_rng(0)
    shared = np.where(np.arange(60) < 30, 1.0, 5.0)
    ours, baseline = (f * shared * np.exp(0.01 * rng.standard_normal(60)) for f in (1.0, 1.2))
    found = compare(ours, baseline)
    assert found.verdict == "faster" and found.high / found.low < 1.2


def test_noise_hides_small_differences():
    # Where the same thing twice differs by 5 %, a difference of 4 % is none.
    ours, baseline = [1.0] * 20, [1.04] * 20
    assert compare(ours, baseline).verdict == "faster"
    assert compare(ours, baseline, noise=0.05).verdict == "no difference"
    assert compare(baseline, ours, noise=0.05).verdict == "no difference"
    assert noise_floor([1.0] * 9, [1.05] * 9) == pytest.approx(0.05) == noise_floor([1.05] * 9, [1.0] * 9)


def test_samples_of_different_runs_are_refused():
    # Unequal numbers of rounds mean that they were not measured together.
    with pytest.raises(ValueError, match="paired samples"):
        compare([1.0] * 3, [1.0] * 4)
    with pytest.raises(ValueError, match="paired samples"):
        compare([], [])
