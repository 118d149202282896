"""RoIAlign for autograd, and for torch.compile as torch.library ops with fakes.

In eager mode an autograd.Function calls the launches directly: the dispatcher, and the checks that torch.library makes
on every call, cost more host time than a small call's kernels take. Whoever traces gets the registered op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layouts import is_channels_last
from ..runtime import NAMESPACE, is_traced
from . import launches
from .launches import Pooling


def pool(
    features: Sequence[Tensor], rois: Sequence[Tensor], pooling: Pooling, out_channels_last: bool, atomics: bool
) -> list[Tensor]:
    """Pool each set of `rois` [K_s, 5] (fp32, or fp64 for fp64 features) on L maps: [K_s, C, ph_s, pw_s] each."""
    if is_traced(*features, *rois):
        sizes = [n for size in pooling.sizes for n in size]
        options = (pooling.scales, pooling.sampling_ratio, pooling.aligned)
        canonical = (pooling.canonical_scale, pooling.canonical_level)
        return roi_align_forward(features, rois, sizes, *options, *canonical, out_channels_last, atomics)[:-1]
    if torch.is_grad_enabled() and any(f.requires_grad for f in features):
        return list(_RoIAlign.apply(pooling, out_channels_last, atomics, rois, *features))
    return launches.forward(features, rois, pooling, out_channels_last)[0]


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pooling, out_channels_last, atomics, rois, *features) -> tuple[Tensor, ...]:  # noqa: ANN001
        outs, table = launches.forward(features, rois, pooling, out_channels_last)
        ctx.save_for_backward(table)
        ctx.set_materialize_grads(False)
        ctx.rest = _what_backward_needs(features, pooling, atomics)
        ctx.shapes = [out.shape for out in outs]
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outs) -> tuple:  # noqa: ANN001
        if all(g is None for g in grad_outs):
            return None, None, None, None, *[None] * len(ctx.rest[1])
        (table,) = ctx.saved_tensors
        grads = launches.backward(_all_of(grad_outs, ctx.shapes), table, *ctx.rest)
        return None, None, None, None, *grads


def _what_backward_needs(features: Sequence[Tensor], pooling: Pooling, atomics: bool) -> tuple:
    """Sizes, not the maps themselves: their memory can be freed."""
    extents = [tuple(f.shape[2:]) for f in features]
    return features[0].shape[0], extents, is_channels_last(features), pooling, atomics


def _all_of(grad_outs: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Zeros for a set of RoIs that no loss looked at."""
    like = next(g for g in grad_outs if g is not None)
    return [like.new_zeros(s) if g is None else g for g, s in zip(grad_outs, shapes, strict=True)]


@torch.library.custom_op(f"{NAMESPACE}::roi_align_forward", mutates_args=())
def roi_align_forward(
    features: Sequence[Tensor],
    rois: Sequence[Tensor],
    sizes: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
    out_channels_last: bool,
    atomics: bool,
) -> list[Tensor]:
    """RoIAlign of S sets of `rois` [K_s, 5] on L maps: [K_s, C, ph_s, pw_s] of each, and the table of their geometry.

    `sizes` is (ph_0, pw_0, ph_1, pw_1, ...); `atomics` concerns the backward.
    """
    pooling = _pooling(sizes, scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    outs, table = launches.forward(features, rois, pooling, out_channels_last)
    return [*outs, table]


def _pooling(sizes: Sequence[int], scales: Sequence[float], *options) -> Pooling:
    return Pooling(tuple(_pairs(sizes)), tuple(scales), *options)


def _pairs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(numbers[0::2], numbers[1::2], strict=True))


@roi_align_forward.register_fake
def _(features, rois, sizes, scales, sampling_ratio, aligned, scale, level, out_channels_last, atomics) -> list[Tensor]:  # noqa: ANN001
    pooling = _pooling(sizes, scales, sampling_ratio, aligned, scale, level)
    return [
        *launches.empty_outputs(features, rois, pooling, out_channels_last),
        launches.empty_table(rois),
    ]


@torch.library.custom_op(f"{NAMESPACE}::roi_align_backward", mutates_args=())
def roi_align_backward(
    grad_outs: Sequence[Tensor],
    table: Tensor,
    batch_size: int,
    extents: Sequence[int],
    channels_last: bool,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
    atomics: bool,
) -> list[Tensor]:
    """Gradients of the L maps; `extents` is (H_0, W_0, H_1, W_1, ...): the maps themselves are not kept."""
    sizes = [n for g in grad_outs for n in g.shape[2:]]
    pooling = _pooling(sizes, scales, sampling_ratio, aligned, canonical_scale, canonical_level)
    return launches.backward(grad_outs, table, batch_size, _pairs(extents), channels_last, pooling, atomics)


@roi_align_backward.register_fake
def _(grad_outs, table, batch_size, extents, channels_last, *options) -> list[Tensor]:  # noqa: ANN001
    return launches.empty_gradients(grad_outs[0], batch_size, _pairs(extents), channels_last)


def _setup_context(ctx, inputs: tuple, output: list[Tensor]) -> None:  # noqa: ANN001
    features, _, _, *ctx.options, _, ctx.atomics = inputs
    *outs, table = output
    ctx.save_for_backward(table)
    ctx.set_materialize_grads(False)
    ctx.shapes = [out.shape for out in outs]
    ctx.batch_size = features[0].shape[0]
    ctx.extents = [n for f in features for n in f.shape[2:]]
    ctx.channels_last = is_channels_last(features)


def _autograd(ctx, grads: Sequence[Tensor | None]) -> tuple:  # noqa: ANN001
    no_rois_gradient = [None] * len(ctx.shapes)
    if all(g is None for g in grads):
        return [None] * (len(ctx.extents) // 2), no_rois_gradient, *[None] * 8
    (table,) = ctx.saved_tensors
    grad_outs = _all_of(grads[:-1], ctx.shapes)
    found = roi_align_backward(
        grad_outs, table, ctx.batch_size, ctx.extents, ctx.channels_last, *ctx.options, ctx.atomics
    )
    return found, no_rois_gradient, *[None] * 8


roi_align_forward.register_autograd(_autograd, setup_context=_setup_context)
