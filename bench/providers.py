"""Who computes an op: the Triton kernel and the baselines it is measured against.

Each provider gets its inputs in the form it likes best (layout, dtype, lists instead of padded batches) before
the clock starts, so that a conversion is never charged to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

from .workloads import ROI_OPS, Inputs

PROVIDERS = ("triton", "torchvision", "torch", "torch.compile")
BASELINES = PROVIDERS[1:]
NO_TRITON_ON_CPU = "needs a GPU: interpreter speed says nothing about a GPU"
NO_COMPILED_ROIS_ON_CPU = "the RoI ops take half a minute a row to compile on a CPU: measured on a GPU only"


@dataclass(frozen=True)
class Provider:
    """One implementation of one op, ready to be called with `Inputs`."""

    name: str
    op: str
    call: Callable[..., object]
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs

    def __call__(self, inputs: Inputs) -> object:
        """Run the op once."""
        return self.call(*inputs.args)


def provider_dtype(provider: str, op: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a provider really runs in when `dtype` is asked for.

    torchvision's RoIAlign has no bf16, and its fp16 computes the sampling positions in fp16 too: at 800 x 1344 the
    results are off by up to a fifth of the largest value, which no gate should pass. It runs in float32, as it
    does under autocast, and is not charged for the casts.
    """
    if provider == "torchvision" and op in ROI_OPS and dtype == torch.bfloat16:
        return torch.float32
    return dtype


def why_not_here(provider: str, op: str, device: str) -> str | None:
    """The reason why a row gets no time on this kind of device; None where it does."""
    if device == "cpu" and provider == "triton":
        return NO_TRITON_ON_CPU
    if device == "cpu" and provider == "torch.compile" and op in ROI_OPS:
        return NO_COMPILED_ROIS_ON_CPU
    return None


def provider_layouts(provider: str, op: str) -> tuple[str, ...]:
    """The memory formats worth measuring: the model's channels_last, and the drop-in case for Triton.

    The baselines work on NCHW: torchvision's kernels would first copy anything else.
    """
    if op in ROI_OPS and provider == "triton":
        return ("channels_last", "nchw")
    return ("nchw",) if op in ROI_OPS else ("contiguous",)


def get_provider(name: str, op: str) -> Provider:
    """Look up a provider; a `torch.compile` one is compiled at its first call."""
    if name == "torchvision":
        return _torchvision(op)
    backend = "torch" if name == "torch.compile" else name
    call = functools.partial(getattr(kernels, op), backend=backend)
    if name == "torch.compile":
        call = _compiled(call)
    return Provider(name, op, call)


def _compiled(call: Callable[..., object]) -> Callable[..., object]:
    import torch._functorch.config as functorch_config

    torch._dynamo.reset()  # earlier workloads of the same op would count towards the recompilation limit
    # The backward pass is timed many times over one forward pass; by default the compiler reuses the saved
    # tensors' memory in the first of them.
    functorch_config.donated_buffer = False
    return torch.compile(call, dynamic=False)


def _torchvision(op: str) -> Provider:
    import torchvision

    if op == "roi_align":
        return Provider("torchvision", op, torchvision.ops.roi_align)
    if op == "multiscale_roi_align":
        call = functools.partial(kernels.multiscale_roi_align, backend="torchvision")
        return Provider("torchvision", op, call)
    calls = {"box_iou": torchvision.ops.box_iou, "label_anchors": _tv_label_anchors, "mask_bce_loss": _tv_mask_bce_loss}
    return Provider("torchvision", op, calls[op], _unpad if op == "label_anchors" else lambda inputs: inputs)


def _unpad(inputs: Inputs) -> Inputs:
    """Padded ground truth to the list of per-image boxes that torchvision's model holds."""
    anchors, gt_boxes, gt_count = inputs.args
    return Inputs((anchors, [gt[:n] for gt, n in zip(gt_boxes, gt_count.tolist(), strict=True)]))


def _tv_label_anchors(anchors: Tensor, gt_boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What torchvision's RPN does with every image in turn; its codes (-1 below, -2 between) to our labels."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    matches = torch.stack([matcher(box_iou(gt, anchors)) for gt in gt_boxes])
    labels = (matches >= 0).to(torch.int8) - (matches == Matcher.BETWEEN_THRESHOLDS).to(torch.int8)
    return labels, matches.clamp(min=0).to(torch.int32)


def _tv_mask_bce_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    picked = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(picked.float(), targets)  # fp32, as under torchvision's autocast
