"""`roi_align` and `multiscale_roi_align`: argument checks and the choice of backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor, pair
from . import reference
from .library import is_channels_last, memory_format, roi_align_forward


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """RoIAlign on one feature map; arguments and results are those of `torchvision.ops.roi_align`.

    Args:
        input: [B, C, H, W] features, fp16, bf16, fp32 or fp64, any strides (contiguous, channels_last, ...).
        boxes: [K, 5] rows of (batch index, x1, y1, x2, y2), or a list of [L, 4] boxes, one tensor an image.
        output_size: bins (height, width), or one number for both.
        spatial_scale: feature cells a unit of box coordinates.
        sampling_ratio: samples a bin and axis; <= 0 takes ceil(RoI size / bins) for each RoI.
        aligned: shift by half a cell, as detectron2 does; without it RoIs are at least one cell wide and high.
        backend: see `BACKENDS`. On a CPU "auto" is torchvision, which computes half types in fp32.

    Returns:
        [K, C, height, width] in the input's dtype, channels_last where the input is (torchvision's backend always
        returns contiguous results). Coordinates and sums are fp32 (fp64 for fp64); autocast changes nothing. No
        gradient flows to the boxes; there is no second derivative. The Triton backward adds with atomics: on a GPU its
        sums can differ in the last bit from run to run, so under `torch.use_deterministic_algorithms(True)` "auto" is
        the PyTorch reference there.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        IndexError: a batch index out of range (CPU tensors; on a GPU such a RoI gives zeros).
    """
    check_tensor(input, "input", 4)
    rois = boxes if isinstance(boxes, Tensor) else _rois_from_list(boxes)
    return _pool([input], rois, output_size, [float(spatial_scale)], sampling_ratio, aligned, 224, 4, backend)


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: int = 224,
    canonical_level: int = 4,
    *,
    backend: str = "auto",
) -> Tensor:
    """RoIAlign of each RoI on the pyramid level that fits its size, all levels in one launch.

    The level is that of torchvision's MultiScaleRoIAlign (Lin et al., FPN, arXiv:1612.03144, eq. 1):
    floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6), clamped to the levels there are; a box without
    positive area belongs to the lowest level.

    Args:
        features: L maps [B, C, H_l, W_l], finest first, of one dtype, batch size and number of channels.
        rois: [K, 5] rows of (batch index, x1, y1, x2, y2) in image pixels; batch indices in any order.
        output_size, sampling_ratio, aligned, backend: as in `roi_align`.
        scales: L numbers, cells a pixel of each level, e.g. [1/4, 1/8, 1/16, 1/32].
        canonical_scale, canonical_level: a box of this side (pixels) belongs to the level of scale 2**-level.

    Returns:
        [K, C, height, width] in the features' dtype; precision, gradients and errors as `roi_align`.
    """
    if not isinstance(features, Sequence) or len(features) == 0:
        raise ValueError("features must be a non-empty list of [B, C, H, W] tensors")
    if len(features) != len(scales):
        raise ValueError(f"{len(features)} feature maps but {len(scales)} scales: give one scale a map")
    for i, feature in enumerate(features):
        check_tensor(feature, f"features[{i}]", 4)
        if feature.shape[:2] != features[0].shape[:2] or feature.dtype != features[0].dtype:
            raise ValueError(
                "all feature maps must share batch size, channels and dtype, got "
                + ", ".join(f"{tuple(f.shape)} {f.dtype}" for f in features)
            )
    scales = [float(s) for s in scales]
    if not all(abs(fine / coarse - 2) < 1e-6 for fine, coarse in pairwise(scales) if coarse):
        raise ValueError(f"each scale must be half the one before it, got {scales}")
    return _pool(
        list(features), rois, output_size, scales, sampling_ratio, aligned, canonical_scale, canonical_level, backend
    )


def _pool(
    features: list[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
    backend: str,
) -> Tensor:
    """What both public ops do once their features and scales are lists."""
    check_tensor(rois, "rois", 2, last=5)
    check_same_device(rois=rois, **{f"features[{i}]": f for i, f in enumerate(features)})
    size = pair(output_size, "output_size")
    if not all(0 < s < math.inf for s in scales):
        raise ValueError(f"spatial_scale and scales must be positive and finite, got {scales}")
    if not isinstance(sampling_ratio, int):
        raise TypeError(f"sampling_ratio must be an integer, got {sampling_ratio!r}")
    if any(0 in f.shape[1:] for f in features):
        raise ValueError(f"features must not be empty, got shapes {[tuple(f.shape) for f in features]}")
    check_indices(rois[:, 0], features[0].shape[0], "batch indices (rois[:, 0])")

    dtype = features[0].dtype
    rois = rois.to(torch.float64 if dtype == torch.float64 else torch.float32)
    # Triton's backward adds with atomics, in any order: not where the result has to be reproducible.
    atomics = torch.is_grad_enabled() and any(f.requires_grad for f in features)
    on_gpu = "torch" if atomics and torch.are_deterministic_algorithms_enabled() else "triton"
    backend = choose_backend(backend, rois, on_cpu="torchvision", on_gpu=on_gpu)
    options = (scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    if backend == "triton":
        if any(f[0].numel() >= 2**31 for f in features if len(f)):
            raise ValueError("backend='triton' takes maps of less than 2**31 elements an image; use backend='torch'")
        return roi_align_forward(features, rois, *size, *options)
    if backend == "torchvision":
        return _torchvision(features, rois, size, *options)
    with torch.autocast(rois.device.type, enabled=False):  # the dtypes are chosen already
        out = reference.multiscale_roi_align(features, rois, size, *options)
    # The layout decides which algorithms the convolutions behind it use: it must not depend on the backend.
    return out.contiguous(memory_format=memory_format(is_channels_last(features)))


def _rois_from_list(boxes: Sequence[Tensor]) -> Tensor:
    if not isinstance(boxes, Sequence) or len(boxes) == 0:
        raise TypeError("boxes must be a [K, 5] tensor or a list of [L, 4] tensors, one an image")
    for i, b in enumerate(boxes):
        check_tensor(b, f"boxes[{i}]", 2, last=4)
    return torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], dim=1) for i, b in enumerate(boxes)])


def _torchvision(
    features: list[Tensor],
    rois: Tensor,
    size: tuple[int, int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    """torchvision's op on each level in turn, as its MultiScaleRoIAlign does."""
    from torchvision.ops import roi_align as op

    # torchvision computes coordinates in the features' dtype, and fp16 is half a pixel coarse at 512: not in halves.
    dtype, features = features[0].dtype, [f.to(rois.dtype) for f in features]
    if len(features) == 1:
        return op(features[0], rois, size, scales[0], sampling_ratio, aligned).to(dtype)
    levels = reference.assign_levels(rois, reference.level_thresholds(scales, canonical_scale, canonical_level))
    out = features[0].new_zeros(len(rois), features[0].shape[1], *size)
    for i, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        index = torch.where(levels == i)[0]
        out[index] = op(feature, rois[index], size, scale, sampling_ratio, aligned)
    return out.to(dtype)
