"""Who computes an op: the Triton kernel and the baselines it is measured against.

Each provider gets its inputs in the form it likes best (layout, dtype, lists instead of padded batches, anchors in
memory) before the clock starts, so that a conversion is never charged to it.

| provider | what it is |
| --- | --- |
| triton | our op as it is meant to be called |
| triton atomic | the same with `backward="atomic"`, not deterministic: what determinism costs, or gains |
| triton apart | a joint op as one call for each set of RoIs, whose gradients autograd adds: what joining gains |
| torchvision | its op, or what its model does where it has none |
| torchvision deterministic | its RoIAlign under `torch.use_deterministic_algorithms(True)`: what that costs there |
| torch | the PyTorch reference |
| torch.compile | the reference, compiled; or torchvision's way, where `mask_providers` says so |

Speed-ups are over the best of `BASELINES`. The others stand beside them: those whose name begins with triton are ours,
and torchvision's deterministic mode is no rival, however it does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels

from . import mask_providers, rpn_providers
from .inputs import Inputs
from .mask_inputs import OPTIONS
from .workloads import DETERMINISTIC, DTYPE_NAMES, MASK_OPS, ROI_OPS, RPN_OPS, Call

BASELINES = ("torchvision", "torch", "torch.compile")
ATOMIC, APART, DETERMINISTIC_TORCHVISION = "triton atomic", "triton apart", "torchvision deterministic"
NO_DETERMINISTIC_ON_CPU = "on a CPU torchvision's op is the same in deterministic mode"
NO_TRITON_ON_CPU = "needs a GPU: interpreter speed says nothing about a GPU"
NO_SLOW_COMPILES_ON_CPU = "takes half a minute a row to compile for a CPU: measured on a GPU only"
NO_COMPILED_NMS = "the compiler cannot trace the reference's loop: it would run it as it is"
NO_COMPILED_PASTING = "the compiler cannot trace sizes that the host reads from boxes: it would run most as it is"
NOT_COMPILED = {"nms_mask": NO_COMPILED_NMS, "paste_masks": NO_COMPILED_PASTING}
COMPILED_ELSEWHERE = "takes long to compile: only for train workloads with clustered boxes, and in bf16 where it exists"


@dataclass(frozen=True)
class Provider:
    """One implementation of one op, ready to be called with `Inputs`."""

    name: str
    op: str
    call: Callable[..., object]
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs
    mode: Callable[[], AbstractContextManager] = nullcontext  # to run the op and its backward in

    def __call__(self, inputs: Inputs) -> object:
        """Run the op once."""
        with self.mode():
            return self.call(*inputs.args)


@dataclass(frozen=True)
class Variant:
    """A provider in one dtype and memory format: one row of the result table."""

    provider: str
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        return f"{self.provider} {self.layout} {DTYPE_NAMES[self.dtype]}"


def variants(call: Call) -> Iterator[Variant]:
    """The rows of a call: Triton in every layout, each baseline in its best one and in every dtype worth trying.

    Triton: the model's channels_last, and NCHW, the drop-in for torchvision's op. torchvision's RoIAlign has NCHW
    kernels (it would first copy anything else) and no bf16: it runs in float32, as under autocast, and for training
    in float16 too, where its coordinates are float16 and miss the gate. The reference indexes cells: channels_last.

    torchvision decodes boxes in the deltas' dtype, in bf16 to whole pixels: there it gets fp32, too.

    The mask losses: Triton in both layouts as well. Which of them suits the convolution and which what picks from its
    channels is not for this table to guess: torchvision's way gets both, and both compiled.
    """
    workload = call.workload
    if workload.op in ("mask_predictor_loss", "mask_bce_loss"):
        for provider in ("triton", *BASELINES):
            layouts = ("channels_last",) if provider == "torch" else ("channels_last", "nchw")
            yield from (Variant(provider, call.dtype, layout) for layout in layouts)
        return
    if workload.op not in ROI_OPS:
        for provider in ("triton", *BASELINES):
            widened = provider == "torchvision" and workload.op == "decode_proposals"
            yield Variant(provider, torch.float32 if widened else call.dtype, "contiguous")
        return
    yield Variant("triton", call.dtype, "channels_last")
    yield Variant("triton", call.dtype, "nchw")
    if call.direction == "backward" and workload.suite in ("train", "adversarial"):
        yield Variant(ATOMIC, call.dtype, "channels_last")
    if workload.op == "joint_multiscale_roi_align":
        yield Variant(APART, call.dtype, "channels_last")
    yield Variant("torchvision", torch.float32, "nchw")
    if call.dtype == torch.bfloat16 and workload.suite == "train":  # the check is dear: not for every call
        yield Variant("torchvision", torch.float16, "nchw")
    if workload.name == DETERMINISTIC:
        yield Variant(DETERMINISTIC_TORCHVISION, torch.float32, "nchw")
    yield Variant("torch", call.dtype, "channels_last")
    yield Variant("torch.compile", call.dtype, "channels_last")


def is_ours(provider: str) -> bool:
    """Whether it runs our Triton kernels."""
    return provider.split()[0] == "triton"


def why_not_here(provider: str, call: Call, device: str) -> str | None:
    """The reason why a row gets no time on this kind of device; None where it does."""
    if device == "cpu" and is_ours(provider):
        return NO_TRITON_ON_CPU
    if device == "cpu" and provider == DETERMINISTIC_TORCHVISION:
        return NO_DETERMINISTIC_ON_CPU
    op = call.workload.op
    if provider == "torch.compile" and op in NOT_COMPILED:
        return NOT_COMPILED[op]
    quick = ("box_iou", "mask_bce_loss")
    if provider == "torch.compile" and device == "cpu" and op in (*ROI_OPS, *RPN_OPS, *MASK_OPS) and op not in quick:
        return NO_SLOW_COMPILES_ON_CPU
    if provider == "torch.compile" and device != "cpu" and not _worth_compiling(call):
        return COMPILED_ELSEWHERE
    return None


def _worth_compiling(call: Call) -> bool:
    workload = call.workload
    return workload.suite == "train" and workload.sizes.boxes == "clustered" and call.dtype == workload.dtypes[0]


def may_decide_otherwise(provider: str, op: str) -> bool:
    """Whether an op of exact rules may come out differently from a provider that rounds otherwise.

    torch.compile may fuse what the reference computes one by one, and an IoU may then cross a threshold. torchvision
    shifts the boxes of small problems apart so that one NMS serves all groups, and fuses in its CUDA op, as PyTorch
    does in the interpolation that pastes.
    """
    return provider == ("torchvision" if op in ("nms_mask", "paste_masks") else "torch.compile")


def get_provider(name: str, op: str) -> Provider:
    """Look up a provider; a `torch.compile` one is compiled at its first call."""
    if name == "torchvision":
        return _torchvision(op)
    if name == DETERMINISTIC_TORCHVISION:
        _prepare_compiler()  # torchvision compiles its deterministic form
        return Provider(name, op, _tv_roi_align, mode=deterministic)
    if name == APART:
        return Provider(name, op, _apart)
    if name == ATOMIC:
        return Provider(name, op, functools.partial(getattr(kernels, op), backend="triton", backward="atomic"))
    if name == "triton":
        return Provider(name, op, functools.partial(getattr(kernels, op), backend=name, **OPTIONS.get(op, {})))
    if name == "torch.compile" and op in mask_providers.COMPILED:
        _prepare_compiler()
        ordinary = _torchvision(op)
        return replace(ordinary, name=name, call=torch.compile(ordinary.call, dynamic=False))
    # A grid's anchors are made before the clock starts: the reference is then that of given anchors.
    given = "label_anchors" if op == "label_grid_anchors" else op
    reference = functools.partial(getattr(kernels, given), backend="torch", **OPTIONS.get(op, {}))
    if name == "torch.compile":
        _prepare_compiler()
        reference = torch.compile(reference, dynamic=False)
    return Provider(name, op, reference, rpn_providers.with_anchors)


def _prepare_compiler() -> None:
    import torch._functorch.config as functorch_config

    torch._dynamo.reset()  # earlier workloads of the same op would count towards the recompilation limit
    # The backward pass is timed many times over one forward pass; by default the compiler reuses the saved
    # tensors' memory in the first of them.
    functorch_config.donated_buffer = False


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms only, inside the block; afterwards whatever held before."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _apart(
    features: list[Tensor], rois: list[Tensor], sizes: list[int], scales: list[float], sampling_ratio: int
) -> list[Tensor]:
    call = functools.partial(kernels.multiscale_roi_align, backend="triton")
    return [call(features, r, size, scales, sampling_ratio) for r, size in zip(rois, sizes, strict=True)]


def _torchvision(op: str) -> Provider:
    calls = {
        "roi_align": _tv_roi_align,
        "multiscale_roi_align": _tv_multiscale_roi_align,
        "joint_multiscale_roi_align": _tv_joint_multiscale_roi_align,
    }
    if op in calls:
        return Provider("torchvision", op, calls[op])
    found = (rpn_providers.TORCHVISION | mask_providers.TORCHVISION)[op]
    return Provider("torchvision", op, *found, mode=mask_providers.MODES.get(op, nullcontext))


def _tv_roi_align(feature: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int) -> Tensor:
    from torchvision.ops import roi_align

    return roi_align(feature, rois.to(feature.dtype), size, scale, sampling_ratio)  # it wants them in one dtype


def _tv_multiscale_roi_align(
    features: list[Tensor], rois: Tensor, size: int, scales: list[float], sampling_ratio: int
) -> Tensor:
    """What torchvision's MultiScaleRoIAlign does, in the features' own dtype: a level at a time."""
    from torchvision.ops.poolers import LevelMapper

    levels = LevelMapper(2, 5)([rois[:, 1:]])
    out = features[0].new_zeros(len(rois), features[0].shape[1], size, size)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        index = torch.where(levels == level)[0]
        out[index] = _tv_roi_align(feature, rois[index], size, scale, sampling_ratio)
    return out


def _tv_joint_multiscale_roi_align(
    features: list[Tensor], rois: list[Tensor], sizes: list[int], scales: list[float], sampling_ratio: int
) -> list[Tensor]:
    """A pooling of its own for each head, as in torchvision's model."""
    sets = zip(rois, sizes, strict=True)
    return [_tv_multiscale_roi_align(features, r, size, scales, sampling_ratio) for r, size in sets]
