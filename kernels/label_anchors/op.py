"""`label_anchors` and `label_grid_anchors`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..anchors import MOST_ANCHORS, AnchorGrid, kernel_arguments
from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference


def label_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float = 0.7,
    low_threshold: float = 0.3,
    allow_low_quality_matches: bool = True,
    *,
    low_inclusive: bool = False,
    require_overlap: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Label anchors against each image's objects, bit-equal to torchvision's box_iou + Matcher.

    An anchor is positive where its best IoU is at least `high_threshold`, background where it is below
    `low_threshold`, else ignored. With `allow_low_quality_matches` every anchor whose IoU with some object
    *equals* that object's best one is positive too, matched to its own best object. Torchvision's edges hold: an
    object that overlaps no anchor at all makes every anchor positive (unless `require_overlap`); IoU 0/0 counts as
    positive; ties go to the first object. Thresholds are rounded to fp32, as PyTorch does to compare.

    The Triton kernels never form the [A, G] matrix. Where anchors that follow each other lie near each other they also
    pass over most of its pairs; the anchors of a feature pyramid do so best as an `AnchorGrid`: see
    `label_grid_anchors`. Autocast changes nothing: fp32 in, fp32 computed.

    Args:
        anchors: [A, 4] fp32 xyxy, shared by the images; or [B, A, 4], each image's own, such as proposals. At most
            16,777,216 an image.
        gt_boxes: [B, G, 4] fp32 xyxy, padded; a box that is not finite is no object (torchvision would make every
            anchor positive).
        gt_count: [B] integers: slots 0..count-1 hold boxes. Clamped to G.
        high_threshold, low_threshold: with 0 <= low <= high.
        low_inclusive: an IoU of exactly `low_threshold` is background, not ignored (some implementations write
            "IoU <= 0.3"); where both thresholds are one number it is positive either way.
        require_overlap: the low-quality rule holds only for objects whose best IoU is above 0, as in NVIDIA's Mask
            R-CNN of DeepLearningExamples; torchvision and detectron2 do without.
        backend: see `BACKENDS`. On a CPU "auto" is the PyTorch reference.

    Returns:
        labels int8 [B, A] in {1 positive, 0 background, -1 ignored}, and matched_idx int32 [B, A], a positive anchor's
        object, the one with the best IoU; 0 where the label is not 1.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, too many anchors, or thresholds out of order.
    """
    if isinstance(anchors, AnchorGrid):
        raise TypeError("anchors must be a tensor, got an AnchorGrid: use label_grid_anchors")
    options = (high_threshold, low_threshold, allow_low_quality_matches, low_inclusive, require_overlap)
    if not isinstance(anchors, Tensor) or anchors.ndim != 3:
        check_tensor(anchors, "anchors", 2, last=4)
        _check(anchors, len(anchors), gt_boxes, gt_count, *options[:2])
        return _run(anchors, gt_boxes, gt_count, options, backend)
    check_tensor(anchors, "anchors", 3, last=4)
    _check(anchors, anchors.shape[1], gt_boxes, gt_count, *options[:2])
    if len(anchors) != len(gt_boxes):
        raise ValueError(f"batch sizes differ: anchors {tuple(anchors.shape)}, gt_boxes {tuple(gt_boxes.shape)}")
    return _run(anchors, gt_boxes, gt_count, options, backend)


def label_grid_anchors(
    grid: AnchorGrid,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float = 0.7,
    low_threshold: float = 0.3,
    allow_low_quality_matches: bool = True,
    *,
    low_inclusive: bool = False,
    require_overlap: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`label_anchors` for the anchors of a feature pyramid, which the Triton kernels make up as they go.

    What comes out is bit-equal to `label_anchors(grid.anchors(), ...)`. It is faster: no anchor is loaded, a tile of
    anchors is a square of cells, which few objects reach, and an object's best IoU is searched only where it can be.

    Args:
        grid: the pyramid's cells; see `AnchorGrid`. At most 16,777,216 anchors.
        gt_boxes, gt_count, high_threshold, low_threshold, allow_low_quality_matches, low_inclusive, require_overlap,
            backend: as for `label_anchors`.

    Returns:
        labels int8 [B, A] and matched_idx int32 [B, A], anchors in the order of `grid.anchors()`.

    Raises:
        TypeError, ValueError: as `label_anchors`.
    """
    if not isinstance(grid, AnchorGrid):
        raise TypeError(f"grid must be an AnchorGrid, got {type(grid).__name__}; for a tensor use label_anchors")
    _check(grid.cells, len(grid), gt_boxes, gt_count, high_threshold, low_threshold)
    options = (high_threshold, low_threshold, allow_low_quality_matches, low_inclusive, require_overlap)
    return _run(grid, gt_boxes, gt_count, options, backend)


def _check(anchors: Tensor, number: int, gt_boxes: Tensor, gt_count: Tensor, high: float, low: float) -> None:
    check_tensor(gt_boxes, "gt_boxes", 3, last=4)
    if anchors.dtype != torch.float32 or gt_boxes.dtype != torch.float32:
        raise TypeError(f"anchors and gt_boxes must be float32, got {anchors.dtype} and {gt_boxes.dtype}")
    if not isinstance(gt_count, Tensor) or gt_count.dtype not in (torch.int32, torch.int64):
        got = gt_count.dtype if isinstance(gt_count, Tensor) else type(gt_count).__name__
        raise TypeError(f"gt_count must be an int32 or int64 tensor, the number of boxes of each image, got {got}")
    if gt_count.shape != gt_boxes.shape[:1]:
        raise ValueError(f"gt_count must have shape [{gt_boxes.shape[0]}], got {tuple(gt_count.shape)}")
    check_same_device(anchors=anchors, gt_boxes=gt_boxes, gt_count=gt_count)
    for name, value in (("high_threshold", high), ("low_threshold", low)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= low <= high:
        raise ValueError(f"thresholds must be 0 <= low <= high, got low_threshold {low} and high_threshold {high}")
    if number > MOST_ANCHORS:
        raise ValueError(f"at most {MOST_ANCHORS} anchors an image, got {number}")


def _run(
    anchors: Tensor | AnchorGrid, gt_boxes: Tensor, gt_count: Tensor, options: tuple, backend: str
) -> tuple[Tensor, Tensor]:
    backend = choose_backend(backend, gt_boxes, "label_anchors")
    high, low, *flags = options
    arguments = (gt_boxes, gt_count, float(high), float(low), *flags)
    is_grid = isinstance(anchors, AnchorGrid)
    if backend == "triton":
        labels, matched_idx, _ = _label_grid(*anchors.flat(), *arguments) if is_grid else _label(anchors, *arguments)
        return labels, matched_idx
    anchors = anchors.anchors() if is_grid else anchors
    anchors = anchors.expand(len(gt_boxes), -1, -1) if anchors.ndim == 2 else anchors
    return (_torchvision if backend == "torchvision" else reference.label_anchors)(anchors, *arguments)


def _torchvision(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high: float,
    low: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor]:
    """The way torchvision's RPN does it: an image at a time, the whole matrix, then Matcher."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    if low_inclusive:  # Matcher's background is `iou < low`, in fp32: the next number lets `low` itself in
        low = min(float(np.nextafter(np.float32(low), np.float32(np.inf))), high)
    matcher = Matcher(high, low, allow_low_quality_matches=low_quality and not require_overlap)
    claimer = Matcher(high, low, allow_low_quality_matches=True)
    labels = torch.zeros(anchors.shape[:2], dtype=torch.int8, device=anchors.device)
    matched_idx = torch.zeros_like(labels, dtype=torch.int32)
    for i, (boxes, count) in enumerate(zip(gt_boxes, gt_count.tolist(), strict=True)):
        boxes = boxes[:count]
        finite = boxes.isfinite().all(dim=1).nonzero().squeeze(1)
        if len(finite) == 0 or anchors.shape[1] == 0:
            continue  # Matcher refuses an empty matrix; everything is background
        iou = box_iou(boxes[finite], anchors[i])
        match = matcher(iou)
        labels[i] = torch.where(match >= 0, 1, torch.where(match == Matcher.BETWEEN_THRESHOLDS, -1, 0)).to(torch.int8)
        if low_quality and require_overlap:
            overlapping = iou[iou.amax(dim=1) > 0]
            if len(overlapping) > 0:
                labels[i][claimer(overlapping) >= 0] = 1
        matched_idx[i] = torch.where(labels[i] == 1, finite[iou.max(dim=0).indices], 0)
    return labels, matched_idx


def _tile_shape(extents: list[int], per_cell: int) -> tuple[int, int]:
    """Height (cells) and width (anchors) of a grid's tiles: a small square has few GTs near it."""
    height = min(next_power_of_2(max(extents[::2])), tile(16, 64))
    return height, min(next_power_of_2(max(extents[1::2]) * per_cell), tile(512, 1 << 16) // height)


def _blocks(num_gt: int) -> int:
    """GTs that a tile looks at together: most images in one go, one a thread. Of few sizes: each is compiled apart."""
    return min(max(next_power_of_2(num_gt), 32), tile(128, 4096))


@torch.library.custom_op(f"{NAMESPACE}::label_grid_anchors", mutates_args=())
def _label_grid(
    cells: Tensor,
    extents: list[int],
    strides: list[int],
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, matches, and (with `low_quality`) each GT's best IoU [B, G]; the grid flat."""
    from .kernel import label_anchors_kernel
    from .kernel_best import best_iou_with_grid_kernel

    labels, matched_idx, best_of_gt = _outputs(gt_boxes, _grid_size(cells, extents), low_quality)
    (batch, num_anchors), num_gt = labels.shape, gt_boxes.shape[1]
    if num_anchors == 0:
        return labels, matched_idx, best_of_gt.zero_()
    cells, per_cell, *grid = kernel_arguments(cells, extents, strides)
    gt_boxes, gt_count = gt_boxes.contiguous(), gt_count.to(torch.int32).contiguous()
    height, width = _tile_shape(extents, per_cell)
    shape = {"PER_CELL": per_cell, "TILE_H": height, "TILE_W": width}
    if low_quality:
        launch(
            best_iou_with_grid_kernel, (num_gt, batch), cells, gt_boxes, gt_count, best_of_gt, num_gt, *grid,
            CELLS=next_power_of_2(len(cells) * per_cell), **shape | {"TILE_H": min(height, tile(8, 64))},
            device=cells.device,
        )  # fmt: skip
    levels = zip(extents[::2], extents[1::2], strict=True)
    tiles = sum(-(-rows // height) * -(-columns * per_cell // width) for rows, columns in levels)
    launch(
        label_anchors_kernel, (tiles, batch), cells, gt_boxes, gt_count, best_of_gt, labels, matched_idx,
        0, num_anchors, num_gt, *grid, high_threshold, low_threshold,
        LOW_QUALITY=low_quality, LOW_INCLUSIVE=low_inclusive, REQUIRE_OVERLAP=require_overlap and low_quality,
        BLOCK_G=_blocks(num_gt), **shape, device=cells.device,
    )  # fmt: skip
    return labels, matched_idx, best_of_gt


@_label_grid.register_fake
def _(
    cells: Tensor, extents: list[int], strides: list[int], gt_boxes: Tensor, gt_count: Tensor, high: float, low: float,
    low_quality: bool, *flags: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(gt_boxes, _grid_size(cells, extents), low_quality)


@torch.library.custom_op(f"{NAMESPACE}::label_anchors", mutates_args=())
def _label(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, matches, and (with `low_quality`) each GT's best IoU [B, G]; anchors [A, 4] or [B, A, 4]."""
    from .kernel import label_anchors_kernel
    from .kernel_best import best_iou_with_anchors_kernel

    labels, matched_idx, best_of_gt = _outputs(gt_boxes, anchors.shape[-2], low_quality)
    (batch, num_anchors), num_gt = labels.shape, gt_boxes.shape[1]
    anchors, gt_boxes = anchors.contiguous(), gt_boxes.contiguous()
    gt_count = gt_count.to(torch.int32).contiguous()
    anchors_stride = num_anchors * 4 if anchors.ndim == 3 else 0
    width, block_g = min(next_power_of_2(num_anchors), tile(512, 1 << 16)), _blocks(num_gt)
    grid = (-(-num_anchors // width), batch)
    if low_quality:
        best_of_gt.zero_()
        launch(
            best_iou_with_anchors_kernel, grid if num_gt else (0,), anchors, gt_boxes, gt_count,
            best_of_gt.view(torch.int32), anchors_stride, num_anchors, num_gt,
            TILE_W=width, BLOCK_G=block_g, device=anchors.device,
        )  # fmt: skip
    launch(
        label_anchors_kernel, grid, anchors, gt_boxes, gt_count, best_of_gt, labels, matched_idx,
        anchors_stride, num_anchors, num_gt, (), (), (), (), high_threshold, low_threshold,
        LOW_QUALITY=low_quality, LOW_INCLUSIVE=low_inclusive, REQUIRE_OVERLAP=require_overlap and low_quality,
        BLOCK_G=block_g, PER_CELL=0, TILE_H=1, TILE_W=width, device=anchors.device,
    )  # fmt: skip
    return labels, matched_idx, best_of_gt


@_label.register_fake
def _(
    anchors: Tensor, gt_boxes: Tensor, gt_count: Tensor, high: float, low: float, low_quality: bool, *flags: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(gt_boxes, anchors.shape[-2], low_quality)


def _grid_size(cells: Tensor, extents: list[int]) -> int:
    return sum(rows * columns for rows, columns in zip(extents[::2], extents[1::2], strict=True)) * cells.shape[1]


def _outputs(gt_boxes: Tensor, num_anchors: int, low_quality: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled; without the low-quality rule nobody asks for a GT's best IoU."""
    batch, num_gt = gt_boxes.shape[:2]
    labels = gt_boxes.new_empty(batch, num_anchors, dtype=torch.int8)
    matched_idx = gt_boxes.new_empty(batch, num_anchors, dtype=torch.int32)
    return labels, matched_idx, gt_boxes.new_empty(batch, num_gt if low_quality else 0)
