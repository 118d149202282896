"""What PyTorch relies on to trace, compile and autocast the ops, checked for every op."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from forbid_sync import forbid_sync
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from kernels import (
    AnchorGrid,
    MaskPool,
    batched_nms,
    box_iou,
    decode_proposals,
    generalized_box_iou,
    joint_multiscale_roi_align,
    label_anchors,
    label_grid_anchors,
    mask_bce_loss,
    mask_predictor_loss,
    mask_targets,
    multiscale_roi_align,
    nms,
    nms_mask,
    paste_masks,
    roi_align,
    rpn_loss,
    stable_topk,
    use_backend,
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
from kernels.runtime import record_launches

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


@pytest.mark.parametrize(("op", "arguments"), [o[1:] for o in OPERATORS], ids=[o[0] for o in OPERATORS])
def test_opcheck(op, arguments, device):
    # The schema tells the truth, and the fake results have the real ones' shapes, dtypes and strides: what Dynamo, AOT
    # autograd and Inductor build on. With gradients where the op has them.
    arguments = to(device, copy.deepcopy(arguments))
    if op in (roi.roi_align_forward, iou._forward, mask._forward, predictor._forward, loss._rows):
        leaves = arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
        leaves = arguments[:3] if op is predictor._forward else leaves
        for leaf in leaves:
            leaf.requires_grad_()
    torch.library.opcheck(op, arguments)


def test_every_registered_op_is_checked():
    # One that is registered and not in the list above would be checked by nobody.
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kernels::")}
    assert registered == {op._qualname for _, op, _ in OPERATORS}


# Without the references that are ops for the sake of torch.compile on a CPU: they look at values.
BODIES = [o for o in OPERATORS if not o[0].endswith(" reference")]


@pytest.mark.parametrize(("op", "arguments"), [o[1:] for o in BODIES], ids=[o[0] for o in BODIES])
def test_bodies_never_wait_for_the_device(op, arguments, device):
    # On a GPU the host would idle, and a CUDA graph could not be captured. Fake tensors and dispatch modes do not look
    # inside a custom op, so its body is called itself; nothing is launched, since the interpreter does wait.
    arguments = to(device, arguments)
    with forbid_sync(), record_launches() as launches:
        op._init_fn(*arguments)
    assert launches


@dataclass(frozen=True)
class Call:
    """A call of a public op: `run(*inputs, backend=...)`."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    leaves: int  # the first so many inputs have a gradient
    operators: tuple[str, ...]  # the custom ops behind it


POOL = ("roi_align_forward", "roi_align_backward")
CALLS = {
    "roi_align": Call(
        lambda x, r, **k: roi_align(x, r, 2, 0.25, 2, **k), (maps(channels_last=True)[0], rois()), 1, POOL
    ),
    "roi_align of lists": Call(
        lambda x, a, b, **k: roi_align(x, [a, b], (2, 3), 0.25, 2, True, **k), (maps()[0], boxes(2), boxes(1)), 1, POOL
    ),
    "multiscale_roi_align": Call(
        lambda a, b, r, **k: multiscale_roi_align([a, b], r, 2, SCALES, canonical_scale=56, **k),
        (*maps(BF16, True), rois()),
        2,
        POOL,
    ),
    "joint_multiscale_roi_align": Call(
        lambda a, b, r, s, **k: torch.cat(
            [
                x.flatten(1).T
                for x in joint_multiscale_roi_align([a, b], [r, s], [2, 2], SCALES, canonical_scale=56, **k)
            ],
            dim=1,
        ),
        (*maps(FP32, True), rois(), rois(2)),
        2,
        POOL,
    ),
    "box_iou": Call(lambda a, b, **k: box_iou(a, b, **k), (boxes(3), boxes(4)), 2, ("box_iou", "box_iou_backward")),
    "box_iou in batches": Call(
        lambda a, b, **k: box_iou(a, b, **k),
        (boxes(2, 3, dtype=FP16), boxes(2, 4, dtype=FP16)),
        2,
        ("box_iou", "box_iou_backward"),
    ),
    "generalized_box_iou": Call(
        lambda a, b, **k: generalized_box_iou(a, b, **k),
        (boxes(2, 3, dtype=BF16), boxes(2, 4, dtype=BF16)),
        2,
        ("box_iou", "box_iou_backward"),
    ),
    "label_anchors": Call(
        lambda a, g, c, **k: label_anchors(a, g, c, low_inclusive=True, require_overlap=True, **k),
        (boxes(9), boxes(2, 3), COUNT),
        0,
        ("label_anchors",),
    ),
    "label_anchors of each image": Call(
        lambda a, g, c, **k: label_anchors(a, g, c, 0.5, 0.5, False, **k),
        (boxes(2, 9), boxes(2, 3), COUNT),
        0,
        ("label_anchors",),
    ),
    "label_grid_anchors": Call(
        lambda a, g, c, **k: label_grid_anchors(AnchorGrid(a, ((3, 4), (2, 2)), ((4, 4), (8, 8))), g, c, **k),
        (boxes(2, 3), boxes(2, 3), COUNT),
        0,
        ("label_grid_anchors",),
    ),
    "nms_mask": Call(
        lambda b, v, **k: nms_mask(b, v, 0.3, **k), (boxes(2, 6), torch.rand(2, 6) < 0.8), 0, ("nms_mask",)
    ),
    "nms": Call(
        lambda b, s, **k: nms(b, s, 0.3, max_output=4, **k), (boxes(6, dtype=BF16), torch.rand(6)), 0, ("nms_mask",)
    ),
    "batched_nms": Call(
        lambda b, s, i, **k: batched_nms(b, s, i, 0.3, **k),
        (boxes(6), torch.rand(6), torch.arange(6) % 2),
        0,
        ("nms_mask",),
    ),
    "mask_bce_loss": Call(
        lambda z, c, t, w, **k: mask_bce_loss(z, c, t, w, **k),
        (*masks(BF16), torch.rand(3)),
        1,
        ("mask_bce_forward", "mask_bce_backward"),
    ),
    "mask_predictor_loss": Call(
        lambda x, w, b, c, t, v, **k: mask_predictor_loss(x, w, b, c, t, v, **k),
        (*predictor_inputs()[:3], *masks()[1:], torch.rand(3)),
        3,
        ("mask_predictor_forward", "mask_predictor_features", "mask_predictor_weight"),
    ),
    "mask_predictor_loss of a convolution's weight after a ReLU": Call(
        lambda x, w, c, t, **k: mask_predictor_loss(x, w[:, :, None, None], None, c, t, relu=True, **k),
        (*predictor_inputs(BF16, True)[:2], *masks()[1:]),
        2,
        ("mask_predictor_forward", "mask_predictor_features", "mask_predictor_weight"),
    ),
    "mask_targets": Call(
        lambda m, o, e, s, b, i, **k: mask_targets(MaskPool(m, o, e, s, (12, 12)), b, i, 5, **k),
        (*bitmaps().flat()[:4], boxes(2, 3), MATCHES),
        0,
        ("mask_targets",),
    ),
    "mask_targets of detectron2": Call(
        lambda m, o, e, s, b, i, **k: mask_targets(MaskPool(m, o, e, s, (12, 12), False), b, i, 5, "detectron2", **k),
        (*bitmaps(False).flat()[:4], boxes(2, 3), MATCHES.int()),
        0,
        ("mask_targets",),
    ),
    "paste_masks": Call(
        lambda m, b, **k: paste_masks(m, b, (21, 23), **k), (torch.rand(3, 4, 4), boxes(3)), 0, ("paste_masks",)
    ),
    "paste_masks values of bf16": Call(
        lambda m, b, **k: paste_masks(m, b, (21, 23), None, **k),
        (torch.rand(3, 4, 4).to(BF16), boxes(3)),
        0,
        ("paste_masks",),
    ),
    "rpn_loss": Call(
        lambda z, d, a, *s, **k: torch.stack(rpn_loss(z, d, a, *s, **k)),
        (*grid(BF16)[:2], boxes(14), *slots()),
        2,
        ("rpn_loss_rows", "rpn_loss_rows_backward"),
    ),
    "rpn_loss of a grid": Call(
        lambda z, d, c, *s, **k: torch.stack(rpn_loss(z, d, AnchorGrid(c, *LEVELS_OF_GRID), *s, 0.0, **k)),
        (*grid()[:3], *slots()),
        2,
        ("rpn_loss_rows", "rpn_loss_rows_backward"),
    ),
    "stable_topk": Call(lambda v, **k: stable_topk(v[:, 2:], 4, **k), (torch.randn(2, 9).to(BF16),), 0, ("topk_keys",)),
    "decode_proposals": Call(
        lambda z, d, i, a, s, **k: decode_proposals(z, d, i, a, s, **k),
        (*chosen(grid(BF16))[:3], boxes(14), torch.tensor([[20, 30], [9, 12]])),
        0,
        ("decode_proposals",),
    ),
    "decode_proposals of a grid": Call(
        lambda z, d, i, c, s, **k: decode_proposals(z, d, i, AnchorGrid(c, *LEVELS_OF_GRID), s, 2.0, **k),
        (*chosen(grid())[:4], torch.tensor([[20, 30], [9, 12]])),
        0,
        ("decode_proposals",),
    ),
}

each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def run(
    call: Call, device: torch.device, backend: str, function: Callable | None = None, autocast: bool = False
) -> list[Tensor]:
    """The call's results, and the gradients of its leaves, by `function` instead of the op itself; the forward under
    autocast, the backward without, as PyTorch wants it."""
    inputs = [i.detach().to(device).requires_grad_(n < call.leaves) for n, i in enumerate(call.inputs)]
    with torch.autocast(device.type, BF16, enabled=autocast):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == (BF16 if autocast else FP32)
        out = (function or call.run)(*inputs, backend=backend)
    outs = list(out) if isinstance(out, tuple) else [out]
    if call.leaves:
        generator = torch.Generator().manual_seed(1)
        weight = torch.rand(out.shape, generator=generator).to(out)
        outs += torch.autograd.grad((out * weight).sum(), inputs[: call.leaves])
    return outs


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To the last bit, dtypes and strides included."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, check_stride=True)


class Recorder:
    """A compiler that runs graphs as they are, and remembers which ops are in them."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.backend = aot_autograd(fw_compiler=self.compile, bw_compiler=self.compile)

    def compile(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        """Called by AOT autograd with each graph, forward and backward."""
        self.seen |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        return make_boxed_func(graph.forward)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    torch.compiler.reset()
    yield Recorder()
    torch.compiler.reset()


@each_call
@pytest.mark.parametrize("how", ["triton", "use_backend"])
def test_compiles_into_one_graph(call, how, recorder, device):
    # A training step is to be one graph: no break in the checks or in the choice of a backend, the op itself a node of
    # it, and the same results and gradients.
    expected = run(call, device, "triton")
    compiled = torch.compile(call.run, fullgraph=True, backend=recorder.backend)
    if how == "triton":
        ours = run(call, device, "triton", compiled)
    else:
        with use_backend("triton"):
            ours = run(call, device, "auto", compiled)
    assert_same(ours, expected)
    assert {name for name in recorder.seen if name.startswith("kernels.")} == {
        f"kernels.{name}.default" for name in call.operators
    }


@pytest.mark.parametrize("name", [name for name in CALLS if "multiscale" not in name])
def test_auto_on_a_cpu_compiles_into_one_graph(name, recorder):
    # The choice that "auto" makes there must not break the graph either. (torchvision's way of pooling on several
    # levels, which is left out, does: it asks which RoIs are on which.)
    call = CALLS[name]
    cpu = torch.device("cpu")
    expected = run(call, cpu, "auto")
    compiled = torch.compile(call.run, fullgraph=True, backend=recorder.backend)
    assert_same(run(call, cpu, "auto", compiled), expected)


@each_call
def test_calls_never_wait_for_the_device(call, device):
    # The whole public op, forward and backward: nothing around the custom op waits either.
    with forbid_sync(), record_launches() as launches:
        run(call, device, "triton")
    assert len(launches) >= len(call.operators)


@each_call
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "torchvision"])
def test_autocast_changes_nothing(call, backend, device):
    # Each op chooses its precision from its inputs alone.
    assert_same(run(call, device, backend, autocast=True), run(call, device, backend))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_half_boxes_are_no_labels(dtype, autocast, device):
    # fp16 is half a pixel coarse at 512: boxes that reach these two ops in half have lost what they decide by. Autocast
    # does not make them welcome.
    with torch.autocast(device.type, BF16, enabled=autocast):
        with pytest.raises(TypeError, match="must be float32"):
            label_anchors(boxes(3).to(device), boxes(1, 2, dtype=dtype).to(device), COUNT[:1].to(device))
        with pytest.raises(TypeError, match="must be float32"):
            nms_mask(boxes(1, 2, dtype=dtype).to(device), torch.ones(1, 2, dtype=torch.bool, device=device), 0.5)


@pytest.mark.parametrize("name", ["paste_masks", "mask_predictor_loss", "mask_bce_loss", "mask_targets"])
def test_numbers_of_rois_share_a_graph(name, device):
    # Detections and positives differ in number from image to image: a graph for each would end at the limit of eight.
    def call(n):
        values, box = torch.rand(n, 4, 4, device=device), boxes(n).to(device)
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        if name == "paste_masks":
            return lambda: paste_masks(values, box, (9, 11), backend="triton")
        if name == "mask_targets":
            pool = bitmaps().to(device)
            return lambda: mask_targets(pool, box[None].expand(2, -1, 4), labels.expand(2, -1), 5, backend="triton")
        features, weight = torch.rand(n, 9, 4, 4, device=device), torch.rand(2, 9, device=device)
        if name == "mask_bce_loss":
            return lambda: mask_bce_loss(features, labels, values, backend="triton")
        return lambda: mask_predictor_loss(features, weight, None, labels, values, relu=True, backend="triton")

    graphs = []
    torch._dynamo.reset()
    backend = lambda graph, inputs: graphs.append(graph) or (lambda *args: [torch.zeros(())])
    compiled = torch.compile(lambda call: call(), fullgraph=True, backend=backend)
    for n in (3, 4, 5, 7, 11, 12):
        compiled(call(n))
    assert len(graphs) <= 3
