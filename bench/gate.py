"""No time without a correct result: a provider's output against the PyTorch reference in float64.

Anchor labels are the exception: their rules (thresholds, ties) are defined on float32 IoUs, so is their reference.
The reference is slow and hungry, so RoI ops and anchor labelling are checked on two images of the batch (complete
for these: every RoI, every gradient cell): the first and the last before the clock starts, two others drawn at random
after it has stopped. The other ops are checked whole.
"""

from __future__ import annotations

import functools
import time
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
    """The share of a call that is checked: its inputs, and how to find it in whole outputs and gradients."""

    inputs: Inputs
    of_outputs: Callable[[Sequence[Tensor]], list[Tensor]] = list
    of_grads: Callable[[Sequence[Tensor]], list[Tensor]] = list


def listed(output: object) -> list[Tensor]:
    """The tensors of an op's result, which may be one or several."""
    return [output] if isinstance(output, Tensor) else list(output)


class Truth:
    """The right answer for one draw of inputs, computed once and compared with every provider.

    `inputs` are in the padded form that `kernels` takes, in the dtype that the providers get: rounding the inputs
    is not their fault.
    """

    def __init__(self, op: str, inputs: Inputs, images: Sequence[int] | None = None) -> None:
        self.op = op
        self.part = _part(op, inputs, images)
        self.exact = self.part.inputs if op == "label_anchors" else self.part.inputs.map(_double)
        self._incoming: list[Tensor] | None = None
        self._expected: list[Tensor] = []

    def check_forward(self, output: object, dtype: torch.dtype, fused: bool = False) -> Check:
        """Compare an output of a provider that ran in `dtype`; `fused` where a compiler may have fused operations."""
        found = self.part.of_outputs(listed(output))
        if self.op == "label_anchors":
            error = _label_error(*found, *self._forward)
            return Check(error, FUSED_LABEL_TOLERANCE if fused else LABEL_TOLERANCE)
        return _check("forward", found, self._forward, dtype)

    def check_backward(self, grads: Sequence[Tensor], grad_outputs: Sequence[Tensor], dtype: torch.dtype) -> Check:
        """Compare the gradients of all leaves under the same incoming gradients, one an output."""
        return _check("backward", self.part.of_grads(grads), self._gradients(grad_outputs), dtype)

    @functools.cached_property
    def _forward(self) -> list[Tensor]:
        with torch.no_grad():
            sets = [[listed(self._reference(args)) for args in of_set] for of_set in self._chunks()]
        outputs = [pieces for of_set in sets for pieces in zip(*of_set, strict=True)]
        return [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in outputs]

    def _gradients(self, grad_outputs: Sequence[Tensor]) -> list[Tensor]:
        incoming = [g.double() for g in self.part.of_outputs(grad_outputs)]
        if self._incoming is None or not all(map(torch.equal, incoming, self._incoming)):
            leaves = [leaf.requires_grad_(True) for leaf in self.exact.leaves]
            self._expected = [torch.zeros_like(leaf) for leaf in leaves]
            for of_set, grad in zip(self._chunks(), incoming, strict=True):
                parts = [grad] if len(of_set) == 1 else grad.split(ROIS_AT_ONCE)
                for args, part in zip(of_set, parts, strict=True):
                    found = torch.autograd.grad(listed(self._reference(args)), leaves, [part], allow_unused=True)
                    for total, gradient in zip(self._expected, found, strict=True):
                        total += 0 if gradient is None else gradient
            self._incoming = incoming
        return self._expected

    def _reference(self, args: tuple) -> object:
        return getattr(kernels, self.op)(*args, backend="torch")

    def _chunks(self) -> list[list[tuple]]:
        """Arguments of the calls that together are the whole one, by set of RoIs.

        RoIs come a few at a time, for autograd in float64 keeps every sample of each.
        """
        if self.op not in ROI_OPS:
            return [[self.exact.args]]
        features, rois, bins, *rest = self.exact.args
        if isinstance(rois, Tensor):
            return [[(features, part, bins, *rest) for part in rois.split(ROIS_AT_ONCE)]]
        sets = zip(rois, bins, strict=True)
        return [[(features, [part], [n], *rest) for part in of_set.split(ROIS_AT_ONCE)] for of_set, n in sets]


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
        return Part(Inputs((anchors, gt_boxes[images], gt_count[images])), lambda outputs: [o[images] for o in outputs])
    return Part(inputs)


def _roi_part(inputs: Inputs, images: Sequence[int] | None) -> Part:
    features, rois, *rest = inputs.args
    levels, sets = listed(features), listed(rois)
    images = _first_and_last(len(levels[0])) if images is None else list(images)
    chosen = torch.tensor(images, device=sets[0].device)
    rows = [torch.isin(of_set[:, 0].long(), chosen).nonzero()[:, 0] for of_set in sets]
    parts = [level.detach()[images] for level in levels]
    renumbered = [_renumbered(of_set[taken], chosen) for of_set, taken in zip(sets, rows, strict=True)]
    args = [parts if isinstance(features, list) else parts[0], renumbered if isinstance(rois, list) else renumbered[0]]
    return Part(
        Inputs((*args, *rest), tuple(parts)),
        lambda outputs: [o[taken] for o, taken in zip(outputs, rows, strict=True)],
        lambda grads: [g[images] for g in grads],
    )


def _renumbered(rois: Tensor, images: Tensor) -> Tensor:
    """A copy whose images are numbered by their places among `images`."""
    copy = rois.clone()
    copy[:, 0] = torch.searchsorted(images, rois[:, 0].long()).to(rois.dtype)
    return copy


def _first_and_last(count: int) -> list[int]:
    return [0, count - 1] if count > 1 else [0]
