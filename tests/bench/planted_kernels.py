"""Kernels with the faults that the resource gate is for. Compiled by the worker beside the ops' own, never run."""

import torch
import triton
import triton.language as tl

from bench.resources.calls import Call
from kernels.box_iou.kernel import box_iou_kernel
from kernels.runtime import launch

CPU = torch.device("cpu")


@triton.jit
def spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Holds BLOCK numbers in the registers of one warp until their sum is known."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x - tl.sum(x))


@triton.jit
def cas_kernel(x_ptr, BLOCK: tl.constexpr):
    """Adds in bf16, for which sm_80 has no atomic."""
    at = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + at, tl.full((BLOCK,), 1.0, tl.bfloat16), sem="relaxed")


@triton.jit
def fast_division_kernel(x_ptr, BLOCK: tl.constexpr):
    """Divides with `/`, which compiles to an approximation."""
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) / tl.load(x_ptr + at + BLOCK))


def spill() -> None:
    launch(spilling_kernel, (1,), torch.empty(1 << 14), torch.empty(1 << 14), BLOCK=1 << 14, num_warps=1, device=CPU)


def cas() -> None:
    launch(cas_kernel, (1,), torch.empty(1024, dtype=torch.bfloat16), BLOCK=1024, device=CPU)


def fast_division() -> None:
    launch(fast_division_kernel, (1,), torch.empty(2048), BLOCK=1024, device=CPU)


def contraction() -> None:
    boxes, iou = torch.empty(1, 64, 4), torch.empty(1, 64, 64)
    meta = {"BLOCK_N": 32, "BLOCK_M": 16, "NARROW": 4, "VECTOR": 4, "BATCHED": False, "GENERALIZED": False}
    launch(box_iou_kernel, (1, 1), boxes, boxes, iou, 64, 64, 4, **meta, enable_fp_fusion=True, device=CPU)


PLANTED = [Call(f"planted {f.__name__}", f) for f in (spill, cas, fast_division, contraction)]
