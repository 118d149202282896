"""The op calls whose kernels are compiled: every op, dtype, layout and configuration that picks different code.

Sizes are a training step's where Triton specialises on them (an argument of 1 becomes a constant, a multiple of 16
lets it vectorise) and small elsewhere. The tensors are never read: they are not even filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import (
    box_iou,
    joint_multiscale_roi_align,
    label_anchors,
    mask_bce_loss,
    multiscale_roi_align,
    nms_mask,
    roi_align,
)

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
    yield from _pool_calls()
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


def _pool_calls() -> Iterator[Call]:
    """RoIAlign: with few RoIs NCHW maps are read as they are, with many they are transposed first."""
    for dtype, layout, size, sampling in (
        (BF16, "channels_last", 7, 2),
        (BF16, "channels_last", 14, 2),
        (BF16, "channels_last", 7, 0),
        (FP16, "channels_last", 7, 2),
        (FP16, "channels_last", 14, 2),
        (FP32, "channels_last", 7, 2),
        (FP32, "channels_last", 14, 2),
        (FP32, "channels_last", 7, 0),
        (FP32, "channels_last", 7, 8),  # as many samples as nobody unrolls
        (BF16, "channels_last", 56, 2),
        (BF16, "nchw", 7, 2),
        (FP64, "nchw", 7, 2),
    ):
        yield _pool("multiscale_roi_align", dtype, layout, size, sampling)
    yield _pool("multiscale_roi_align", BF16, "nchw", 7, 2, "many RoIs", rois=1024)
    yield _pool("multiscale_roi_align", BF16, "channels_last", 7, 2, "64 channels", channels=64)
    to_nchw = {"memory_format": torch.contiguous_format}
    yield _pool("multiscale_roi_align", BF16, "channels_last", 7, 2, "to nchw", **to_nchw)
    for dtype in (BF16, FP32):
        yield _pool("multiscale_roi_align", dtype, "channels_last", 7, 2, "atomic", backward="atomic")
    yield _pool("joint_multiscale_roi_align", BF16, "channels_last", (7, 14), 2)
    for dtype, layout, sampling in ((BF16, "channels_last", 2), (BF16, "nchw", 0), (FP32, "nchw", 0)):
        yield _pool("roi_align", dtype, layout, 7, sampling)


def _pool(
    op: str,
    dtype: torch.dtype,
    layout: str,
    size: int | tuple[int, ...],
    sampling: int,
    note: str = "",
    channels: int = CHANNELS,
    rois: int = 16 * IMAGES,
    **options: object,
) -> Call:
    """A call of one of the RoI ops with `options`, which `note` describes; a joint one has several sizes."""
    sizes = size if isinstance(size, tuple) else (size,)
    words = [op, NAMES[dtype], layout, *(f"{s}x{s}" for s in sizes)]
    words += ["adaptive" if sampling == 0 else f"{sampling}x{sampling}", *note.split()]

    def run() -> None:
        boxes = [torch.empty(rois, 5, dtype=FP64 if dtype == FP64 else FP32) for _ in sizes]
        extents = PYRAMID[2:3] if op == "roi_align" else PYRAMID
        leaves = [_leaf((IMAGES, channels, *extent), dtype, layout) for extent in extents]
        if op == "roi_align":
            out = roi_align(leaves[0], boxes[0], size, SCALES[2], sampling, backend="triton", **options)
        elif op == "multiscale_roi_align":
            out = multiscale_roi_align(leaves, boxes[0], size, SCALES, sampling, backend="triton", **options)
        else:
            out = joint_multiscale_roi_align(leaves, boxes, sizes, SCALES, sampling, backend="triton", **options)
        _backward(out, leaves)

    return Call(" ".join(words), run)


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


def _backward(out: Tensor | list[Tensor], leaves: list[Tensor]) -> None:
    outs = [out] if isinstance(out, Tensor) else out
    torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])
