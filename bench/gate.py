"""No time without a correct result: a provider's output against the PyTorch reference in float64.

Anchor labels are the exception: their rules (thresholds, ties) are defined on float32 IoUs, so is their reference.
The reference is slow and hungry, so RoI ops and anchor labelling are checked on two images of the batch (complete
for these: every RoI, every gradient cell): the first and the last before the clock starts, two others drawn at random
after it has stopped. The other ops are checked whole.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
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
# The deviation's norm over the reference's. A maximum alone does not see that all small gradients are missing.
NORM_TOLERANCES = {
    "forward": {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 5e-3},
    "backward": {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2},  # the reference adds in bf16
}
# Share of the anchors that are no background which are labelled differently. The rules are exact; a compiler that
# fuses operations moves an IoU across a threshold or a tie.
LABEL_TOLERANCE, FUSED_LABEL_TOLERANCE = 0.0, 1e-3
ROIS_AT_ONCE = 128


class WrongResultError(AssertionError):
    """A provider's result is outside its tolerance: its time would mean nothing."""


@dataclass(frozen=True)
class Check:
    """How far a result is from the reference, and how far it may be."""

    error: float  # the largest deviation, over the largest value
    tolerance: float
    norm_error: float = 0.0
    norm_tolerance: float = 1.0

    def require(self) -> Check:
        """Return self, or raise `WrongResultError` (also where the error is NaN)."""
        if not self.error <= self.tolerance:
            raise WrongResultError(f"error {self.error:.2e} against the reference exceeds {self.tolerance:.0e}")
        if not self.norm_error <= self.norm_tolerance:
            raise WrongResultError(
                f"the error's norm, {self.norm_error:.2e} of the reference's, exceeds {self.norm_tolerance:.0e}"
            )
        return self


@dataclass(frozen=True)
class Part:
    """The share of a call that is checked: its inputs, and how to find it in a whole output or gradient."""

    inputs: Inputs
    of_output: Callable[[Tensor], Tensor] = lambda output: output
    of_grad: Callable[[Tensor], Tensor] = lambda grad: grad


class Truth:
    """The right answer for one draw of inputs, computed once and compared with every provider.

    `inputs` are in the padded form that `kernels` takes, in the dtype that the providers get: rounding the inputs
    is not their fault.
    """

    def __init__(self, op: str, inputs: Inputs, images: Sequence[int] | None = None) -> None:
        self.op = op
        self.part = _part(op, inputs, images)
        self.exact = self.part.inputs if op == "label_anchors" else self.part.inputs.map(_double)
        self._incoming: Tensor | None = None
        self._expected: list[Tensor] = []

    def check_forward(self, output: object, dtype: torch.dtype, fused: bool = False) -> Check:
        """Compare an output of a provider that ran in `dtype`; `fused` where a compiler may have fused operations."""
        if self.op == "label_anchors":
            labels, matches = (self.part.of_output(t) for t in output)
            error = _label_error(labels, matches, *self._forward)
            return Check(error, FUSED_LABEL_TOLERANCE if fused else LABEL_TOLERANCE)
        return _check("forward", [self.part.of_output(output)], [self._forward], dtype)

    def check_backward(self, grads: Sequence[Tensor], grad_output: Tensor, dtype: torch.dtype) -> Check:
        """Compare the gradients of all leaves under the same incoming gradient."""
        return _check("backward", [self.part.of_grad(g) for g in grads], self._gradients(grad_output), dtype)

    @functools.cached_property
    def _forward(self) -> object:
        with torch.no_grad():
            outputs = [getattr(kernels, self.op)(*args, backend="torch") for args, _ in self._chunks()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _gradients(self, grad_output: Tensor) -> list[Tensor]:
        incoming = self.part.of_output(grad_output).double()
        if self._incoming is None or not torch.equal(incoming, self._incoming):
            leaves = [leaf.requires_grad_(True) for leaf in self.exact.leaves]
            self._expected = [torch.zeros_like(leaf) for leaf in leaves]
            for args, rows in self._chunks():
                output = getattr(kernels, self.op)(*args, backend="torch")
                found = torch.autograd.grad(output, leaves, incoming[rows], allow_unused=True)
                for total, gradient in zip(self._expected, found, strict=True):
                    total += 0 if gradient is None else gradient
            self._incoming = incoming
        return self._expected

    def _chunks(self) -> Iterator[tuple[tuple, object]]:
        """(arguments, rows of the output): RoIs a few at a time, for autograd in float64 keeps every sample of each."""
        if self.op not in ROI_OPS:
            yield self.exact.args, ...
            return
        features, rois, *rest = self.exact.args
        for start in range(0, max(len(rois), 1), ROIS_AT_ONCE):
            rows = slice(start, start + ROIS_AT_ONCE)
            yield (features, rois[rows], *rest), rows


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check(direction: str, found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> Check:
    """The worst of all tensors. A tensor's max, unlike Python's, keeps a NaN."""
    largest, norms = torch.tensor([_errors(f, e) for f, e in zip(found, expected, strict=True)]).amax(0).tolist()
    return Check(largest, TOLERANCES[direction][dtype], norms, NORM_TOLERANCES[direction][dtype])


def _errors(output: Tensor, truth: Tensor) -> tuple[float, float]:
    """The deviation's largest value and its norm, over those of the truth."""
    if output.shape != truth.shape:
        raise WrongResultError(f"shape {tuple(output.shape)}, the reference gives {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0, 0.0
    deviation = output.double() - truth
    largest = deviation.abs().max() / truth.abs().max().clamp(min=1e-30)
    return largest.item(), (deviation.norm() / truth.norm().clamp(min=1e-30)).item()


def _label_error(labels: Tensor, matches: Tensor, true_labels: Tensor, true_matches: Tensor) -> float:
    """Share of wrong ones among the anchors that either side calls anything but background."""
    # Which object a background anchor is nearest to is nobody's business: matches count where both say object.
    both = (labels == 1) & (true_labels == 1)
    wrong = (labels != true_labels) | (both & (matches != true_matches))
    matter = (labels != 0) | (true_labels != 0)
    return (wrong.sum() / matter.sum().clamp(min=1)).item()


def random_images(count: int) -> list[int]:
    """Two images that no provider can foresee."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(time.time_ns() % 2**31))[:2].sort()[0].tolist()


def _part(op: str, inputs: Inputs, images: Sequence[int] | None) -> Part:
    if op in ROI_OPS:
        return _roi_part(inputs, images)
    if op == "label_anchors":
        anchors, gt_boxes, gt_count = inputs.args
        images = _first_and_last(len(gt_boxes)) if images is None else list(images)
        take = functools.partial(_take, index=images)
        return Part(Inputs((anchors, gt_boxes[images], gt_count[images])), take)
    return Part(inputs)


def _roi_part(inputs: Inputs, images: Sequence[int] | None) -> Part:
    features, rois, *rest = inputs.args
    levels = features if isinstance(features, list) else [features]
    images = _first_and_last(len(levels[0])) if images is None else list(images)
    chosen = torch.tensor(images, device=rois.device)
    rows = torch.isin(rois[:, 0].long(), chosen).nonzero()[:, 0]
    renumbered = rois[rows].clone()
    renumbered[:, 0] = torch.searchsorted(chosen, renumbered[:, 0].long()).to(rois.dtype)
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
