"""`roi_align` and `multiscale_roi_align`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor, pair
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference


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
        backend: see `BACKENDS`. On a CPU "auto" is torchvision, or PyTorch for bf16, which torchvision lacks.

    Returns:
        [K, C, height, width] in the input's dtype, channels_last where the input is (torchvision's backend always
        returns contiguous results). Coordinates and sums are fp32 (fp64 for fp64). No gradient flows to the boxes;
        there is no second derivative. The Triton backward adds with atomics: on a GPU its sums can differ in the last
        bit from run to run, so under `torch.use_deterministic_algorithms(True)` "auto" is the PyTorch reference there.

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
    if any(b >= a for a, b in pairwise(scales)):
        raise ValueError(f"scales must decrease from level to level, got {scales}")
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
    if scales[0] <= 0:
        raise ValueError(f"spatial_scale must be positive, got {scales[0]}")
    if any(0 in f.shape[1:] for f in features):
        raise ValueError(f"features must not be empty, got shapes {[tuple(f.shape) for f in features]}")
    check_indices(rois[:, 0], features[0].shape[0], "batch indices (rois[:, 0])")

    dtype = features[0].dtype
    rois = rois.to(torch.float64 if dtype == torch.float64 else torch.float32)
    backend = choose_backend(
        _deterministic(backend, features), rois, on_cpu="torch" if dtype == torch.bfloat16 else "torchvision"
    )
    options = (scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    if backend == "triton":
        return _forward(features, rois, *size, *options)
    if backend == "torchvision":
        return _torchvision(features, rois, size, *options)
    out = reference.multiscale_roi_align(features, rois, size, *options)
    # The layout decides which algorithms the convolutions behind it use: it must not depend on the backend.
    return out.contiguous(memory_format=_layout(_is_channels_last(features)))


def _deterministic(backend: str, features: list[Tensor]) -> str:
    """Turn "auto" into "torch" where the result has to be reproducible and atomics would not be."""
    atomics = features[0].is_cuda and torch.is_grad_enabled() and any(f.requires_grad for f in features)
    return "torch" if backend == "auto" and atomics and torch.are_deterministic_algorithms_enabled() else backend


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

    levels = reference.assign_levels(rois, reference.level_thresholds(scales, canonical_scale, canonical_level))
    rois = rois.to(features[0].dtype)  # torchvision wants one dtype
    if len(features) == 1:
        return op(features[0], rois, size, scales[0], sampling_ratio, aligned)
    pooled = [
        op(f, rois[levels == i], size, s, sampling_ratio, aligned)
        for i, (f, s) in enumerate(zip(features, scales, strict=True))
    ]
    # Under autocast torchvision returns fp32 whatever went in, so the results decide the dtype.
    out = pooled[0].new_zeros(len(rois), *pooled[0].shape[1:])
    for i, p in enumerate(pooled):
        out[levels == i] = p
    return out


def _constants(
    shape: Sequence[int],
    channels_last: bool,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> dict:
    """The compile-time constants that forward and backward share, for an output [K, C, ph, pw]."""
    return {
        "SCALES": tuple(scales),
        "THRESHOLDS": tuple(reference.level_thresholds(scales, canonical_scale, canonical_level)),
        "LEVELS": len(scales),
        "POOLED_H": shape[2],
        "POOLED_W": shape[3],
        "SAMPLING_RATIO": max(sampling_ratio, 0),
        "ALIGNED": aligned,
        "CHANNELS_LAST": channels_last,
        "BLOCK_BINS": min(next_power_of_2(shape[2] * shape[3]), tile(8, 1024)),
        "BLOCK_C": min(next_power_of_2(shape[1]), tile(128, 1024)),
    }


def _grid(shape: Sequence[int], constants: dict) -> tuple[int, int, int]:
    return (
        shape[0],
        -(-shape[2] * shape[3] // constants["BLOCK_BINS"]),
        -(-shape[1] // constants["BLOCK_C"]),
    )


def _is_channels_last(features: Sequence[Tensor]) -> bool:
    """One layout serves all levels; a single channel is both, and counts as contiguous."""
    return features[0].shape[1] > 1 and all(f.is_contiguous(memory_format=torch.channels_last) for f in features)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.custom_op(f"{NAMESPACE}::roi_align_forward", mutates_args=())
def _forward(
    features: Sequence[Tensor],
    rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    from .kernel import roi_align_forward_kernel

    channels_last = _is_channels_last(features)
    features = [f.contiguous(memory_format=_layout(channels_last)) for f in features]
    out = _forward_fake(
        features, rois, pooled_height, pooled_width, scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )
    constants = _constants(out.shape, channels_last, scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    launch(
        roi_align_forward_kernel,
        _grid(out.shape, constants),
        tuple(features),
        rois.contiguous(),
        out,
        *features[0].shape[:2],
        tuple(f.shape[2] for f in features),
        tuple(f.shape[3] for f in features),
        device=rois.device,
        **constants,
    )
    return out


@_forward.register_fake
def _forward_fake(
    features: Sequence[Tensor],
    rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    shape = (rois.shape[0], features[0].shape[1], pooled_height, pooled_width)
    layout = _layout(_is_channels_last(features))
    return torch.empty(shape, dtype=features[0].dtype, device=features[0].device, memory_format=layout)


@torch.library.custom_op(f"{NAMESPACE}::roi_align_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    rois: Tensor,
    batch_size: int,
    sizes: Sequence[int],
    channels_last: bool,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> list[Tensor]:
    """Gradients of the L feature maps; `sizes` is (H_0, W_0, H_1, W_1, ...): the maps themselves are not kept."""
    from .kernel import roi_align_backward_kernel

    # Half-precision atomics would round every addition: sum in fp32, cast once.
    sums = [torch.zeros_like(g, dtype=rois.dtype) for g in _empty_gradients(grad_out, batch_size, sizes, channels_last)]
    constants = _constants(
        grad_out.shape, channels_last, scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )
    launch(
        roi_align_backward_kernel,
        _grid(grad_out.shape, constants),
        tuple(sums),
        rois.contiguous(),
        grad_out.contiguous(memory_format=_layout(channels_last)),
        batch_size,
        grad_out.shape[1],
        tuple(sizes[0::2]),
        tuple(sizes[1::2]),
        device=rois.device,
        **constants,
    )
    return [s.to(grad_out.dtype) for s in sums]


def _empty_gradients(grad_out: Tensor, batch_size: int, sizes: Sequence[int], channels_last: bool) -> list[Tensor]:
    layout = _layout(channels_last)
    shapes = [(batch_size, grad_out.shape[1], h, w) for h, w in zip(sizes[0::2], sizes[1::2], strict=True)]
    return [torch.empty(s, dtype=grad_out.dtype, device=grad_out.device, memory_format=layout) for s in shapes]


@_backward.register_fake
def _(
    grad_out: Tensor,
    rois: Tensor,
    batch_size: int,
    sizes: Sequence[int],
    channels_last: bool,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> list[Tensor]:
    return _empty_gradients(grad_out, batch_size, sizes, channels_last)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    features, rois, _, _, *ctx.options = inputs
    ctx.save_for_backward(rois)
    ctx.batch_size = features[0].shape[0]
    ctx.sizes = [n for f in features for n in f.shape[2:]]
    ctx.channels_last = _is_channels_last(features)


def _autograd(ctx, grad_out: Tensor) -> tuple:  # noqa: ANN001
    (rois,) = ctx.saved_tensors
    grads = _backward(grad_out, rois, ctx.batch_size, ctx.sizes, ctx.channels_last, *ctx.options)
    return grads, *[None] * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)
