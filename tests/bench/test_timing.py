import itertools
import time

import pytest
import torch

from bench.timing import FEWEST_ROUNDS, MOST_ROUNDS, SLOW_ROUNDS, CpuClock, interleave, make_clock, time_calls

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


def test_the_cpu_has_no_device_times():
    # A wall-clock time under the name of a kernel time would be a lie.
    assert list(time_calls({"a": lambda: None}, make_clock("cpu"), 0.01)["a"]) == ["op_eager"]


@gpu
def test_device_time_is_the_kernels_time():
    # Events around an asynchronous call must wait for the work, not for its launch.
    a = torch.randn(4096, 4096, device="cuda")
    times = time_calls({"matmul": lambda: a @ a}, make_clock("cuda"), 0.5)["matmul"]
    assert set(times) == {"kernel_cold", "kernel_warm", "op_eager"}
    assert all(min(samples) > 2 * 4096**3 / 2e15 for samples in times.values())


@gpu
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


@gpu
def test_cold_is_really_cold():
    # A published harness was silently warm. 16 MiB fit into L2: read cold they come from memory, at a rate that
    # memory can give; read warm they do not.
    from bench.ceilings import measure_ceilings

    x, y = (torch.randn(2**21, device="cuda") for _ in range(2))
    times = time_calls({"copy": lambda: y.copy_(x)}, make_clock("cuda"), 0.5)["copy"]
    moved = 2 * x.numel() * x.element_size()
    assert median(times["kernel_cold"]) > 1.3 * median(times["kernel_warm"])
    assert moved / median(times["kernel_cold"]) < 1.05 * measure_ceilings().dram_bytes_per_s
