import pytest
import torch

from bench.gate import WrongResultError, check_backward, check_forward
from bench.providers import get_provider, provider_dtype
from bench.timing import backward_call
from bench.workloads import DIRECTIONS, OPS, WORKLOADS, Sizes, Workload

TINY = {
    "roi_align": Sizes(2, (512, 672), rois=6, channels=3),
    "multiscale_roi_align": Sizes(2, (512, 672), rois=12, channels=3),
    "box_iou": Sizes(2, (512, 672), rois=20, objects=4),
    "label_anchors": Sizes(3, (128, 160), objects=5, ragged=True),
    "mask_bce_loss": Sizes(0, (512, 672), masks=3, classes=5, mask_size=8),
}


def tiny(op):
    return Workload(op, "tiny", "cpu", TINY[op])


def same(a, b):
    if isinstance(a, (list, tuple)):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("op", OPS)
def test_a_workload_is_the_same_every_time(op):
    # Providers are measured one after another, each on freshly built inputs: they must be equal.
    assert same(tiny(op).build("cpu", torch.float32).args, tiny(op).build("cpu", torch.float32).args)


def test_layout_and_dtype_do_not_change_the_numbers():
    # Triton gets channels_last and torchvision NCHW, and bf16 rows are compared with fp32 ones.
    plain = tiny("roi_align").build("cpu", torch.float32).args[0]
    rounded = tiny("roi_align").build("cpu", torch.bfloat16, "channels_last").args[0]
    assert rounded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.bfloat16(), rounded)


@pytest.mark.parametrize("name", ["canonical-box", "cpu"])
def test_rois_reach_every_level_and_overlap(name):
    # One level or disjoint boxes would flatter: no divergence between levels, no colliding gradient atomics.
    workload = next(w for w in WORKLOADS if (w.op, w.name) == ("multiscale_roi_align", name))
    slim = Workload(workload.op, name, "cpu", Sizes(2, workload.sizes.image_size, rois=128, channels=1))
    rois = slim.build("cpu", torch.float32).args[1]
    wh = rois[:, 3:] - rois[:, 1:3]
    levels = (4 + torch.log2(wh.prod(1).sqrt() / 224)).floor().clamp(2, 5)
    assert levels.unique().tolist() == [2, 3, 4, 5]
    first = rois[rois[:, 0] == 0, 1:]
    low, high = (
        torch.maximum(first[:, None, :2], first[None, :, :2]),
        torch.minimum(first[:, None, 2:], first[None, :, 2:]),
    )
    touching = (high > low).all(-1).float().mean()
    assert touching > 0.08  # of all pairs


def test_boxes_stay_inside_and_share_no_edges():
    # A tie of two edges has no single gradient: two correct box_iou backwards could differ there.
    proposals, objects = tiny("box_iou").build("cpu", torch.float32).args
    boxes = torch.cat([proposals, objects], dim=1)[0]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 672).all() and (boxes[:, 3] <= 512).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert all(len(edge.unique()) == len(edge) for edge in boxes.T)


def test_the_canonical_sizes_are_those_the_floors_were_computed_for():
    # Another number of anchors or cells would silently detach the results from the roofline figures.
    canonical = next(w for w in WORKLOADS if (w.op, w.name) == ("label_anchors", "canonical"))
    anchors, gt_boxes, gt_count = canonical.build("cpu", torch.float32).args
    assert anchors.shape == (268_569, 4) and gt_boxes.shape == (16, 50, 4) and gt_count.eq(50).all()
    maps = Workload("multiscale_roi_align", "slim", "cpu", Sizes(1, (800, 1344), rois=1, channels=1))
    assert sum(f.numel() for f in maps.build("cpu", torch.float32).args[0]) == 89_250


@pytest.mark.parametrize("provider", ["torchvision", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_baselines_pass_the_gate(op, provider):
    # A baseline that computes something else is a comparison with nothing (torch.compile: checked when timed).
    inputs = tiny(op).build("cpu", torch.float32, grad="backward" in DIRECTIONS[op])
    run = get_provider(provider, op)
    adapted = run.adapt(inputs)
    output = run(adapted)
    assert check_forward(op, inputs, output, torch.float32).require().error < 1e-4
    if "backward" in DIRECTIONS[op]:
        grad_output = torch.randn_like(output)
        grads = backward_call(output, adapted.leaves, grad_output)()
        assert check_backward(op, inputs, grads, grad_output, torch.float32).require().error < 1e-4


@pytest.mark.parametrize("op", OPS)
def test_the_gate_turns_red(op):
    # A gate that never fails would let a fast wrong kernel win.
    inputs = tiny(op).build("cpu", torch.float32)
    output = get_provider("torch", op)(inputs)
    wrong = (-1 - output[0], output[1]) if op == "label_anchors" else output * 1.01
    with pytest.raises(WrongResultError, match="exceeds"):
        check_forward(op, inputs, wrong, torch.float32).require()


def test_the_gate_turns_red_on_nan():
    # NaN compares false with every tolerance: the comparison has to be the right way round.
    inputs = tiny("box_iou").build("cpu", torch.float32)
    nan = torch.full_like(get_provider("torch", "box_iou")(inputs), float("nan"))
    with pytest.raises(WrongResultError):
        check_forward("box_iou", inputs, nan, torch.float32).require()


def test_torchvision_is_never_silently_measured_in_another_dtype():
    # It has no bf16 RoIAlign; rows carry the dtype that was really measured.
    assert provider_dtype("torchvision", "roi_align", torch.bfloat16) == torch.float32
    assert provider_dtype("torchvision", "mask_bce_loss", torch.bfloat16) == torch.bfloat16
    assert provider_dtype("triton", "roi_align", torch.bfloat16) == torch.bfloat16
