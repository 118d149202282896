"""No time without a correct result: a provider's output against the PyTorch reference in float64.

Anchor labels are the exception: their rules (thresholds, ties) are defined on float32 IoUs, so is their reference.
The reference is slow and hungry, so RoI ops and anchor labelling are checked on the first and the last image of
the batch (complete for these: every RoI, every gradient cell); the other ops are checked whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels

from .workloads import ROI_OPS, Inputs

# Largest deviation over the largest reference value. float32: torchvision's own CUDA kernels deviate by up to
# 9e-5 on RoI coordinates around 1344. Half precisions: rounding of the output (2^-9 in bf16), and backward the
# rounding of each of the many contributions that an implementation may accumulate in that precision.
TOLERANCES = {
    "forward": {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 1e-2},
    "backward": {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2},
}
# Share of anchors labelled differently: a compiler that fuses operations moves an IoU across a threshold or a tie.
LABEL_TOLERANCE = 1e-4


class WrongResultError(AssertionError):
    """A provider's result is outside its tolerance: its time would mean nothing."""


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the reference, and how far it may be."""

    error: float
    tolerance: float

    def require(self) -> Verdict:
        """Return self, or raise `WrongResultError` (also where the error is NaN)."""
        if not self.error <= self.tolerance:
            raise WrongResultError(f"error {self.error:.2e} against the reference exceeds {self.tolerance:.0e}")
        return self


@dataclass(frozen=True)
class Part:
    """The share of a call that is checked: its inputs, and how to find it in a whole output or gradient."""

    inputs: Inputs
    of_output: Callable[[Tensor], Tensor] = lambda output: output
    of_grad: Callable[[Tensor], Tensor] = lambda grad: grad


def check_forward(op: str, inputs: Inputs, output: object, dtype: torch.dtype) -> Verdict:
    """Compare an output; `inputs` are in the padded form that `kernels` takes."""
    part = _part(op, inputs)
    if op == "label_anchors":
        labels, matches = (part.of_output(t) for t in output)
        return Verdict(_label_error(labels, matches, *_reference(op, part.inputs)), LABEL_TOLERANCE)
    truth = _reference(op, part.inputs.map(_double))
    return Verdict(_relative_error(part.of_output(output), truth), TOLERANCES["forward"][dtype])


def check_backward(
    op: str, inputs: Inputs, grads: Sequence[Tensor], grad_output: Tensor, dtype: torch.dtype
) -> Verdict:
    """Compare the gradients of all leaves under the same incoming gradient."""
    part = _part(op, inputs)
    exact = part.inputs.map(_double)
    for leaf in exact.leaves:
        leaf.requires_grad_(True)
    truth = torch.autograd.grad(
        _reference(op, exact), exact.leaves, part.of_output(grad_output).double(), allow_unused=True
    )
    errors = [
        _relative_error(part.of_grad(grad), torch.zeros_like(leaf) if expected is None else expected)
        for grad, expected, leaf in zip(grads, truth, exact.leaves, strict=True)
    ]
    return Verdict(torch.tensor(errors).max().item(), TOLERANCES["backward"][dtype])  # unlike max(), keeps a NaN


def _reference(op: str, inputs: Inputs) -> object:
    return getattr(kernels, op)(*inputs.args, backend="torch")


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _relative_error(output: Tensor, truth: Tensor) -> float:
    if output.shape != truth.shape:
        raise WrongResultError(f"shape {tuple(output.shape)}, the reference gives {tuple(truth.shape)}")
    return ((output.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def _label_error(labels: Tensor, matches: Tensor, true_labels: Tensor, true_matches: Tensor) -> float:
    # Which object a background anchor is nearest to is nobody's business: matches count where both say object.
    both = (labels == 1) & (true_labels == 1)
    wrong = (labels != true_labels) | (both & (matches != true_matches))
    return wrong.float().mean().item()


def _part(op: str, inputs: Inputs) -> Part:
    if op in ROI_OPS:
        return _roi_part(inputs)
    if op == "label_anchors":
        anchors, gt_boxes, gt_count = inputs.args
        images = _first_and_last(len(gt_boxes))
        take = functools.partial(_take, index=images)
        return Part(Inputs((anchors, gt_boxes[images], gt_count[images])), take)
    return Part(inputs)


def _roi_part(inputs: Inputs) -> Part:
    features, rois, *rest = inputs.args
    levels = features if isinstance(features, list) else [features]
    images = _first_and_last(len(levels[0]))
    rows = torch.isin(rois[:, 0].long(), torch.tensor(images, device=rois.device)).nonzero()[:, 0]
    renumbered = rois[rows].clone()
    renumbered[:, 0] = (renumbered[:, 0] != 0).to(rois.dtype) if len(images) == 2 else 0
    parts = [level.detach()[images] for level in levels]
    args = (parts if isinstance(features, list) else parts[0], renumbered, *rest)
    return Part(
        Inputs(args, tuple(parts)),
        functools.partial(_take, index=rows),
        functools.partial(_take, index=images),
    )


def _first_and_last(count: int) -> list[int]:
    return [0, count - 1] if count > 1 else [0]


def _take(tensor: Tensor, index: object) -> Tensor:
    return tensor[index]
