"""Triton microkernels for `ceilings`: nothing but reads, nothing but multiply-adds.

`tests/bench/test_ceilings.py` looks into their assembly: a loop that the compiler shortened would report a ceiling
that no machine has, and every % of roof would be too low.
"""

# ruff: noqa: ANN001, ANN201
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["iterations"])  # or every other number of them compiles anew
def read_kernel(
    source_ptr,  # [blocks * BLOCK] int32, 16-byte aligned
    sums_ptr,  # [programs] int32
    blocks,  # a power of two
    iterations,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
):
    """Reads `iterations * READS` blocks a program past L1, all programs side by side, around and around the source."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    block = tl.program_id(0)
    for _ in range(iterations):
        for _ in tl.static_range(READS):  # independent of each other: all in flight at once
            # .cg caches in L2 only. The address is never the same twice in a row, so that no read can be left out.
            total += tl.load(source_ptr + (block & (blocks - 1)) * BLOCK + lane, cache_modifier=".cg")
            block += tl.num_programs(0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["iterations"])  # or every other number of them compiles anew
def multiply_add_kernel(
    sums_ptr,  # [programs] fp32
    factor,
    term,
    iterations,
    CHAINS: tl.constexpr,  # a program: each is a value in a register of one lane
    STEPS: tl.constexpr,
):
    """Applies x -> factor * x + term to each chain, `iterations * STEPS` times."""
    x = tl.arange(0, CHAINS).to(tl.float32)
    for _ in range(iterations):
        for _ in tl.static_range(STEPS):
            x = tl.fma(x, factor, term)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x, 0))
