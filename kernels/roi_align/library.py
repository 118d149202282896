"""The RoIAlign kernels as torch.library ops: allocation, launch, fakes for torch.compile, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from .reference import level_thresholds


def is_channels_last(features: Sequence[Tensor]) -> bool:
    """One layout serves all levels; a single channel is both, and counts as contiguous."""
    return features[0].shape[1] > 1 and all(f.is_contiguous(memory_format=torch.channels_last) for f in features)


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of a [B, C, H, W] tensor."""
    return torch.channels_last if channels_last else torch.contiguous_format


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
        "THRESHOLDS": tuple(level_thresholds(scales, canonical_scale, canonical_level)),
        "LEVELS": len(scales),
        "POOLED_H": shape[2],
        "POOLED_W": shape[3],
        "SAMPLING_RATIO": max(sampling_ratio, 0),
        "ALIGNED": aligned,
        "CHANNELS_LAST": channels_last,
        "BLOCK_BINS": min(next_power_of_2(shape[2] * shape[3]), tile(8, 1024)),
        "BLOCK_C": min(next_power_of_2(shape[1]), tile(128, 1024)),
    }


def _grid(shape: Sequence[int], constants: dict) -> tuple[int, int]:
    """(RoI and tile of its bins, tile of the channels): only the first axis of a grid can be longer than 65,535."""
    tiles = -(-shape[2] * shape[3] // constants["BLOCK_BINS"])
    return shape[0] * tiles, -(-shape[1] // constants["BLOCK_C"])


@torch.library.custom_op(f"{NAMESPACE}::roi_align_forward", mutates_args=())
def roi_align_forward(
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
    """RoIAlign of `rois` [K, 5] (fp32, or fp64 for fp64 features) on L maps: [K, C, ph, pw]."""
    from .kernel import roi_align_forward_kernel

    channels_last = is_channels_last(features)
    features = [f.contiguous(memory_format=memory_format(channels_last)) for f in features]
    out = _empty_output(features, rois, pooled_height, pooled_width, channels_last)
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


@roi_align_forward.register_fake
def _fake_forward(
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
    return _empty_output(features, rois, pooled_height, pooled_width, is_channels_last(features))


def _empty_output(features: Sequence[Tensor], rois: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    # The layout is given: asked again of copied features, maps of 1 x 1 cell would call themselves channels_last.
    shape = (rois.shape[0], features[0].shape[1], height, width)
    layout = memory_format(channels_last)
    return torch.empty(shape, dtype=features[0].dtype, device=features[0].device, memory_format=layout)


@torch.library.custom_op(f"{NAMESPACE}::roi_align_backward", mutates_args=())
def roi_align_backward(
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
        grad_out.contiguous(memory_format=memory_format(channels_last)),
        batch_size,
        grad_out.shape[1],
        tuple(sizes[0::2]),
        tuple(sizes[1::2]),
        device=rois.device,
        **constants,
    )
    return [s.to(grad_out.dtype) for s in sums]


def _empty_gradients(grad_out: Tensor, batch_size: int, sizes: Sequence[int], channels_last: bool) -> list[Tensor]:
    layout = memory_format(channels_last)
    shapes = [(batch_size, grad_out.shape[1], h, w) for h, w in zip(sizes[0::2], sizes[1::2], strict=True)]
    return [torch.empty(s, dtype=grad_out.dtype, device=grad_out.device, memory_format=layout) for s in shapes]


@roi_align_backward.register_fake
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
    ctx.channels_last = is_channels_last(features)


def _autograd(ctx, grad_out: Tensor) -> tuple:  # noqa: ANN001
    (rois,) = ctx.saved_tensors
    grads = roi_align_backward(grad_out, rois, ctx.batch_size, ctx.sizes, ctx.channels_last, *ctx.options)
    return grads, *[None] * 8


roi_align_forward.register_autograd(_autograd, setup_context=_setup_context)
