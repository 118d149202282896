"""Events, waits, memory and clocks of `mrcnn-bench step`, on a GPU that is played by a few functions."""

import contextlib
import time
import warnings

import pytest
import torch

from bench.step import clocks
from bench.step.measure import ROUNDS, Memory, count_waits, measure_rounds
from bench.step.phases import PhaseClock


class Gpu:
    """A device whose time is a counter: steps move it on, events keep it."""

    def __init__(self):
        self.now, self.capturing, self.events, self.mode, self.waited = 0.0, False, [], "default", 0
        self.allocated = self.reserved = self.peak = 0

    def event(self, enable_timing, external=False):
        assert enable_timing
        event = Event(self, external)
        self.events.append(event)
        return event

    def allocate(self, bytes_):
        self.allocated += bytes_
        self.peak = max(self.peak, self.allocated)

    def reset_peak(self):
        self.peak = self.allocated


class Event:
    def __init__(self, gpu, external):
        self.gpu, self.external, self.at = gpu, external, None

    def record(self):
        assert self.external == self.gpu.capturing, "an event of a graph was set outside of it, or the reverse"
        self.at = self.gpu.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    fakes = {
        "Event": gpu.event,
        "is_current_stream_capturing": lambda: gpu.capturing,
        "synchronize": lambda: setattr(gpu, "waited", gpu.waited + 1),
        "set_sync_debug_mode": lambda mode: setattr(gpu, "mode", mode),
        "empty_cache": lambda: None,
        "memory_allocated": lambda: gpu.allocated,
        "memory_reserved": lambda: gpu.reserved,
        "max_memory_allocated": lambda: gpu.peak,
        "max_memory_reserved": lambda: gpu.reserved,
        "reset_peak_memory_stats": gpu.reset_peak,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpu


def test_rounds_go_there_and_back():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    samples = measure_rounds(steps, on_gpu=False, rounds=3)
    assert "".join(calls) == "abbaab" and ROUNDS >= 8
    assert [len(s.blocks) for s in samples.values()] == [3, 3] and samples["a"].steps == 3


def test_a_block_does_not_wait_between_its_steps(gpu):
    # Steps of 3 ms by the device's clock; the host waits before and after a block, whatever its length.
    def step():
        gpu.now += 3.0
        time.sleep(0.05)

    samples = measure_rounds({"a": step}, on_gpu=True, rounds=2)["a"]
    assert samples.steps == 16 and samples.steps_ms == [3.0] * 16  # 0.4 s are 8 of 0.05 s
    assert gpu.waited == 6 and samples.seconds == pytest.approx(0.8, rel=0.3)
    gpu.waited = 0
    measure_rounds({"a": step}, on_gpu=True, waiting=True, rounds=1)
    assert gpu.waited == 8 + 2  # a latency: every call is waited for


def test_phases_are_those_of_the_last_step():
    clock = PhaseClock(on_gpu=False)
    with clock("forward"):
        pass
    with contextlib.suppress(ValueError), clock("backward"):
        raise ValueError
    assert set(clock.milliseconds()) == {"forward", "backward"}
    assert all(ms >= 0 for ms in clock.milliseconds().values())


def test_a_graphs_events_are_its_own(gpu):
    clock = PhaseClock(on_gpu=True)

    def run():
        for name, milliseconds in (("forward", 2.0), ("backward", 5.0)):
            with clock(name):
                gpu.now += milliseconds

    run()
    assert clock.milliseconds() == {"forward": 2.0, "backward": 5.0}
    assert not any(event.external for event in gpu.events)
    gpu.capturing = True
    run()
    gpu.capturing = False
    captured = gpu.events[4:]
    assert all(event.external for event in captured) and len(captured) == 4
    for event, at in zip(captured, (0.0, 20.0, 20.0, 70.0), strict=True):  # as a replay sets them
        event.at = at
    assert clock.milliseconds() == {"forward": 20.0, "backward": 50.0}
    run()  # another shape, not captured: events of the graph are neither set nor dropped
    assert {id(e) for pair in clock._captured for e in pair} == {id(e) for e in captured}


def test_waits_are_counted(gpu):
    def step():
        assert gpu.mode == "warn"
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert count_waits(step, on_gpu=True) == 3 and gpu.mode == "default"
    with pytest.raises(ZeroDivisionError):
        count_waits(lambda: 1 / 0, on_gpu=True)
    assert gpu.mode == "default" and count_waits(lambda: 1 / 0, on_gpu=False) is None


def test_memory_is_that_beyond_what_was_there(gpu):
    gpu.allocate(100)  # the rival, which is kept alive
    gpu.reserved = 150
    memory = Memory(on_gpu=True)
    gpu.allocate(40)
    gpu.allocate(500)  # a compiler tries something out, once
    gpu.allocate(-500)
    memory.restart()
    gpu.allocate(60)
    gpu.allocate(-60)
    gpu.reserved = 270
    assert memory.peak() == {"allocated_bytes": 100, "reserved_bytes": 120}
    assert Memory(on_gpu=False).peak() == {}


def test_the_sampler_asks_nvidia_smi_and_ends_it(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/bash\nwhile true; do echo '1980, 500.0'; sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with clocks.ClockSampler(on_gpu=True) as sampler:
        time.sleep(0.5)
    assert sampler.summary == {"sm_mhz_min": 1980, "sm_mhz_median": 1980, "watts_median": 500}
    assert sampler._process.poll() is not None
    with clocks.ClockSampler(on_gpu=False) as sampler:
        pass
    assert sampler.summary == {}
