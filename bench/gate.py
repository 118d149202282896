"""No time without a correct result: a provider's output against the PyTorch reference in float64.

Where an op decides (labels, what NMS keeps, the order of the best, pasted pixels) its rules are defined on float32
numbers, thresholds and ties included: so is the reference there, and the share of decisions that differ is the error.
Decoded boxes are float32 by contract, and so are the places of a mask target's samples: an edge at 1344 pixels is
rounded to 1e-4. The reference is slow and hungry, so RoI ops, and those of `parts.BATCHED`, are checked on two images
of the batch (complete for these: every RoI, every gradient cell; of NMS two groups, of pasting two masks): the first
and the last before the clock starts, two others drawn at random after it has stopped. The other ops are checked whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels

from .mask_inputs import OPTIONS
from .parts import listed, part_of
from .workloads import ROI_OPS, Inputs

LABEL_OPS = ("label_anchors", "label_grid_anchors")
BOOLEANS = ("nms_mask", "paste_masks")  # a box or a pixel is in, or not
DECISIONS = (*LABEL_OPS, *BOOLEANS, "stable_topk")
AS_GIVEN = (*DECISIONS, "decode_proposals", "mask_targets")  # fp32 numbers are part of what they are asked for
FP32_OUTPUTS = ("rpn_loss", "decode_proposals")  # whatever the inputs: rounding these is all that half types may cost

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
# Share of decisions that differ, of the anchors that are no background, or of the boxes or pixels that are kept. The
# rules are exact; whoever rounds otherwise (see `providers.may_decide_otherwise`) moves an IoU or a pixel across a
# threshold or a tie.
DECISION_TOLERANCE = 0.0
ROUNDED_TOLERANCES = {
    "label_anchors": 1e-3, "label_grid_anchors": 1e-3, "nms_mask": 1e-2, "stable_topk": 0.0, "paste_masks": 1e-4
}  # fmt: skip
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


class Truth:
    """The right answer for one draw of inputs, computed once and compared with every provider.

    `inputs` are in the padded form that `kernels` takes, in the dtype that the providers get: rounding the inputs
    is not their fault.
    """

    def __init__(self, op: str, inputs: Inputs, images: Sequence[int] | None = None) -> None:
        self.op = op
        self.part = part_of(op, inputs, images)
        self.exact = _exact(op, self.part.inputs)
        self._incoming: list[Tensor] | None = None
        self._expected: list[Tensor] = []

    def check_forward(self, output: object, dtype: torch.dtype, rounded: bool = False) -> Check:
        """Compare an output of a provider that ran in `dtype`; `rounded` where it may decide otherwise by rounding."""
        found = self.part.of_outputs(listed(output))
        if self.op in DECISIONS:
            error = _decision_error(self.op, found, self._forward)
            return Check(error, ROUNDED_TOLERANCES[self.op] if rounded else DECISION_TOLERANCE)
        return _check("forward", found, self._forward, torch.float32 if self.op in FP32_OUTPUTS else dtype)

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
            # Each set of RoIs has one output; other ops are one set with all their outputs.
            of_sets = [[g] for g in incoming] if self.op in ROI_OPS else [incoming]
            for of_set, grads in zip(self._chunks(), of_sets, strict=True):
                parts = [grads] if len(of_set) == 1 else [[part] for part in grads[0].split(ROIS_AT_ONCE)]
                for args, part in zip(of_set, parts, strict=True):
                    found = torch.autograd.grad(listed(self._reference(args)), leaves, part, allow_unused=True)
                    for total, gradient in zip(self._expected, found, strict=True):
                        total += 0 if gradient is None else gradient
            self._incoming = incoming
        return self._expected

    def _reference(self, args: tuple) -> object:
        return getattr(kernels, self.op)(*args, backend="torch", **OPTIONS.get(self.op, {}))

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


def _exact(op: str, inputs: Inputs) -> Inputs:
    """What the truth is computed from: `inputs` in float64, as far as the op takes it."""
    if op in AS_GIVEN:
        return inputs
    if op == "rpn_loss":  # whose boxes are float32
        leaves = tuple(leaf.detach().double() for leaf in inputs.leaves)
        return Inputs((*leaves, *inputs.args[len(leaves) :]), leaves)
    return inputs.map(_double)


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


def _decision_error(op: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Share of wrong decisions among those that matter."""
    for output, truth in zip(found, expected, strict=True):
        if output.shape != truth.shape:
            raise WrongResultError(f"shape {tuple(output.shape)}, the reference gives {tuple(truth.shape)}")
    if op in LABEL_OPS:
        return _label_error(*found, *expected)
    (output,), (truth,) = found, expected
    matter = (output | truth).sum() if op in BOOLEANS else torch.tensor(truth.numel())
    return ((output != truth).sum() / matter.clamp(min=1)).item()


def _label_error(labels: Tensor, matches: Tensor, true_labels: Tensor, true_matches: Tensor) -> float:
    """Share of wrong ones among the anchors that either side calls anything but background."""
    # Which object a background anchor is nearest to is nobody's business: matches count where both say object.
    both = (labels == 1) & (true_labels == 1)
    wrong = (labels != true_labels) | (both & (matches != true_matches))
    matter = (labels != 0) | (true_labels != 0)
    return (wrong.sum() / matter.sum().clamp(min=1)).item()
