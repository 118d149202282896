"""`mask_predictor_loss`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..layouts import is_channels_last, layout
from ..mask_bce_loss.op import check_rows, loadable, weighted_mean
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference

MOST_CHANNELS = 4096
"""A pixel's features are held by one program."""


def mask_predictor_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A mask head's last 1x1 convolution and `mask_bce_loss` of its logits, for each RoI's own class alone.

    That is `mask_bce_loss(conv2d(features, weight, bias), labels, targets, weights)`, with the ReLU before the
    convolution too, if asked for (arXiv:1703.06870, section 3 and figure 4), but that the K channels are never formed:
    one is computed of each RoI, and no logit is stored. The features are read once in the forward pass and not kept for
    the backward, which writes their gradient and reads a number a pixel (and, with `relu`, a bit a feature).

    Products, sums and the gradients' factors are fp32 whatever the types of features and weight, which may differ; the
    ordinary path rounds logits and their gradients to the features' type. Gradients are deterministic: those of the
    weight are summed class by class in the order of the RoIs.

    Args:
        features: [N, C, M, M'] in fp16, bf16, fp32 or fp64, C at most 4096. NCHW and channels_last are read as they
            are, anything else is copied.
        weight: [K, C] or [K, C, 1, 1], floating (fp64 if and only if the features are).
        bias: [K], of the weight's dtype, or None.
        labels: [N] int64 class of each RoI, 0..K-1, or negative for an empty slot, in which NaN goes nowhere
            (but on the ordinary path, where it meets the weight's gradient).
        targets: [N, M, M'] in [0, 1], floating, bool or uint8 {0, 1}; no gradient flows to them.
        weights: [N] floating, by default 1; no gradient flows to them.
        relu: whether features below 0 count as 0.
        backend: see `BACKENDS`. "torchvision" is the ordinary path through K channels.

    Returns:
        Scalar loss, fp32 (fp64 for fp64 features). Gradients have the dtype and memory format of what they belong to.
        Autocast changes nothing.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        IndexError: a label of K or more (CPU tensors; on a GPU the Triton kernel makes the loss NaN, or, with
            TRITON_DEBUG=1 in the environment, this is raised there, too).
    """
    matrix = _check(features, weight, bias, labels, targets, weights)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    backend = choose_backend(backend, features, "mask_predictor_loss")
    if backend == "triton":
        weights = None if weights is None else weights.detach()
        return _forward(features, matrix, bias, labels, targets, weights, relu)[0]
    function = reference.mask_predictor_loss if backend == "torch" else reference.ordinary_way
    return function(features, matrix, bias, labels, targets, weights, relu)


def _check(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, targets: Tensor, weights: Tensor | None
) -> Tensor:
    """The weight as [K, C]."""
    check_tensor(features, "features", 4)
    channels = features.shape[1]
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 4) or weight.shape[2:] not in ((), (1, 1)):
        raise ValueError(f"weight must have shape [K, C] or [K, C, 1, 1], got {getattr(weight, 'shape', weight)}")
    matrix = check_tensor(weight.flatten(1), "weight", 2)
    if matrix.shape[1] != channels:
        raise ValueError(f"weight must have the features' {channels} channels, got shape {tuple(weight.shape)}")
    if not 0 < channels <= MOST_CHANNELS:
        raise ValueError(f"features must have 1 to {MOST_CHANNELS} channels, got {channels}")
    if channels * features.shape[2] * features.shape[3] >= 1 << 31:
        raise ValueError(f"a RoI must have fewer than 2**31 features, got shape {tuple(features.shape)}")
    if 0 in (*features.shape[2:], len(matrix)):
        shapes = f"{tuple(features.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"features and weight must not be empty beyond the RoIs, got shapes {shapes}")
    if (features.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"features and weight must both be float64 or neither, got {features.dtype}, {weight.dtype}")
    tensors = {"features": features, "weight": weight}
    if bias is not None:
        tensors["bias"] = check_tensor(bias, "bias", 1)
        if bias.shape != (len(weight),) or bias.dtype != weight.dtype:
            raise ValueError(f"bias must be [{len(weight)}] of {weight.dtype}, got {tuple(bias.shape)}, {bias.dtype}")
    check_same_device(**tensors)
    shape = (len(features), len(weight), *features.shape[2:])
    check_rows(shape, labels, targets, weights, features.device, "features and weight")
    return matrix


def _blocks(channels: int, pixels: int, wide: bool, channels_last: bool) -> dict[str, int]:
    """The constants of a tile."""
    lanes = 8 if channels_last else 16  # threads that share a pixel; of NCHW's, 8 would spill
    chunks = next_power_of_2(-(-channels // (8 * lanes)))
    block = max(1, (2048 if wide else 4096) // (chunks * lanes * 8))
    block = min(tile(block, 128), next_power_of_2(pixels))
    plain = channels_last and channels == chunks * lanes * 8
    return {"BLOCK": block, "CHUNKS": chunks, "LANES": lanes, "PLAIN": plain}


def _part(block: int) -> int:
    """Pixels of a program of the forward kernel: a quarter of a RoI of 28 x 28."""
    return tile(13, 1 << 10) * block


def _strides(channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """From pixel to pixel and from channel to channel."""
    return (channels, 1) if channels_last else (1, pixels)


@torch.library.custom_op(f"{NAMESPACE}::mask_predictor_forward", mutates_args=())
def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    relu: bool,
) -> list[Tensor]:
    """The loss [], and for the backward: scale [N], slope [N, M, M'], sums [N, parts, C] and [N, parts], signs."""
    from .kernel import mask_predictor_forward_kernel

    n, channels, height, width = features.shape
    pixels, channels_last = height * width, is_channels_last([features])
    features = features.contiguous(memory_format=layout(channels_last))
    labels, (_, _, *rest) = labels.contiguous(), _forward_fake(features, weight, bias, labels, targets, weights, relu)
    blocks = _blocks(channels, pixels, features.dtype == torch.float64, channels_last)
    parts = rest[1].shape[1]
    rows = rest[0].new_empty(parts, n)
    launch(
        mask_predictor_forward_kernel, (n, parts), features, weight.contiguous(), bias.contiguous(), labels,
        loadable(targets), rows, *rest, n, len(weight), channels, *_strides(channels, pixels, channels_last),
        PIXELS=pixels, PART=_part(blocks["BLOCK"]), **blocks, RELU=relu, enable_fp_fusion=True, device=features.device,
    )  # fmt: skip
    return [*weighted_mean(rows, labels, weights, len(weight), pixels), *rest]


@_forward.register_fake
def _forward_fake(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor, weights: Tensor | None, relu: bool
) -> list[Tensor]:
    n, channels, height, width = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    blocks = _blocks(channels, height * width, dtype == torch.float64, is_channels_last([features]))
    parts = -(-height * width // _part(blocks["BLOCK"]))
    new = lambda *shape: features.new_empty(shape, dtype=dtype)
    signs = features.new_empty((n, height, width, -(-channels // 8)) if relu else (0,), dtype=torch.uint8)
    return [new(), new(n), new(n, height, width), new(n, parts, channels), new(n, parts), signs]


@torch.library.custom_op(f"{NAMESPACE}::mask_predictor_features", mutates_args=())
def _features(
    grad_loss: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    slope: Tensor,
    signs: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    relu: bool,
) -> Tensor:
    """The gradient of the features."""
    from .kernel import mask_predictor_features_kernel

    (num_classes, channels), (n, height, width) = weight.shape, slope.shape
    grad = _features_fake(grad_loss, weight, labels, scale, slope, signs, dtype, channels_last, relu)
    blocks = _blocks(channels, height * width, dtype == torch.float64, channels_last)
    part = tile(7, 1 << 10) * blocks["BLOCK"]
    launch(
        mask_predictor_features_kernel, (n, -(-height * width // part)), grad_loss, scale, labels.contiguous(),
        weight.contiguous(), slope, signs, grad, num_classes, channels,
        *_strides(channels, height * width, channels_last),
        PIXELS=height * width, PART=part, **blocks, RELU=relu, device=weight.device,
    )  # fmt: skip
    return grad


@_features.register_fake
def _features_fake(grad_loss, weight, labels, scale, slope, signs, dtype, channels_last, relu):  # noqa: ANN001
    shape = (slope.shape[0], weight.shape[1], *slope.shape[1:])
    return torch.empty(shape, dtype=dtype, device=weight.device, memory_format=layout(channels_last))


@torch.library.custom_op(f"{NAMESPACE}::mask_predictor_weight", mutates_args=())
def _weight(
    grad_loss: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, sums: Tensor, sums_bias: Tensor
) -> list[Tensor]:
    """The gradients of weight and bias."""
    from .kernel import mask_predictor_weight_kernel

    (num_classes, channels), (n, parts) = weight.shape, sums_bias.shape
    grads = _weight_fake(grad_loss, weight)
    block = min(next_power_of_2(channels), tile(64, 4096))
    spans = -(-channels // block)
    launch(
        mask_predictor_weight_kernel, (num_classes, spans), grad_loss, scale, labels.contiguous(), sums, sums_bias,
        labels.new_empty(spans * num_classes * n, dtype=torch.int32), *grads, n, num_classes, channels,
        PARTS=parts, BLOCK_N=min(next_power_of_2(n), tile(1024, 1 << 16)), ROWS=tile(16, 64), BLOCK_C=block,
        device=weight.device,
    )  # fmt: skip
    return grads


@_weight.register_fake
def _weight_fake(grad_loss: Tensor, weight: Tensor, *others: object) -> list[Tensor]:
    return [weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])]


def _setup_context(ctx, inputs: tuple, output: list[Tensor]) -> None:  # noqa: ANN001
    features, weight, _, labels, *_, ctx.relu = inputs
    ctx.save_for_backward(weight, labels, *output[1:])  # not the features: their memory can be freed
    ctx.dtype, ctx.channels_last = features.dtype, is_channels_last([features])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grads: list[Tensor | None]) -> tuple:  # noqa: ANN001
    weight, labels, scale, slope, sums, sums_bias, signs = ctx.saved_tensors
    of_features, of_weight = None, (None, None)
    if grads[0] is not None and ctx.needs_input_grad[0]:
        layout_of = (ctx.dtype, ctx.channels_last, ctx.relu)
        of_features = _features(grads[0], weight, labels, scale, slope, signs, *layout_of)
    if grads[0] is not None and any(ctx.needs_input_grad[1:3]):
        of_weight = _weight(grads[0], weight, labels, scale, sums, sums_bias)
    return of_features, *of_weight, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
