import itertools
import time

import numpy as np
import pytest
import torch

from bench.timing import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    SLOW_ROUNDS,
    CpuClock,
    CudaClock,
    interleave,
    make_clock,
    time_calls,
)
from bench.verdicts import compare, noise_floor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def median(samples):
    return sorted(samples)[len(samples) // 2]


def test_times_are_seconds_of_one_call():
    # A wrong unit or a sum over calls would pass every ratio test.
    samples = time_calls({"sleep": lambda: time.sleep(0.01)}, CpuClock(), 0.1)["sleep"]["op_eager"]
    assert 0.009 < median(samples) < 0.03


def test_providers_take_turns_forwards_and_backwards(monkeypatch):
    # A B C, C B A: a clock that slows down steadily must cost all of them the same.
    seen = []
    counter = itertools.count()

    def sampler(name):
        def sample():
            seen.append(name)
            return float(next(counter))

        return sample

    monkeypatch.setattr("bench.timing._seconds_of", lambda sample: 0 * sample())
    samples = interleave({name: sampler(name) for name in "abc"}, seconds=0.0)
    assert "".join(seen[6:15]) == "abccbaabc"  # after warming up
    assert {len(s) for s in samples.values()} == {FEWEST_ROUNDS}
    # With a steady drift, the sums over an even number of rounds are equal.
    assert len({sum(s[: FEWEST_ROUNDS // 2 * 2]) for s in samples.values()}) == 1


def test_the_number_of_rounds_has_bounds():
    # Too few give no quantiles; a microsecond op must not run a million times.
    assert len(interleave({"a": lambda: 0.0}, seconds=60.0)["a"]) == MOST_ROUNDS


def test_a_slow_provider_does_not_eat_the_others_time():
    # A reference that takes a second a call would leave a lent GPU's minutes to itself. Its first rounds are still
    # paired with everybody's.
    samples = interleave({"slow": lambda: time.sleep(0.02), "quick": lambda: 0.0}, seconds=0.1)
    assert len(samples["slow"]) == SLOW_ROUNDS and len(samples["quick"]) >= FEWEST_ROUNDS


def test_the_quickest_baseline_is_never_slow():
    # Triton may be a hundred times as fast; its rival still needs enough rounds for an interval.
    samplers = {"ours": lambda: 0.0, "rival": lambda: time.sleep(0.004), "hopeless": lambda: time.sleep(0.04)}
    samples = interleave(samplers, seconds=0.01, baselines=["rival", "hopeless"])
    assert len(samples["rival"]) == len(samples["ours"]) >= FEWEST_ROUNDS and len(samples["hopeless"]) == SLOW_ROUNDS


@pytest.mark.parametrize(("slowdown", "verdict"), [(1.0, "no difference"), (1.1, "slower"), (1 / 1.1, "faster")])
def test_a_planted_slowdown_passes_through_the_whole_instrument(monkeypatch, slowdown, verdict):
    # From the clock to the verdict, with a clock that is advanced by the calls themselves: drift, jitter, stalls.
    rng, now = np.random.default_rng(5), [0.0]
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: now[0])

    def call(cost):
        def run():
            drift = 1 + 0.1 * np.sin(now[0] / 40)
            now[0] += cost * drift * np.exp(0.02 * rng.standard_normal()) * (3.0 if rng.random() < 0.03 else 1.0)

        return run

    found = []
    for _ in range(100):
        calls = {"ours": call(slowdown), "baseline": call(1.0), "twin": call(slowdown)}
        times = {key: t["op_eager"] for key, t in time_calls(calls, CpuClock(), 150.0).items()}
        found.append(compare(times["ours"], times["baseline"], noise_floor(times["ours"], times["twin"])).verdict)
    assert found.count(verdict) >= 95


def test_the_cpu_has_no_device_times():
    # A wall-clock time under the name of a kernel time would be a lie.
    assert list(time_calls({"a": lambda: None}, make_clock("cpu"), 0.01)["a"]) == ["op_eager"]


@pytest.mark.gpu
@needs_gpu
def test_device_time_is_the_kernels_time():
    # Events around an asynchronous call must wait for the work, not for its launch.
    a = torch.randn(4096, 4096, device="cuda")
    times = time_calls({"matmul": lambda: a @ a}, make_clock("cuda"), 0.5)["matmul"]
    assert set(times) == {"kernel_cold", "kernel_warm", "op_eager"}
    assert all(min(samples) > 2 * 4096**3 / 2e15 for samples in times.values())


@pytest.mark.gpu
@needs_gpu
def test_dispatch_counts_for_the_caller_only():
    # A slow host is not a slow kernel: half a millisecond of Python stays out of the device times.
    x = torch.randn(1024, device="cuda")

    def slow_to_launch():
        until = time.perf_counter() + 5e-4
        while time.perf_counter() < until:
            pass
        x.mul_(1.0)

    times = time_calls({"slow": slow_to_launch}, make_clock("cuda"), 0.5)["slow"]
    assert median(times["kernel_cold"]) < 1e-4 and median(times["op_eager"]) > 5e-4


@pytest.mark.gpu
@needs_gpu
def test_cold_is_really_cold():
    # A published harness was silently warm, and 36 % off. The same sampler, with a flush that flushes nothing, must be
    # quicker on data that fits into L2; twice as large a flush must change nothing, or the first was too small.
    x, y = (torch.randn(2**22, device="cuda") for _ in range(2))
    cold = {}
    for factor in (0, 1, 2):
        clock = CudaClock()
        size = int(factor * clock.flush.numel())
        clock.flush = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        sample = clock.sampler("kernel_cold", lambda: torch.add(x, 1.0, out=y))
        cold[factor] = median([sample() for _ in range(101)])
    assert cold[1] > 1.3 * cold[0]
    assert cold[2] == pytest.approx(cold[1], rel=0.1)
