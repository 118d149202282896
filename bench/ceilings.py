"""What the GPU at hand can do at most: bytes and instructions a second, measured in the same run as the ops.

Datasheets promise what no program reaches, and clocks differ from machine to machine. Each ceiling is the best of
several ways to reach it, each way the median of its samples: a ceiling too low would put good kernels above 100 %.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from kernels.runtime import HAS_TRITON, INTERPRETED, next_power_of_2

SAMPLES, WARM_UP_SECONDS = 15, 0.05  # of every way
BUFFER_WORDS = 1 << 29  # int32, 2 GiB: 40 times the L2, so that what stays in there from call to call hardly counts
L2_BYTES_READ = 1 << 32  # a call, about a millisecond
MULTIPLY_ADD_ITERATIONS = 500  # a call, about a millisecond with 64 warps an SM
MATMUL_SIDE = 8192

# Ways to launch the microkernels: (constants, warps, programs an SM); 64 warps are all that an SM holds.
READS = [
    ({"BLOCK": 512, "READS": 8}, 4, 8),
    ({"BLOCK": 512, "READS": 8}, 4, 16),
    ({"BLOCK": 1024, "READS": 8}, 8, 4),
    ({"BLOCK": 1024, "READS": 8}, 8, 8),
]
MULTIPLY_ADDS = [
    ({"CHAINS": 1024, "STEPS": 32}, 4, 8),
    ({"CHAINS": 1024, "STEPS": 32}, 4, 16),
    ({"CHAINS": 2048, "STEPS": 16}, 4, 8),
]


@dataclass(frozen=True)
class Ceilings:
    """Rates of one GPU at its clocks of the moment."""

    dram_copy_bytes_per_s: float  # bytes read + bytes written
    dram_read_bytes_per_s: float
    dram_write_bytes_per_s: float
    l2_bytes_per_s: float  # read by the SMs, past L1
    issue_per_s: float  # warp instructions (32 lanes) of FP32 arithmetic, all SMs together
    matmul_bf16_flops_per_s: float
    l2_bytes: int  # its size

    @property
    def dram_bytes_per_s(self) -> float:
        """The best of copying, reading and writing: nothing moves bytes faster."""
        return max(self.dram_copy_bytes_per_s, self.dram_read_bytes_per_s, self.dram_write_bytes_per_s)

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, float]) -> Ceilings:
        """The inverse of `to_dict`; unknown keys are ignored, a missing one raises KeyError."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def measure_ceilings() -> Ceilings:
    """Measure the current CUDA device: a few seconds, 4.5 GiB of its memory.

    Raises:
        RuntimeError: without a CUDA GPU, or where Triton is missing or interprets its kernels.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("ceilings are those of a GPU: no CUDA device is available")
    if not HAS_TRITON or INTERPRETED:
        raise RuntimeError("measuring ceilings needs Triton's compiler: install triton, unset TRITON_INTERPRET")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    matmul = _matmul_flops_per_s()  # first: it brings the clocks up
    l2_bytes = properties.L2_cache_size
    issue = _issue_per_s(properties.multi_processor_count)
    source = torch.empty(BUFFER_WORDS, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    return Ceilings(
        dram_copy_bytes_per_s=2 * size / _seconds(lambda: target.copy_(source)),
        dram_read_bytes_per_s=_read_bytes_per_s(source, size, properties.multi_processor_count),
        dram_write_bytes_per_s=size / min(_seconds(target.zero_), _seconds(lambda: target.fill_(0x5A5A5A5A))),
        l2_bytes_per_s=_l2_bytes_per_s(source, l2_bytes, properties.multi_processor_count),
        issue_per_s=issue,
        matmul_bf16_flops_per_s=matmul,
        l2_bytes=l2_bytes,
    )


def _seconds(call: Callable[[], object]) -> float:
    """Median device time of a call of about a millisecond, warmed up."""
    call()  # may compile
    until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < until:
        call()
        torch.cuda.synchronize()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(SAMPLES)]
    for start, end in pairs:  # queued without waiting, so that the GPU never waits for the host
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _read_bytes_per_s(source: Tensor, bytes_a_call: int, sms: int) -> float:
    """Best rate of reading about `bytes_a_call` from `source`, around and around: L2's if it fits there, or DRAM's."""
    from .ceiling_kernels import read_kernel

    best = 0.0
    for constants, warps, programs_an_sm in READS:
        grid = sms * programs_an_sm
        iteration = grid * constants["BLOCK"] * constants["READS"] * source.element_size()
        iterations = max(1, bytes_a_call // iteration)  # rounded down: nothing is read twice in one pass over DRAM
        sums = source.new_empty(grid)
        arguments = (source, sums, source.numel() // constants["BLOCK"], iterations)
        best = max(best, iterations * iteration / _seconds(_launch(read_kernel, grid, arguments, constants, warps)))
    return best


def _l2_bytes_per_s(buffer: Tensor, l2_bytes: int, sms: int) -> float:
    """Best rate of reading the first part of `buffer`, a sixth to a third of the L2 or half of that."""
    # Well below its size: each half of a big L2 may keep its own copy of a line.
    words = next_power_of_2(l2_bytes // 3 // buffer.element_size() + 1) // 2
    return max(_read_bytes_per_s(buffer[:part], L2_BYTES_READ, sms) for part in (words, words // 2))


def _issue_per_s(sms: int) -> float:
    """Best rate of multiply-adds that depend on nothing but registers, as instructions of a warp."""
    from .ceiling_kernels import multiply_add_kernel

    best = 0.0
    for constants, warps, programs_an_sm in MULTIPLY_ADDS:
        grid = sms * programs_an_sm
        instructions = grid * MULTIPLY_ADD_ITERATIONS * constants["CHAINS"] * constants["STEPS"] // 32
        sums = torch.empty(grid, device="cuda")
        arguments = (sums, 0.999, 0.5, MULTIPLY_ADD_ITERATIONS)  # factor, term: the values stay below 2000
        best = max(best, instructions / _seconds(_launch(multiply_add_kernel, grid, arguments, constants, warps)))
    return best


def _launch(kernel: object, grid: int, arguments: tuple, constants: dict[str, int], warps: int) -> Callable[[], object]:
    # Not through kernels.launch, whose counters are about the ops.
    return lambda: kernel[(grid,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def _matmul_flops_per_s() -> float:
    """Tensor cores on random numbers: with zeros they draw less power and run faster."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * MATMUL_SIDE**3 / _seconds(lambda: torch.matmul(a, b, out=out))
