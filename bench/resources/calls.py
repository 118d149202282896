"""The op calls whose kernels are compiled: every op, dtype, layout and configuration that picks different code.

Sizes are a training step's where Triton specialises on them (an argument of 1 becomes a constant, a multiple of 16
lets it vectorise) and small elsewhere. The tensors are never read: they are not even filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import box_iou, label_anchors, mask_bce_loss, multiscale_roi_align, nms_mask, roi_align

IMAGES, CHANNELS, CLASSES, ANCHORS, OBJECTS, ROIS = 2, 256, 81, 268_569, 100, 2000
PYRAMID = ((200, 336), (100, 168), (50, 84), (25, 42))  # of 800 x 1344 pixels
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
BF16, FP16, FP32, FP64 = NAMES


@dataclass(frozen=True)
class Call:
    """An op call, forward and backward, and its name in the table."""

    name: str
    run: Callable[[], object]


def op_calls() -> Iterator[Call]:
    """Every call of the table."""
    for dtype, layout, size, sampling in (
        (BF16, "channels_last", 7, 2),
        (BF16, "channels_last", 14, 2),
        (FP16, "channels_last", 7, 2),
        (FP32, "channels_last", 7, 2),
        (FP32, "channels_last", 7, 0),
        (FP64, "nchw", 7, 2),
    ):
        yield _pool("multiscale_roi_align", dtype, layout, size, sampling)
    for dtype, layout, sampling in ((BF16, "channels_last", 2), (BF16, "nchw", 0), (FP32, "nchw", 0)):
        yield _pool("roi_align", dtype, layout, 7, sampling)
    for dtype in (FP32, BF16, FP64):
        yield Call(f"box_iou {NAMES[dtype]}", lambda dtype=dtype: _iou(dtype))
    for name, options in (
        ("label_anchors", {}),
        ("label_anchors without low-quality matches", {"allow_low_quality_matches": False}),
        ("label_anchors low_inclusive require_overlap", {"low_inclusive": True, "require_overlap": True}),
    ):
        yield Call(name, lambda options=options: _label(**options))
    # Five levels of 16 images in training, of one at inference; groups as small as the highest level's; the most.
    for groups, n in ((80, 2000), (5, 1000), (5, 200), (5, 4096)):
        yield Call(f"nms_mask {groups} x {n}", lambda groups=groups, n=n: _nms(groups, n))
    for dtype, layout, targets in (
        (BF16, "nchw", FP32),
        (BF16, "channels_last", FP32),
        (FP32, "nchw", torch.bool),
        (FP64, "nchw", FP64),
    ):
        name = f"mask_bce_loss {NAMES[dtype]} {layout}"
        yield Call(name, lambda d=dtype, lay=layout, t=targets: _mask(d, lay, t))


def _pool(op: str, dtype: torch.dtype, layout: str, size: int, sampling: int) -> Call:
    name = f"{op} {NAMES[dtype]} {layout} {size}x{size} {'adaptive' if sampling == 0 else f'{sampling}x{sampling}'}"

    def run() -> None:
        rois = torch.empty(16 * IMAGES, 5, dtype=FP64 if dtype == FP64 else FP32)
        if op == "roi_align":
            leaves = [_leaf((IMAGES, CHANNELS, *PYRAMID[2]), dtype, layout)]
            out = roi_align(leaves[0], rois, size, SCALES[2], sampling, backend="triton")
        else:
            leaves = [_leaf((IMAGES, CHANNELS, *extent), dtype, layout) for extent in PYRAMID]
            out = multiscale_roi_align(leaves, rois, size, SCALES, sampling, backend="triton")
        _backward(out, leaves)

    return Call(name, run)


def _iou(dtype: torch.dtype) -> None:
    leaves = [_leaf((IMAGES, ROIS, 4), dtype), _leaf((IMAGES, OBJECTS, 4), dtype)]
    _backward(box_iou(*leaves, backend="triton"), leaves)


def _label(**options: bool) -> None:
    objects, count = torch.empty(IMAGES, OBJECTS, 4), torch.zeros(IMAGES, dtype=torch.int32)
    label_anchors(torch.empty(ANCHORS, 4), objects, count, **options, backend="triton")


def _nms(groups: int, n: int) -> None:
    nms_mask(torch.empty(groups, n, 4), torch.empty(groups, n, dtype=torch.bool), 0.7, backend="triton")


def _mask(dtype: torch.dtype, layout: str, targets: torch.dtype) -> None:
    logits = _leaf((16 * IMAGES, CLASSES, 28, 28), dtype, layout)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    masks = torch.empty(len(logits), 28, 28, dtype=targets)
    _backward(mask_bce_loss(logits, labels, masks, backend="triton"), [logits])


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=memory_format).requires_grad_()


def _backward(out: Tensor, leaves: list[Tensor]) -> None:
    torch.autograd.grad(out, leaves, torch.empty_like(out))
