"""Which rows a call has, and what the less usual providers do."""

import pytest
import torch
from tiny_workloads import tiny

import kernels
from bench import mask_providers, measure
from bench.gate import Truth
from bench.inputs import Inputs
from bench.measure import Contestant, Draws, measure_call
from bench.parts import listed
from bench.providers import (
    APART,
    ATOMIC,
    BASELINES,
    DETERMINISTIC_TORCHVISION,
    Provider,
    Variant,
    deterministic,
    get_provider,
    is_ours,
    may_decide_otherwise,
    variants,
    why_not_here,
)
from bench.repeats import MOST_RUNS, repeats_bit_for_bit
from bench.timing import CpuClock
from bench.workloads import DETERMINISTIC, DIRECTIONS, MASK_OPS, OPS, ROI_OPS, RPN_OPS, Call, Sizes, Workload, calls


def providers(call):
    return {v.provider for v in variants(call)}


def test_each_form_stands_where_it_was_asked_for():
    # Atomics beside the gather where training and the worst cases are; torchvision's deterministic mode only where it
    # has the memory: at training sizes it would take down the study.
    for call in calls("cuda"):
        found, workload = providers(call), call.workload
        pooled = workload.op in ROI_OPS and call.direction == "backward"
        assert (ATOMIC in found) == (pooled and workload.suite in ("train", "adversarial"))
        assert (APART in found) == (workload.op == "joint_multiscale_roi_align")
        assert (DETERMINISTIC_TORCHVISION in found) == (workload.name == DETERMINISTIC)
        assert found >= {"triton", *BASELINES}


def test_what_is_ours_is_no_baseline():
    # Else a kernel that lost to its own other form would be reported as slower than the best baseline.
    assert [p for p in (*BASELINES, ATOMIC, APART, DETERMINISTIC_TORCHVISION, "triton") if is_ours(p)] == [
        ATOMIC,
        APART,
        "triton",
    ]
    assert not set(BASELINES) & {ATOMIC, APART, DETERMINISTIC_TORCHVISION, "triton"}


def test_on_a_cpu_the_flag_changes_nothing():
    # torchvision looks at it on a GPU only: a time under that name would be the ordinary op's.
    call = next(c for c in calls("cuda") if c.workload.name == DETERMINISTIC)
    reason = why_not_here(DETERMINISTIC_TORCHVISION, call, "cpu")
    assert "on a CPU" in reason and why_not_here(DETERMINISTIC_TORCHVISION, call, "cuda") is None
    assert "interpreter speed" in why_not_here(ATOMIC, call, "cpu")


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_mode_ends_with_the_call(before):
    # Left on, it would slow down, or break, whoever is measured next.
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        with pytest.raises(KeyError), deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_mode_is_on_forward_and_backward(monkeypatch):
    # The forward decides which path is taken, the backward which gradient of an index there is.
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, feature, *rest):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return feature.sum()[None]

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return torch.zeros(2, 3, 32, 42), *[None] * 4

    assert get_provider(DETERMINISTIC_TORCHVISION, "roi_align").mode is deterministic
    watched = Provider("watched", "roi_align", Watched.apply, mode=deterministic)
    monkeypatch.setattr(measure, "get_provider", lambda name, op: watched)
    variant = Variant("watched", torch.float32, "nchw")
    Contestant(variant, Draws(Call(tiny("roi_align"), "backward", torch.float32), "cpu"), CpuClock())()
    assert seen == [True, True, True] and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("op", "provider"),
    [*((op, ATOMIC) for op in ROI_OPS), *(("joint_multiscale_roi_align", p) for p in ("triton", APART))],
)
def test_our_forms_pass_the_gate(op, provider, device):
    # Without a GPU no study runs them: in the interpreter they have to give what the reference does, lists and all.
    sizes = Sizes(1, (64, 96), rois=4, mask_rois=2, channels=3, stride=8)
    inputs = Workload(op, "mini", "cpu", sizes).build(device.type, torch.float32, "channels_last", grad=True)
    outputs = listed(get_provider(provider, op)(inputs))
    truth, grad_outputs = Truth(op, inputs), [torch.randn_like(o) for o in outputs]
    truth.check_forward(outputs, torch.float32).require()
    grads = torch.autograd.grad(outputs, inputs.leaves, grad_outputs)
    truth.check_backward(grads, grad_outputs, torch.float32).require()


@pytest.mark.parametrize("op", [op for op in RPN_OPS if op != "box_iou"])
def test_our_proposal_ops_pass_the_gate(op, device):
    # Grids, lists and two outputs go through the same harness: on a GPU a study must not be the first to try.
    sizes = Sizes(1, (64, 64), rois=10, objects=2, levels=2, slots=8)
    grad = "backward" in DIRECTIONS[op]
    inputs = Workload(op, "mini", "cpu", sizes).build(device.type, torch.float32, grad=grad)
    outputs = listed(get_provider("triton", op)(inputs))
    truth, grad_outputs = Truth(op, inputs), [torch.ones_like(o) for o in outputs]
    truth.check_forward(outputs, torch.float32).require()
    if grad:
        grads = torch.autograd.grad(outputs, inputs.leaves, grad_outputs)
        truth.check_backward(grads, grad_outputs, torch.float32).require()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", MASK_OPS)
def test_our_mask_ops_pass_the_gate(op, layout, device):
    # A pool, three leaves and a keyword go through the same harness: on a GPU a study must not be the first to try.
    sizes = Sizes(2, (40, 56), rois=2, objects=2, masks=3, classes=4, channels=9, mask_size=5)
    grad = "backward" in DIRECTIONS[op]
    if layout == "channels_last" and not grad:
        pytest.skip("the op has no choice of layouts")
    inputs = Workload(op, "mini", "cpu", sizes).build(device.type, torch.float32, layout, grad=grad)
    outputs = listed(get_provider("triton", op)(inputs))
    truth, grad_outputs = Truth(op, inputs), [torch.full_like(o, 3.0) for o in outputs]
    truth.check_forward(outputs, torch.float32).require()
    if grad:
        grads = torch.autograd.grad(outputs, inputs.leaves, grad_outputs)
        truth.check_backward(grads, grad_outputs, torch.float32).require()
        channels_last = grads[0].is_contiguous(memory_format=torch.channels_last)
        assert channels_last == (layout == "channels_last")  # what the row is called is what it ran in


def test_rows_of_the_mask_losses():
    # Which layout is torchvision's best nobody knows before: the best of both is the baseline, compiled too.
    for op in ("mask_predictor_loss", "mask_bce_loss"):
        found = [(v.provider, v.layout) for v in variants(Call(tiny(op), "backward", torch.bfloat16))]
        both = [(p, lay) for p in ("triton", "torchvision", "torch.compile") for lay in ("channels_last", "nchw")]
        assert sorted(found) == sorted([*both, ("torch", "channels_last")])
        assert {v.dtype for v in variants(Call(tiny(op), "backward", torch.bfloat16))} == {torch.bfloat16}


def test_what_is_compiled_of_the_mask_branch():
    # The reference multiplies by one class's weights: compiled, it would not be the path that models have today.
    found = get_provider("torch.compile", "mask_predictor_loss")
    assert found.name == "torch.compile" and found.mode is mask_providers.convolutions
    assert found.call._torchdynamo_orig_callable is mask_providers._mask_predictor_loss
    train = [c for c in calls("cuda") if c.workload.suite in ("train", "inference") and c.workload.op in MASK_OPS]
    first = [c for c in train if c.dtype == c.workload.dtypes[0]]
    skipped = {c.workload.op: why_not_here("torch.compile", c, "cuda") for c in first}
    assert {op for op, reason in skipped.items() if reason} == {"paste_masks"} and "trace" in skipped["paste_masks"]
    slow = {c.workload.op for c in calls("cpu") if why_not_here("torch.compile", c, "cpu")}
    assert slow & set(MASK_OPS) == {"mask_predictor_loss", "mask_targets", "paste_masks"}


@pytest.mark.parametrize("before", [False, True])
def test_convolutions_leave_cudnn_as_it_was(before):
    # TF32 left off, or algorithms tried, would slow down or change whoever is measured next.
    cudnn = torch.backends.cudnn
    kept = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = before, before
    try:
        with pytest.raises(KeyError), mask_providers.convolutions():
            assert cudnn.benchmark and not cudnn.allow_tf32
            raise KeyError
        assert (cudnn.benchmark, cudnn.allow_tf32) == (before, before)
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = kept


def test_torchvisions_masks_are_in_memory_before_the_clock_starts(monkeypatch):
    # Bytes of full size, an image's own, as its data loader leaves them: making them of a pool is nobody's path.
    inputs, run = tiny("mask_targets").build("cpu", torch.float32), get_provider("torchvision", "mask_targets")
    pool = inputs.args[0]
    masks, boxes, matched, size = run.adapt(inputs).args
    for image, (of_image, number) in enumerate(zip(masks, (pool.extent[..., 2] > 0).sum(1).tolist(), strict=True)):
        assert of_image.dtype == torch.uint8 and of_image.shape == (number, 128, 160)
        assert torch.equal(of_image.bool(), pool.dense(image)[:number])
    assert len(boxes) == len(matched) == 3 and size == 8
    monkeypatch.setattr(kernels.MaskPool, "masks", None)
    assert run(Inputs((masks, boxes, matched, size))).shape == (3, 7, 8, 8)


@pytest.mark.parametrize("provider", ["torch", "torchvision"])
@pytest.mark.parametrize("op", ["label_grid_anchors", "rpn_loss", "decode_proposals"])
def test_baselines_get_their_anchors_before_the_clock_starts(op, provider, monkeypatch):
    # Making them up is our kernels' business: charged to a baseline, it would be a speed-up for nothing.
    inputs, run = tiny(op).build("cpu", torch.float32), get_provider(provider, op)
    adapted = run.adapt(inputs)
    monkeypatch.setattr(kernels.AnchorGrid, "anchors", None)
    assert run(adapted) is not None
    assert not any(isinstance(a, kernels.AnchorGrid) for a in adapted.args)


def test_torchvisions_loss_is_computed_its_way():
    # Every anchor of every image is encoded there: that, and the gradient through it, is what is compared with.
    inputs = tiny("rpn_loss").build("cpu", torch.float32, grad=True)
    run = get_provider("torchvision", "rpn_loss")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        from torchvision.models.detection import _utils

        encode = _utils.BoxCoder.encode_single
        patch.setattr(_utils.BoxCoder, "encode_single", lambda s, a, b: seen.append(len(b)) or encode(s, a, b))
        run(run.adapt(inputs))
    assert seen == [inputs.args[0].numel()]


def test_new_inputs_reach_what_a_provider_made_of_the_old():
    # torchvision's lists and masks are copies: left as they were, its second check would be of the first draw.
    for op in ("nms_mask", "rpn_loss", "decode_proposals", "mask_targets"):
        draws = Draws(Call(tiny(op), "forward", torch.float32), "cpu")
        contestant = Contestant(Variant("torchvision", torch.float32, "contiguous"), draws, CpuClock())
        before = listed(contestant())
        draws.refresh()
        contestant.refresh()
        contestant.check()
        assert not all(torch.equal(a, b) for a, b in zip(before, listed(contestant()), strict=True))


def test_who_may_decide_otherwise():
    # The rules are exact: nobody else is forgiven a label, and ours never.
    forgiven = {(p, op) for op in OPS for p in ("triton", *BASELINES) if may_decide_otherwise(p, op)}
    assert {("torchvision", "nms_mask"), ("torchvision", "paste_masks")} <= forgiven
    assert ("torchvision", "label_grid_anchors") not in forgiven
    assert ("torch.compile", "label_anchors") in forgiven and not {p for p, _ in forgiven} & {"triton", "torch"}


@pytest.mark.parametrize("op", ROI_OPS)
def test_backwards_say_whether_they_repeat(op):
    # What the column of the report is made of. A forward pass, and other ops, have nothing to say.
    rows = {r["provider"]: r for r in measure_call(Call(tiny(op), "backward", torch.float32), "cpu", 0.1)}
    assert (rows["torchvision"]["bitwise"], rows["torchvision"]["runs"]) == (True, MOST_RUNS["cpu"])
    assert "bitwise" not in rows["torch"] and "bitwise" not in rows["triton"]
    forward = measure_call(Call(tiny(op), "forward", torch.float32), "cpu", 0.1)
    assert not any("bitwise" in row for row in forward)


@pytest.mark.parametrize(("changed", "runs"), [(None, 3), (1e-45, 2), (-0.0, 2), (float("nan"), 2)])
def test_a_single_bit_is_seen(changed, runs):
    # An equality that tolerates anything would call atomics deterministic; NaN is a result like any other.
    count = []

    def call():
        count.append(1)
        grads = [torch.zeros(4).bfloat16(), torch.tensor([0.0, float("nan"), 1.0])]
        if changed is not None and len(count) == 3:
            grads[1][0] = changed
        return grads

    assert repeats_bit_for_bit(call, "cpu") == (changed is None, runs)
