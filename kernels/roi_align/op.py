"""`roi_align`, `multiscale_roi_align` and the joint form: argument checks and the choice of backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor, pair
from ..layouts import is_channels_last, layout
from . import library, reference
from .launches import Pooling

BACKWARDS = ("auto", "gather", "atomic")


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backward: str = "auto",
    memory_format: torch.memory_format | None = None,
    backend: str = "auto",
) -> Tensor:
    """RoIAlign on one feature map; arguments and results are those of `torchvision.ops.roi_align`.

    Args:
        input: [B, C, H, W] features, fp16, bf16, fp32 or fp64, any strides; channels_last is the fastest.
        boxes: [K, 5] rows of (batch index, x1, y1, x2, y2), or a list of [L, 4] boxes, one tensor an image.
        output_size: bins (height, width), or one number for both.
        spatial_scale: feature cells a unit of box coordinates.
        sampling_ratio: samples a bin and axis; <= 0 takes ceil(RoI size / bins) for each RoI.
        aligned: shift by half a cell, as detectron2 does; without it RoIs are at least one cell wide and high.
        backward: how Triton's gradient is summed (other backends have their own ways). "gather": deterministic, bit
            for bit the same in every run; "atomic": in any order. "auto" is "gather", which is expected to be the
            faster too.
        memory_format: of the result, torch.channels_last or torch.contiguous_format; None takes the input's.
        backend: see `BACKENDS`. On a CPU "auto" is torchvision, which computes half types in fp32.

    Returns:
        [K, C, height, width] in the input's dtype. Coordinates and sums are fp32 (fp64 for fp64); autocast changes
        nothing. A box that is not finite gives zeros. No gradient flows to the boxes; there is no second derivative.
        Under `torch.use_deterministic_algorithms(True)` Triton's backward is "gather", whatever was asked for. Its
        products cannot skip what has no weight: inf or NaN in a map may reach more bins of the RoIs above it (half
        types), and in an incoming gradient more cells beside its RoI, than they would in torchvision.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or option.
        IndexError: a batch index out of range (CPU tensors; on a GPU such a RoI gives zeros).
    """
    check_tensor(input, "input", 4)
    rois = _rows(boxes, "boxes", len(input))
    options = ([float(spatial_scale)], sampling_ratio, aligned, 224, 4)
    return _pool([input], [rois], [output_size], *options, backward, memory_format, backend)[0]


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: int = 224,
    canonical_level: int = 4,
    *,
    backward: str = "auto",
    memory_format: torch.memory_format | None = None,
    backend: str = "auto",
) -> Tensor:
    """RoIAlign of each RoI on the pyramid level that fits its size, all levels in one launch.

    The level is that of torchvision's MultiScaleRoIAlign (Lin et al., FPN, arXiv:1612.03144, eq. 1):
    floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6), clamped to the levels there are; a box without
    positive area belongs to the lowest level.

    Args:
        features: L maps [B, C, H_l, W_l], finest first, of one dtype, batch size and number of channels.
        rois: [K, 5] rows of (batch index, x1, y1, x2, y2) in image pixels, batch indices in any order; or a list of
            [L, 4] boxes, one tensor an image.
        output_size, sampling_ratio, aligned, backward, memory_format, backend: as in `roi_align`.
        scales: L numbers, cells a pixel of each level, e.g. [1/4, 1/8, 1/16, 1/32].
        canonical_scale, canonical_level: a box of this side (pixels) belongs to the level of scale 2**-level.

    Returns:
        [K, C, height, width] in the features' dtype; precision, gradients and errors as `roi_align`.
    """
    scales = _check_pyramid(features, scales)
    rois = _rows(rois, "rois", len(features[0]))
    options = (scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    return _pool(list(features), [rois], [output_size], *options, backward, memory_format, backend)[0]


def joint_multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Sequence[Tensor | Sequence[Tensor]],
    output_sizes: Sequence[int | tuple[int, int]],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: int = 224,
    canonical_level: int = 4,
    *,
    backward: str = "auto",
    memory_format: torch.memory_format | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """`multiscale_roi_align` of several sets of RoIs on the same maps, e.g. those of a box head and of a mask head.

    The results are those of a call for each set. The gradient of the maps is written once for all sets, where separate
    calls would each write maps full of it for autograd to add.

    Args:
        features, scales, sampling_ratio, aligned, canonical_scale, canonical_level: as in `multiscale_roi_align`.
        rois: for each set a tensor [K_s, 5], or a list of [L, 4] boxes, one tensor an image.
        output_sizes: bins for each set.
        backward, memory_format, backend: as in `roi_align`.

    Returns:
        A tensor [K_s, C, height_s, width_s] for each set.
    """
    scales = _check_pyramid(features, scales)
    lists = isinstance(rois, Sequence) and isinstance(output_sizes, Sequence)
    if not lists or len(rois) == 0 or len(rois) != len(output_sizes):
        raise ValueError("rois and output_sizes must be lists of the same length, an entry for each set of RoIs")
    rois = [_rows(r, f"rois[{i}]", len(features[0])) for i, r in enumerate(rois)]
    options = (scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    return _pool(list(features), list(rois), output_sizes, *options, backward, memory_format, backend)


def _check_pyramid(features: Sequence[Tensor], scales: Sequence[float]) -> list[float]:
    """The scales, once they and the maps agree."""
    if not isinstance(features, Sequence) or len(features) == 0:
        raise ValueError("features must be a non-empty list of [B, C, H, W] tensors")
    if not isinstance(scales, Sequence) or len(features) != len(scales):
        scales = scales if isinstance(scales, Sequence) else [scales]
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
    return scales


def _pool(
    features: list[Tensor],
    rois: list[Tensor],
    output_sizes: Sequence[int | tuple[int, int]],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
    backward: str,
    memory_format: torch.memory_format | None,
    backend: str,
) -> list[Tensor]:
    """What all public ops do once their features, RoIs and scales are lists."""
    names = ["rois"] if len(rois) == 1 else [f"rois[{i}]" for i in range(len(rois))]
    for name, r in zip(names, rois, strict=True):
        check_tensor(r, name, 2, last=5)
    check_same_device(**dict(zip(names, rois, strict=True)), **{f"features[{i}]": f for i, f in enumerate(features)})
    sizes = tuple(pair(size, "output_size") for size in output_sizes)
    _check_options(features, scales, sampling_ratio, backward, memory_format)
    for name, r in zip(names, rois, strict=True):
        check_indices(r[:, 0], features[0].shape[0], f"batch indices ({name}[:, 0])")

    wide = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    rois = [r.detach().to(wide) for r in rois]  # no gradient flows to them, on any backend
    # The layout decides which algorithms the convolutions behind it use: it must not depend on the backend.
    memory_format = memory_format or layout(is_channels_last(features))
    backend = choose_backend(backend, rois[0], "roi_align", on_cpu="torchvision")
    options = (scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    if backend == "triton":
        pooling = Pooling(sizes, tuple(scales), *options[1:])
        return library.pool(features, rois, pooling, memory_format == torch.channels_last, backward == "atomic")
    one_set = _torchvision if backend == "torchvision" else _reference
    outs = [one_set(features, r, size, *options) for r, size in zip(rois, sizes, strict=True)]
    return [out.contiguous(memory_format=memory_format) for out in outs]


def _check_options(
    features: list[Tensor],
    scales: list[float],
    sampling_ratio: int,
    backward: str,
    memory_format: torch.memory_format | None,
) -> None:
    if not all(0 < s < math.inf for s in scales):
        raise ValueError(f"spatial_scale and scales must be positive and finite, got {scales}")
    if not isinstance(sampling_ratio, int):
        raise TypeError(f"sampling_ratio must be an integer, got {sampling_ratio!r}")
    if any(0 in f.shape[1:] for f in features):
        raise ValueError(f"features must not be empty, got shapes {[tuple(f.shape) for f in features]}")
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(BACKWARDS)}, got {backward!r}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be None, contiguous_format or channels_last, got {memory_format}")


def _reference(features: list[Tensor], rois: Tensor, size: tuple[int, int], *options: object) -> Tensor:
    with torch.autocast(rois.device.type, enabled=False):  # the dtypes are chosen already
        return reference.multiscale_roi_align(features, rois, size, *options)


def _rows(boxes: Tensor | Sequence[Tensor], name: str, images: int) -> Tensor:
    """[K, 5] rows as they are, or a list of [L, 4] boxes, one tensor an image, as such rows."""
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, Sequence) or len(boxes) == 0:
        raise TypeError(f"{name} must be a [K, 5] tensor or a list of [L, 4] tensors, one an image")
    if len(boxes) > images:
        raise ValueError(f"{name} holds boxes of {len(boxes)} images, the features are of {images}")
    for i, b in enumerate(boxes):
        check_tensor(b, f"{name}[{i}]", 2, last=4)
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
    # It reads outside its tensors for NaN, and never returns from an infinite RoI.
    finite = rois.isfinite().all(dim=1)
    rois = torch.where(finite[:, None], rois, F.pad(torch.zeros_like(rois[:, 1:]), (1, 0)))
    keep = finite[:, None, None, None]
    if len(features) == 1:
        return torch.where(keep, op(features[0], rois, size, scales[0], sampling_ratio, aligned), 0).to(dtype)
    levels = reference.assign_levels(rois, reference.level_thresholds(scales, canonical_scale, canonical_level))
    out = features[0].new_zeros(len(rois), features[0].shape[1], *size)
    for i, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        index = torch.where(levels == i)[0]
        out[index] = op(feature, rois[index], size, scale, sampling_ratio, aligned)
    return torch.where(keep, out, 0).to(dtype)
