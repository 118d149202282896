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
    AnchorGrid,
    MaskPool,
    batched_nms,
    box_iou,
    decode_proposals,
    generalized_box_iou,
    joint_multiscale_roi_align,
    label_anchors,
    label_grid_anchors,
    mask_bce_loss,
    mask_predictor_loss,
    mask_targets,
    multiscale_roi_align,
    nms_mask,
    paste_mask_crops,
    paste_masks,
    roi_align,
    rpn_loss,
    stable_topk,
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
        yield Call(f"generalized_box_iou {NAMES[dtype]}", lambda dtype=dtype: _iou(dtype, op=generalized_box_iou))
    # One matrix; stores of two numbers and of one.
    tall = torch.empty(ANCHORS, 4), torch.empty(OBJECTS, 4)
    yield Call(f"box_iou fp32 {ANCHORS} x {OBJECTS}", lambda: box_iou(*tall, backend="triton"))
    for m in (50, 37):
        yield Call(f"box_iou fp32 by {m}", lambda m=m: _iou(FP32, m))
    for name, options in (
        ("label_anchors", {}),
        ("label_anchors without low-quality matches", {"allow_low_quality_matches": False}),
        ("label_anchors low_inclusive require_overlap", {"low_inclusive": True, "require_overlap": True}),
    ):
        yield Call(name, lambda options=options: _label(**options))
    yield Call("label_anchors of each image, one threshold", _match)
    for name, per_cell in (("label_grid_anchors", 3), ("label_grid_anchors nine a cell", 9)):
        yield Call(name, lambda per_cell=per_cell: _label_grid(per_cell))
    # Five levels of 16 images in training, of one at inference; many boxes with scores.
    for groups, n in ((80, 2000), (5, 1000)):
        yield Call(f"nms_mask {groups} x {n}", lambda groups=groups, n=n: _nms(groups, n))
    yield Call("batched_nms 10000", lambda: _batched_nms(10_000))
    for dtype, layout, targets in (
        (BF16, "nchw", FP32),
        (BF16, "channels_last", FP32),
        (FP32, "nchw", torch.bool),
        (FP64, "nchw", FP64),
    ):
        name = f"mask_bce_loss {NAMES[dtype]} {layout}"
        yield Call(name, lambda d=dtype, lay=layout, t=targets: _mask(d, lay, t))
    for dtype, layout, relu in (
        (BF16, "channels_last", True),
        (BF16, "nchw", True),
        (FP32, "channels_last", False),
        (FP64, "channels_last", True),
    ):
        name = f"mask_predictor_loss {NAMES[dtype]} {layout}{' relu' if relu else ''}"
        yield Call(name, lambda d=dtype, lay=layout, r=relu: _predictor(d, lay, r))
    for size, style, packed in ((28, "torchvision", True), (56, "detectron2", False)):
        name = f"mask_targets {size}x{size} {style} of {'bits' if packed else 'bytes'}"
        yield Call(name, lambda n=size, s=style, p=packed: _targets(n, s, p))
    for dtype, given, beta in ((BF16, False, 1 / 9), (FP32, True, 0.0), (FP64, False, 1 / 9)):
        name = f"rpn_loss {NAMES[dtype]} {'given anchors' if given else 'grid'} beta {beta:.2g}"
        yield Call(name, lambda d=dtype, g=given, b=beta: _rpn_loss(d, g, b))
    for dtype in (BF16, FP32):
        yield Call(f"stable_topk {NAMES[dtype]} of a slice", lambda d=dtype: _topk(d))
    for dtype, given in ((BF16, False), (FP32, True)):
        name = f"decode_proposals {NAMES[dtype]} {'given anchors' if given else 'grid'}"
        yield Call(name, lambda d=dtype, g=given: _decode(d, g))
    # A mask a detection, of images whose rows are and are not of a multiple of 16 pixels.
    for dtype, width, threshold in ((FP32, 1333, 0.5), (BF16, 1344, 0.5), (FP32, 1333, None)):
        name = f"paste_masks {NAMES[dtype]} 800 x {width}{' values' if threshold is None else ''}"
        yield Call(name, lambda d=dtype, w=width, t=threshold: _paste(d, w, t))
    yield Call("paste_mask_crops fp32", _paste_crops)


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


def _iou(dtype: torch.dtype, m: int = OBJECTS, op: Callable[..., Tensor] = box_iou) -> None:
    leaves = [_leaf((IMAGES, ROIS, 4), dtype), _leaf((IMAGES, m, 4), dtype)]
    _backward(op(*leaves, backend="triton"), leaves)


def _label(**options: bool) -> None:
    objects, count = torch.empty(IMAGES, OBJECTS, 4), torch.zeros(IMAGES, dtype=torch.int32)
    label_anchors(torch.empty(ANCHORS, 4), objects, count, **options, backend="triton")


def _match() -> None:
    objects, count = torch.empty(IMAGES, OBJECTS, 4), torch.zeros(IMAGES, dtype=torch.int32)
    label_anchors(torch.empty(IMAGES, ROIS + OBJECTS, 4), objects, count, 0.5, 0.5, False, backend="triton")


def _label_grid(per_cell: int) -> None:
    strides = [(4 << level, 4 << level) for level in range(5)]
    grid = AnchorGrid(torch.empty(5, per_cell, 4), (*PYRAMID, (13, 21)), strides)
    label_grid_anchors(grid, torch.empty(IMAGES, OBJECTS, 4), torch.zeros(IMAGES, dtype=torch.int32), backend="triton")


def _nms(groups: int, n: int) -> None:
    nms_mask(torch.empty(groups, n, 4), torch.empty(groups, n, dtype=torch.bool), 0.7, backend="triton")


def _batched_nms(n: int) -> None:
    batched_nms(torch.empty(n, 4), torch.empty(n), torch.zeros(n, dtype=torch.int64), 0.5, backend="triton")


def _mask(dtype: torch.dtype, layout: str, targets: torch.dtype) -> None:
    logits = _leaf((16 * IMAGES, CLASSES, 28, 28), dtype, layout)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    masks = torch.empty(len(logits), 28, 28, dtype=targets)
    _backward(mask_bce_loss(logits, labels, masks, backend="triton"), [logits])


def _predictor(dtype: torch.dtype, layout: str, relu: bool) -> None:
    """As under autocast: the weight in fp32, and targets as mask_targets gives them."""
    wide = FP64 if dtype == FP64 else FP32
    features = _leaf((16 * IMAGES, CHANNELS, 28, 28), dtype, layout)
    leaves = [features, _leaf((CLASSES, CHANNELS), wide), _leaf((CLASSES,), wide)]
    labels, targets = torch.zeros(len(features), dtype=torch.int64), torch.empty(len(features), 28, 28)
    _backward(mask_predictor_loss(*leaves, labels, targets, relu=relu, backend="triton"), leaves)


def _targets(size: int, style: str, packed: bool) -> None:
    offset, sizes = torch.zeros(IMAGES, OBJECTS, dtype=torch.int64), torch.zeros(IMAGES, 2, dtype=torch.int64)
    extent = torch.zeros(IMAGES, OBJECTS, 4, dtype=torch.int32)
    pool = MaskPool(torch.zeros(1 << 16, dtype=torch.uint8), offset, extent, sizes, (800, 1344), packed)
    matched = torch.zeros(IMAGES, 128, dtype=torch.int64)
    mask_targets(pool, torch.empty(IMAGES, 128, 4), matched, size, style, backend="triton")


def _rpn_loss(dtype: torch.dtype, given: bool, beta: float) -> None:
    leaves = [_leaf((IMAGES, ANCHORS), dtype), _leaf((IMAGES, ANCHORS, 4), dtype)]
    objects, matched = torch.empty(IMAGES, OBJECTS, 4), torch.zeros(IMAGES, ANCHORS, dtype=torch.int32)
    index, drawn = torch.zeros(IMAGES, 256, dtype=torch.int64), torch.zeros(IMAGES, 256, dtype=torch.bool)
    losses = rpn_loss(*leaves, _anchors(given), objects, matched, index, drawn, drawn, beta, backend="triton")
    _backward(list(losses), leaves)


def _paste(dtype: torch.dtype, width: int, threshold: float | None) -> None:
    masks, boxes = torch.empty(OBJECTS, 28, 28, dtype=dtype), torch.empty(OBJECTS, 4)
    paste_masks(masks, boxes, (800, width), threshold, backend="triton")


def _paste_crops() -> None:
    windows = torch.tensor([[20, 30, 200, 150]]).expand(OBJECTS, 4)
    paste_mask_crops(
        torch.empty(OBJECTS, 28, 28), torch.empty(OBJECTS, 4), (800, 1333), windows=windows, backend="triton"
    )


def _topk(dtype: torch.dtype) -> None:
    stable_topk(torch.zeros(IMAGES, ANCHORS, dtype=dtype)[:, 201_600:252_000], ROIS, backend="triton")


def _decode(dtype: torch.dtype, given: bool) -> None:
    logits, deltas = torch.empty(IMAGES, ANCHORS, dtype=dtype), torch.empty(IMAGES, ANCHORS, 4, dtype=dtype)
    index, sizes = torch.zeros(IMAGES, ROIS, dtype=torch.int64), torch.zeros(IMAGES, 2, dtype=torch.int64)
    decode_proposals(logits, deltas, index, _anchors(given), sizes, backend="triton")


def _anchors(given: bool) -> Tensor | AnchorGrid:
    """Three a cell on P2..P6: as a grid, or as they are."""
    if given:
        return torch.empty(ANCHORS, 4)
    strides = ((4, 4), (8, 8), (16, 16), (32, 32), (61, 64))
    return AnchorGrid(torch.empty(5, 3, 4), (*PYRAMID, (13, 21)), strides)


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=memory_format).requires_grad_()


def _backward(out: Tensor | list[Tensor], leaves: list[Tensor]) -> None:
    outs = [out] if isinstance(out, Tensor) else out
    torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])
