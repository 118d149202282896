"""Small inputs for the ops, and every operator that they register with arguments that it takes."""

import torch
from torch import Tensor

from kernels import (
    MaskPool,
)
from kernels.box_iou import op as iou
from kernels.label_anchors import op as labels
from kernels.mask_bce_loss import op as mask
from kernels.mask_predictor_loss import op as predictor
from kernels.mask_targets import op as crop
from kernels.nms import op as suppression
from kernels.paste_masks import op as paste
from kernels.proposals import op as proposals
from kernels.roi_align import library as roi
from kernels.rpn_loss import op as loss

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SCALES = [1 / 4, 1 / 8]


def boxes(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    corner = torch.rand(*shape, 2) * 20
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * 20], dim=-1).to(dtype)


def maps(dtype: torch.dtype = FP32, channels_last: bool = False) -> list[Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(2, 3, side, side).to(dtype).contiguous(memory_format=layout) for side in (8, 4)]


def rois(number: int = 3, dtype: torch.dtype = FP32) -> Tensor:
    return torch.cat([torch.arange(number)[:, None] % 2, boxes(number)], dim=1).to(dtype)


def table(number: int) -> Tensor:
    """The geometry of so many RoIs of 2 x 2 bins."""
    return roi.roi_align_forward._init_fn(maps(), [rois(number)], *LEVELS, False, False)[-1]


def masks(dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 2, 4, 4).to(dtype), torch.tensor([1, -1, 0]), torch.rand(3, 4, 4)


def predictor_inputs(dtype: torch.dtype = FP32, channels_last: bool = False) -> tuple[Tensor, ...]:
    """Features of 9 channels, weight and bias of 2 classes, labels and targets.

    Every slot is filled: what the forward op would keep of an empty one is never written.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight_dtype = FP64 if dtype == FP64 else FP32
    features = torch.randn(3, 9, 4, 4).to(dtype).contiguous(memory_format=layout)
    return (
        features,
        torch.randn(2, 9).to(weight_dtype),
        torch.randn(2).to(weight_dtype),
        torch.tensor([1, 0, 0]),
        masks()[2],
    )


def predictor_saved(relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the features' gradient needs of the forward: scale, slope, signs."""
    signs = torch.randint(0, 256, (3, 4, 4, 2) if relu else (0,), dtype=torch.uint8)
    return torch.rand(3), torch.rand(3, 4, 4), signs


def bitmaps(packed: bool = True) -> MaskPool:
    """Two images with two slots, of which one is empty."""
    extents = [torch.tensor([[1, 2, 10, 9], [0, 0, 3, 12]]), torch.tensor([[4, 4, 12, 6]])]
    return MaskPool.of([torch.ones(2, 12, 12), torch.ones(1, 12, 12)], extents, 2, (12, 12), packed=packed)


MATCHES = torch.tensor([[0, 1, 0], [0, 0, 1]])


def grid(dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    """Logits and deltas of two images, and a grid of two levels with 12 + 2 anchors."""
    return torch.randn(2, 14).to(dtype), torch.randn(2, 14, 4).to(dtype), boxes(2, 2), [2, 3, 1, 1], [8, 8, 16, 16]


LEVELS_OF_GRID = ((2, 3), (1, 1)), ((8, 8), (16, 16))


def strided(grid: tuple) -> tuple:
    """The same, the logits one of two, the deltas with the coordinate first."""
    logits, deltas, *rest = grid
    return torch.stack([logits, logits], dim=2)[..., 0], deltas.transpose(1, 2).contiguous().transpose(1, 2), *rest


def chosen(grid: tuple) -> tuple:
    """The same, with three slots of which one is empty after logits and deltas."""
    return *grid[:2], torch.tensor([[3, -1, 13], [0, 5, 12]]), *grid[2:]


def slots() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Boxes of two images, each anchor's match, and five slots: an index, drawn, positive."""
    index = torch.rand(2, 14).argsort(dim=1)[:, :5]
    drawn = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return boxes(2, 3), torch.randint(0, 3, (2, 14), dtype=torch.int32), index, drawn, drawn & (index % 2 == 0)


def to(device: torch.device, value: object) -> object:
    """`value`, a tensor or a list or tuple of anything, on `device`."""
    if isinstance(value, (list, tuple)):
        return type(value)(to(device, v) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


LEVELS = ([2, 2], SCALES, 2, False, 224, 4)
ODD = ([2, 3], [0.25], 0, True, 224, 4)  # one map, adaptive, bins that are not square
GRAD = torch.ones(3, 3, 2, 2)
EXTENTS = [8, 8, 4, 4]
COUNT = torch.tensor([3, 1])


def _operators() -> list:
    """(name, op, arguments): each op forward and backward, with a half type, fp64, channels_last and strides."""
    z, classes, targets = masks()
    return [
        ("roi_align", roi.roi_align_forward, (maps(), [rois()], *LEVELS, False, False)),
        ("roi_align channels_last", roi.roi_align_forward, (maps(FP32, True), [rois()], *LEVELS, True, False)),
        ("roi_align fp16 atomic", roi.roi_align_forward, (maps(FP16, True)[:1], [rois()], *ODD, False, True)),
        (
            "roi_align fp64 strided",
            roi.roi_align_forward,
            ([maps(FP64)[0][:, :, ::2]], [rois(3, FP64)], *ODD, True, False),
        ),
        # Once copied, such a map is contiguous in both layouts.
        ("roi_align of 1 x 1 cell", roi.roi_align_forward, ([maps()[0][:, ::2, :1, :1]], [rois()], *ODD, False, False)),
        (
            "roi_align joint",
            roi.roi_align_forward,
            (maps(FP32, True), [rois(), rois(2)], [2, 2, 3, 1], *LEVELS[1:], True, False),
        ),
        ("roi_align_backward", roi.roi_align_backward, ([GRAD], table(3), 2, EXTENTS, False, *LEVELS[1:], False)),
        (
            "roi_align_backward fp16 channels_last joint",
            roi.roi_align_backward,
            ([GRAD.half(), GRAD.half()[:1]], table(4), 2, EXTENTS, True, *LEVELS[1:], False),
        ),
        (
            "roi_align_backward atomic",
            roi.roi_align_backward,
            ([GRAD], table(3), 2, EXTENTS, False, *LEVELS[1:], True),
        ),
        ("box_iou", iou._forward, (boxes(2, 3), boxes(2, 4), False)),
        ("generalized_box_iou", iou._forward, (boxes(2, 3), boxes(2, 5), True)),
        ("box_iou bf16", iou._forward, (boxes(2, 3, dtype=BF16), boxes(2, 4, dtype=BF16), False)),
        ("box_iou_backward", iou._backward, (torch.ones(2, 3, 4), boxes(2, 3), boxes(2, 4), False)),
        ("generalized_box_iou_backward", iou._backward, (torch.ones(2, 3, 4), boxes(2, 3), boxes(2, 4), True)),
        (
            "box_iou_backward of transposed boxes",
            iou._backward,
            (torch.ones(2, 3, 4), boxes(3, 2).transpose(0, 1), boxes(2, 4), False),
        ),
        ("label_anchors", labels._label, (boxes(5), boxes(2, 3), COUNT.int(), 0.7, 0.3, True, False, False)),
        ("label_anchors flags", labels._label, (boxes(5), boxes(2, 3), COUNT, 0.7, 0.3, True, True, True)),
        (
            "label_anchors of each image",
            labels._label,
            (boxes(5, 2).transpose(0, 1), boxes(2, 3), COUNT, 0.5, 0.5, False, False, False),
        ),
        (
            "label_grid_anchors",
            labels._label_grid,
            (boxes(2, 3), [3, 4, 2, 2], [4, 4, 8, 8], boxes(2, 3), COUNT, 0.7, 0.3, True, False, False),
        ),
        ("nms_mask", suppression._nms, (boxes(2, 5), torch.rand(2, 5) < 0.8, 0.5)),
        (
            "nms_mask strided with groups",
            suppression._nms,
            (boxes(5, 2).transpose(0, 1), (torch.rand(5, 2) < 0.8).T, 0.5, torch.randint(0, 2, (5, 2)).T),
        ),
        ("nms_mask reference", suppression._opaque, (boxes(2, 5), torch.rand(2, 5) < 0.8, 0.5, None, "torch")),
        (
            "nms_mask torchvision as reference",
            suppression._opaque,
            (boxes(2, 5), torch.rand(2, 5) < 0.8, 0.5, None, "torchvision"),
        ),
        ("mask_bce_forward", mask._forward, (z, classes, targets, None)),
        (
            "mask_bce_forward fp16 channels_last weights",
            mask._forward,
            (z.half().contiguous(memory_format=torch.channels_last), classes, targets > 0.5, torch.rand(3)),
        ),
        ("mask_bce_forward fp64", mask._forward, (z.double(), classes, targets, torch.rand(3))),
        ("mask_bce_backward", mask._backward, (torch.ones(()), z, classes, targets, torch.rand(3))),
        (
            "mask_bce_backward fp16 channels_last",
            mask._backward,
            (
                torch.ones(()),
                z.half().contiguous(memory_format=torch.channels_last),
                classes,
                targets > 0.5,
                torch.rand(3),
            ),
        ),
        ("mask_predictor_forward", predictor._forward, (*predictor_inputs(), None, True)),
        (
            "mask_predictor_forward fp16 channels_last weights",
            predictor._forward,
            (*predictor_inputs(FP16, True), torch.rand(3), False),
        ),
        ("mask_predictor_forward fp64", predictor._forward, (*predictor_inputs(FP64), None, False)),
        (
            "mask_predictor_features",
            predictor._features,
            (torch.ones(()), torch.rand(2, 9), classes, *predictor_saved(False), FP32, False, False),
        ),
        (
            "mask_predictor_features fp16 channels_last relu",
            predictor._features,
            (torch.ones(()), torch.rand(2, 9), classes, *predictor_saved(True), FP16, True, True),
        ),
        (
            "mask_predictor_weight",
            predictor._weight,
            (torch.ones(()), torch.rand(2, 9), classes, torch.rand(3), torch.rand(3, 2, 9), torch.rand(3, 2)),
        ),
        ("mask_targets", crop._targets, (*bitmaps().flat(), boxes(2, 3), MATCHES, 5, False, "triton")),
        (
            "mask_targets of bytes, aligned, strided",
            crop._targets,
            (*bitmaps(False).flat(), boxes(3, 2, dtype=FP64).transpose(0, 1), MATCHES.int(), 5, True, "triton"),
        ),
        ("mask_targets reference", crop._targets, (*bitmaps().flat(), boxes(2, 3), MATCHES, 5, True, "torch")),
        (
            "mask_targets torchvision reference",
            crop._targets,
            (*bitmaps().flat(), boxes(2, 3), MATCHES, 5, False, "torchvision"),
        ),
        ("rpn_loss_rows", loss._rows, (*grid(), *slots(), 1 / 9)),
        ("rpn_loss_rows bf16", loss._rows, (*grid(BF16), *slots(), 0.0)),
        ("rpn_loss_rows_backward", loss._rows_backward, (*torch.ones(2, 2), *grid(), *slots(), 1 / 9)),
        (
            "rpn_loss_rows_backward fp64 strided",
            loss._rows_backward,
            (*torch.ones(2, 1, dtype=FP64).expand(2, 2), *strided(grid(FP64)), *slots(), 1 / 9),
        ),
        ("paste_masks", paste._paste, (torch.rand(3, 4, 4), boxes(3), 9, 11, 0.5)),
        (
            "paste_masks values of fp16 transposed",
            paste._paste,
            (torch.rand(3, 4, 4).half().transpose(1, 2), boxes(3).T.contiguous().T, 9, 11, None),
        ),
        (
            "paste_mask_crops",
            paste._paste_crops,
            (torch.rand(1, 4, 4), boxes(1), torch.tensor([[1, 2, 3, 4]]), torch.tensor([0]), 12, 12, 0.5),
        ),
        ("paste_masks reference", paste._opaque_reference, (torch.rand(3, 4, 4), boxes(3), 9, 11, 0.5)),
        ("topk_keys", proposals._keys, (torch.randn(2, 9),)),
        ("topk_keys bf16 of a slice", proposals._keys, (torch.randn(2, 9).to(BF16)[:, 2:7],)),
        ("decode_proposals", proposals._decode, (*chosen(grid()), torch.tensor([[20, 30], [9, 12]]), 1e-3)),
        (
            "decode_proposals fp16 strided",
            proposals._decode,
            (*chosen(strided(grid(FP16))), torch.tensor([[20, 30], [9, 12]]).int(), 0.0),
        ),
    ]


OPERATORS = _operators()
