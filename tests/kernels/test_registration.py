"""What PyTorch relies on to trace, compile and autocast the ops, checked for every op."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from forbid_sync import forbid_sync
from functorch.compile import make_boxed_func
from registered_ops import (
    BF16,
    COUNT,
    FP16,
    FP32,
    LEVELS_OF_GRID,
    MATCHES,
    OPERATORS,
    SCALES,
    bitmaps,
    boxes,
    chosen,
    grid,
    maps,
    masks,
    predictor_inputs,
    rois,
    slots,
    to,
)
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
from kernels.mask_bce_loss import op as mask
from kernels.mask_predictor_loss import op as predictor
from kernels.roi_align import library as roi
from kernels.rpn_loss import op as loss
from kernels.runtime import record_launches


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
    # One that is registered and not in the list (registered_ops.py) would be checked by nobody.
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
