"""Three of the four named times, measured in interleaved rounds; `first_call` is taken where the call is prepared.

| name | what it is |
| --- | --- |
| kernel_cold | device time with the L2 cache flushed before each call |
| kernel_warm | device time with the caches as the same call left them |
| op_eager | what a caller waits for: from an idle device to the result, dispatch included, on the wall clock |
| first_call | wall time of a row's first call: compilation and autotuning, unless an earlier row had done them |

Device times come from a pair of events around the call, and include the microsecond or two between an event and a
kernel, the same for all providers. Before the first event the device spins for as long as the host needs to enqueue
the call: the kernels then run back to back, and a slow host is not mistaken for a slow kernel. An op that waits for
the device inside cannot be enqueued ahead; its device time includes that wait, and the row says so (`waits`). On a
CPU only `op_eager` exists.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import torch

METHOD = 1
"""Version of what is written above. Results of another method are stale: their times mean something else."""

TIMES = {"cuda": ("kernel_cold", "kernel_warm", "op_eager"), "cpu": ("op_eager",)}
# With more, one busy neighbour on the machine makes every parallel region wait a scheduler's tick: times of
# 4, 8, 12 ms whatever the op costs. CPU times are there to exercise the harness, so steady beats quick.
CPU_THREADS = 1
SPIN_HZ = 2.0e9  # at least the SM clock: spinning a little longer than needed costs nothing
LONGEST_SPIN = 20e-3  # seconds; the launch queue is full long before
FEWEST_ROUNDS, MOST_ROUNDS = 15, 200
SLOW_ROUNDS = 9  # of a call so slow that more would eat the others' time; nobody asks how slow to the per cent

Function = Callable[[], object]


class Clock:
    """Samples of one device; a subclass for each kind."""

    names: tuple[str, ...]

    def sampler(self, name: str, call: Function) -> Callable[[], float]:
        """A function that takes one sample, in seconds, of the time called `name`."""
        assert name == "op_eager", name
        return lambda: self.op_eager(call)

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""

    def finish_stream(self) -> None:
        """Wait for the stream that calls are made on, which is all that events and autograd wait for."""

    def waits(self, call: Function) -> bool:
        """Whether PyTorch makes the host wait for the device inside the call."""
        return False

    def peak_memory(self, call: Function) -> int | None:
        """Bytes that a call allocates at its peak, beyond what was there; None where PyTorch does not count."""
        return None

    def op_eager(self, call: Function) -> float:
        """Seconds that a caller waits for the result."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


class CpuClock(Clock):
    """Wall clock only."""

    names = TIMES["cpu"]


class CudaClock(Clock):
    """Device events; `flush` bytes are overwritten to empty the L2 cache, twice what it holds."""

    names = TIMES["cuda"]

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(2 * max(cache, 32 * 2**20), dtype=torch.uint8, device="cuda")
        self._spins: dict[Function, int] = {}

    def synchronize(self) -> None:
        """Wait for every stream."""
        torch.cuda.synchronize()

    def finish_stream(self) -> None:
        """Wait for the current stream only."""
        torch.cuda.current_stream().synchronize()

    def sampler(self, name: str, call: Function) -> Callable[[], float]:
        """As `Clock.sampler`; measures first how long the host takes to enqueue the call."""
        if name == "op_eager":
            return super().sampler(name, call)
        spin = self._spin(call)
        before = self.flush.zero_ if name == "kernel_cold" else call
        return lambda: self._device_seconds(call, before, spin)

    def waits(self, call: Function) -> bool:
        """Ask PyTorch to raise an error instead of waiting."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchronizing" not in str(error):  # out of memory, say
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def peak_memory(self, call: Function) -> int:
        """What PyTorch's allocator handed out at most during the call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _spin(self, call: Function) -> int:
        """Clock cycles that the device has to be kept busy until the host has enqueued the call."""
        if call not in self._spins:
            seconds = []
            for _ in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            enough = min(2 * min(seconds) + 2e-4, LONGEST_SPIN)
            self._spins[call] = 0 if self.waits(call) else int(enough * SPIN_HZ)
        return self._spins[call]

    def _device_seconds(self, call: Function, before: Function, spin: int) -> float:
        """Seconds of a call on the device, with `before` run just ahead of the first event."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if spin:
            torch.cuda._sleep(spin)
        before()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_clock(device: str) -> Clock:
    """The clock for "cuda" or "cpu"."""
    return CudaClock() if device == "cuda" else CpuClock()


def time_calls(
    calls: Mapping[str, Function], clock: Clock, seconds: float, baselines: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Samples of every call under every name of the clock: `result[key][name]`, round by round; see `interleave`.

    Every name gets an equal share of `seconds`.
    """
    result: dict[str, dict[str, list[float]]] = {key: {} for key in calls}
    with steady():
        for name in clock.names:
            samplers = {key: clock.sampler(name, call) for key, call in calls.items()}
            for key, samples in interleave(samplers, seconds / len(clock.names), baselines).items():
                result[key][name] = samples
    return result


def left_running(call: Function, clock: Clock, repeats: int) -> float:
    """Seconds that the device works on after the stream of `repeats` calls has finished.

    Work on a stream that the caller's stream does not wait for escapes its events, and its results are not ready
    when the caller reads them.
    """
    clock.synchronize()
    for _ in range(repeats):
        call()
    clock.finish_stream()
    start = time.perf_counter()
    clock.synchronize()
    return time.perf_counter() - start


def interleave(
    samplers: Mapping[str, Callable[[], float]], seconds: float, baselines: Sequence[str] = ()
) -> dict[str, list[float]]:
    """One sample of each a round, in the order A B C, C B A, A B C, ...: drift of the clocks hits all alike.

    A sampler that is far slower than the quickest of `baselines` (of all, where none are named), and whose share of
    `seconds` is too short for `FEWEST_ROUNDS`, takes part in the first `SLOW_ROUNDS` only: it is nobody's rival.
    """
    costs = {key: min(_seconds_of(sample) for _ in range(2)) for key, sample in samplers.items()}  # warms up, too
    quickest = min((costs[key] for key in baselines or costs), default=0.0)
    affordable = max(seconds / max(len(samplers), 1) / FEWEST_ROUNDS, 5 * quickest)
    slow = {key for key, cost in costs.items() if cost > affordable}
    samples = {key: [] for key in samplers}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        taking_part = [key for key in samplers if done < SLOW_ROUNDS or key not in slow]
        for key in taking_part if done % 2 == 0 else reversed(taking_part):
            samples[key].append(samplers[key]())
    return samples


def _seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextmanager
def steady():  # noqa: ANN201
    """Few CPU threads and no garbage collection while times are taken."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(CPU_THREADS)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
