"""Uninitialised memory is NaN in these tests: an output that a kernel forgets is seen, in every op."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import (
    MaskPool,
    box_iou,
    label_anchors,
    mask_bce_loss,
    mask_predictor_loss,
    mask_targets,
    nms_mask,
    paste_mask_crops,
    paste_masks,
    roi_align,
)
from kernels.runtime import launch, record_launches


@triton.jit
def forgetful_kernel(out_ptr, n, BLOCK: tl.constexpr):
    """Zeros all of [n] but the last number."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), at < n - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int8, torch.int32])
@pytest.mark.parametrize("allocate", ["empty", "empty_like", "new_empty"])
def test_forgotten_output_is_red(dtype, allocate, device):
    # Fresh memory often is zero, and then a kernel that forgets a zero passes; poisoned it cannot.
    like = torch.zeros(5, dtype=dtype, device=device)
    out = {
        "empty": lambda: torch.empty(5, dtype=dtype, device=device),
        "empty_like": lambda: torch.empty_like(like),
        "new_empty": lambda: like.new_empty(5),
    }[allocate]()
    launch(forgetful_kernel, (1,), out, 5, BLOCK=8, device=device)
    torch.testing.assert_close(out[:4], like[:4])
    with pytest.raises(AssertionError, match=r"Tensor-likes are not (equal|close)"):
        torch.testing.assert_close(out, like)


BOXES = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])


def targets(style: str) -> torch.Tensor:
    return mask_targets(
        MaskPool.of([torch.ones(1, 4, 4)]),
        BOXES[None],
        torch.zeros(1, 2, dtype=torch.int32),
        2,
        style,
        backend="triton",
    )


RESULTS = {
    "roi_align": lambda: roi_align(torch.ones(1, 2, 4, 4), torch.zeros(1, 5), 2, backend="triton"),
    "box_iou": lambda: box_iou(BOXES, BOXES, backend="triton"),
    "labels": lambda: label_anchors(BOXES, BOXES[None], torch.tensor([2]), backend="triton")[0],
    "matches": lambda: label_anchors(BOXES, BOXES[None], torch.tensor([2]), backend="triton")[1],
    "nms_mask": lambda: nms_mask(BOXES[None], torch.zeros(1, 2, dtype=torch.bool), 0.5, backend="triton"),
    "mask_bce_loss": lambda: mask_bce_loss(
        torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.zeros(1, 2, 2), backend="triton"
    ),
    "mask_predictor_loss": lambda: mask_predictor_loss(
        torch.zeros(1, 3, 2, 2), torch.zeros(1, 3), None, torch.tensor([0]), torch.zeros(1, 2, 2), backend="triton"
    ),
    "mask_targets": lambda: targets("torchvision"),
    "mask_targets of detectron2": lambda: targets("detectron2"),
    "paste_masks": lambda: paste_masks(torch.zeros(2, 2, 2), BOXES, 4, backend="triton"),
    "paste_masks values": lambda: paste_masks(torch.zeros(2, 2, 2), BOXES, 4, None, backend="triton"),
    "paste_mask_crops": lambda: paste_mask_crops(torch.zeros(2, 2, 2), BOXES, 4, backend="triton").pixels,
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_the_poison_reaches_every_op(result):
    # Where no kernel runs at all, nothing in a result may look like one.
    with record_launches():
        out = result()
    if out.dtype == torch.bool:
        assert out.all()
    elif out.is_floating_point():
        assert out.isnan().all()
    else:
        assert (out == torch.iinfo(out.dtype).max).all()


def test_fakes_are_not_filled():
    # Shapes without memory stay what they are: filling one would be an op in a traced graph.
    with torch._subclasses.FakeTensorMode():
        assert type(torch.empty(3)) is not torch.Tensor
    assert torch.empty(3, device="meta").is_meta
