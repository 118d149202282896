"""What lets a time or a demo through must not let NaN or a wrong number through."""

from dataclasses import replace

import pytest
import torch
from tiny_workloads import tiny

import kernels
from bench.follow import KERNELS, Following
from bench.gate import BOOLEANS, DECISIONS, LABEL_OPS, ROIS_AT_ONCE, ROUNDED_TOLERANCES, Truth, WrongResultError
from bench.parts import BATCHED, count_images, listed
from bench.providers import get_provider, variants
from bench.workloads import DIRECTIONS, OPS, ROI_OPS, WORKLOADS, Call, Sizes, Workload


@pytest.mark.parametrize("provider", ["torchvision", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_baselines_pass_the_gate(op, provider):
    # A baseline that computes something else is a comparison with nothing (torch.compile: checked when timed).
    inputs = tiny(op).build("cpu", torch.float32, grad="backward" in DIRECTIONS[op])
    run = get_provider(provider, op)
    adapted = run.adapt(inputs)
    output = run(adapted)
    truth = Truth(op, inputs)
    assert truth.check_forward(output, torch.float32).require().error < 1e-4
    if "backward" in DIRECTIONS[op]:
        grad_outputs = [torch.randn_like(o) for o in listed(output)]
        grads = torch.autograd.grad(listed(output), adapted.leaves, grad_outputs)
        assert truth.check_backward(grads, grad_outputs, torch.float32).require().error < 1e-4


@pytest.mark.parametrize("op", OPS)
def test_the_gate_turns_red(op):
    # A gate that never fails would let a fast wrong kernel win.
    inputs = tiny(op).build("cpu", torch.float32)
    *rest, last = listed(computed(op, inputs))
    if op in LABEL_OPS:
        rest[0] = -1 - rest[0]
    else:
        spoil = dict.fromkeys(BOOLEANS, torch.logical_not) | {"stable_topk": torch.fliplr}
        last = spoil.get(op, lambda right: right * 1.01)(last)
    with pytest.raises(WrongResultError, match="exceeds"):
        Truth(op, inputs).check_forward([*rest, last], torch.float32).require()


def computed(op, inputs, provider="torch"):
    run = get_provider(provider, op)
    return run(run.adapt(inputs))


def test_the_gate_turns_red_on_nan():
    # NaN compares false with every tolerance: the comparison has to be the right way round.
    inputs = tiny("box_iou").build("cpu", torch.float32)
    nan = torch.full_like(get_provider("torch", "box_iou")(inputs), float("nan"))
    with pytest.raises(WrongResultError):
        Truth("box_iou", inputs).check_forward(nan, torch.float32).require()


@pytest.mark.parametrize("op", ["roi_align", "joint_multiscale_roi_align"])
def test_more_rois_than_the_truth_takes_at_once(op):
    # It goes through them in pieces; a gradient that several pieces, or several sets, share has to be their sum.
    sizes = Sizes(1, (128, 160), rois=ROIS_AT_ONCE + 5, mask_rois=ROIS_AT_ONCE + 1, channels=1)
    inputs = Workload(op, "many", "cpu", sizes).build("cpu", torch.float32, grad=True)
    outputs = listed(get_provider("torch", op)(inputs))
    truth, grad_outputs = Truth(op, inputs), [torch.randn_like(o) for o in outputs]
    assert truth.check_forward(outputs, torch.float32).require().error < 1e-5
    grads = torch.autograd.grad(outputs, inputs.leaves, grad_outputs)
    assert truth.check_backward(grads, grad_outputs, torch.float32).require().error < 1e-5


def test_a_gradient_without_one_of_the_sets_is_refused():
    # A joint backward that forgets the mask RoIs would be the quickest of all.
    inputs = tiny("joint_multiscale_roi_align").build("cpu", torch.float32, grad=True)
    outputs = get_provider("torch", "joint_multiscale_roi_align")(inputs)
    grad_outputs = [torch.randn_like(o) for o in outputs]
    grads = torch.autograd.grad(outputs[0], inputs.leaves, grad_outputs[0])
    with pytest.raises(WrongResultError):
        Truth("joint_multiscale_roi_align", inputs).check_backward(grads, grad_outputs, torch.float32).require()


@pytest.mark.parametrize("fault", ["nan", "wrong"])
def test_a_wrong_gradient_is_refused(fault):
    # In the second gradient, behind a right one: Python's max() would drop its NaN.
    workload = next(w for w in WORKLOADS if (w.op, w.suite) == ("box_iou", "cpu"))
    inputs = workload.build("cpu", torch.float32, "contiguous", grad=True)
    exact = [leaf.detach().clone().requires_grad_() for leaf in inputs.leaves]
    iou = kernels.box_iou(*exact, backend="torch")
    grads = list(torch.autograd.grad(iou, exact, torch.ones_like(iou)))
    truth = Truth("box_iou", inputs)
    truth.check_backward(grads, [torch.ones_like(iou)], torch.float32).require()
    grads[1] = grads[1] * (float("nan") if fault == "nan" else 1.1)
    with pytest.raises(WrongResultError):
        truth.check_backward(grads, [torch.ones_like(iou)], torch.float32).require()


def test_the_truth_follows_a_new_incoming_gradient():
    # It is kept between providers, which share one; after timing there is another one.
    inputs = tiny("mask_bce_loss").build("cpu", torch.float32, grad=True)
    loss = get_provider("torch", "mask_bce_loss")(inputs)
    truth = Truth("mask_bce_loss", inputs)
    for incoming in (torch.tensor(1.0), torch.tensor(-3.0)):
        grads = torch.autograd.grad(loss, inputs.leaves, incoming, retain_graph=True)
        truth.check_backward(grads, [incoming], torch.float32).require()


@pytest.mark.parametrize("op", ROI_OPS)
def test_torchvision_in_float16_runs_and_is_refused(op):
    # It has to run, to be known as wrong rather than broken: its coordinates are float16, half a pixel coarse at 1000.
    workload = Workload(op, "large", "cpu", Sizes(1, (800, 1344), rois=16, mask_rois=16, channels=1))
    inputs = workload.build("cpu", torch.float16)
    output = get_provider("torchvision", op)(inputs)
    with pytest.raises(WrongResultError):
        Truth(op, inputs).check_forward(output, torch.float16).require()


def test_small_gradients_count():
    # Next to one large gradient the largest deviation hides that all the others are missing.
    inputs = tiny("mask_bce_loss").build("cpu", torch.float32, grad=True)
    truth = Truth("mask_bce_loss", inputs)
    (grad,) = truth._gradients([torch.tensor(1.0)])
    found = torch.where(grad.abs() > 0.99 * grad.abs().max(), grad, 0.99 * grad).float()
    checked = truth.check_backward([found], [torch.tensor(1.0)], torch.bfloat16)
    assert checked.error < checked.tolerance  # so far so good
    with pytest.raises(WrongResultError, match="norm"):
        truth.check_backward([0.97 * grad.float()], [torch.tensor(1.0)], torch.bfloat16).require()


def test_labels_have_to_be_equal_where_it_matters():
    # Without the low-quality rule a handful of 3,000 anchors differ: few of all, many of the positives.
    inputs = tiny("label_anchors").build("cpu", torch.float32)
    labels, matches = kernels.label_anchors(*inputs.args, allow_low_quality_matches=False, backend="torch")
    for rounded in (False, True):
        with pytest.raises(WrongResultError):
            Truth("label_anchors", inputs).check_forward((labels, matches), torch.float32, rounded).require()


@pytest.mark.parametrize("op", DECISIONS)
def test_ours_has_to_decide_exactly(op):
    # One label, box, pixel or place is a bug of a kernel; only of those who round otherwise a few are forgiven.
    sizes = Sizes(1, (256, 320), objects=20, rois=400, levels=1, masks=3)
    inputs = Workload(op, "one", "cpu", sizes).build("cpu", torch.float32)
    first, *rest = listed(computed(op, inputs))
    if op in LABEL_OPS:
        first[0, (first[0] == 1).nonzero()[0]] = 0
    elif op in BOOLEANS:
        first[tuple(first.nonzero()[0])] = False
    else:
        first[0, 7] += 1
    checked = [Truth(op, inputs).check_forward((first, *rest), torch.float32, rounded) for rounded in (False, True)]
    assert checked[0].error == checked[1].error > 0 == checked[0].tolerance
    assert checked[1].tolerance == ROUNDED_TOLERANCES[op]
    with pytest.raises(WrongResultError):
        checked[0].require()


def test_boxes_have_to_be_fp32s_whatever_the_deltas_are():
    # torchvision decodes bf16 deltas in bf16: a proposal up to eight pixels off would pass a tolerance for bf16.
    sizes = Sizes(2, (800, 1344), rois=50)
    inputs = Workload("decode_proposals", "large", "cpu", sizes).build("cpu", torch.bfloat16)
    truth = Truth("decode_proposals", inputs)
    boxes, scores = computed("decode_proposals", inputs)
    truth.check_forward((boxes, scores), torch.bfloat16).require()
    with pytest.raises(WrongResultError):  # all of them by half a pixel
        truth.check_forward((boxes + 0.5 * (scores[..., None] >= 0), scores), torch.bfloat16).require()
    with pytest.raises(WrongResultError):
        truth.check_forward(computed("decode_proposals", inputs, "torchvision"), torch.bfloat16).require()
    chosen = variants(Call(replace(tiny("decode_proposals"), suite="train"), "forward", torch.bfloat16))
    assert {v.dtype for v in chosen if v.provider == "torchvision"} == {torch.float32}


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_gradient_of_the_predictor_is_looked_at(wrong):
    # Those of the weight and the bias are small beside the features' 822 MB, and quickly left out.
    inputs = tiny("mask_predictor_loss").build("cpu", torch.float32, grad=True)
    loss = get_provider("torch", "mask_predictor_loss")(inputs)
    grads = list(torch.autograd.grad(loss, inputs.leaves))
    truth = Truth("mask_predictor_loss", inputs)
    truth.check_backward(grads, [torch.tensor(1.0)], torch.bfloat16).require()
    grads[wrong] = 0.9 * grads[wrong]
    with pytest.raises(WrongResultError):
        truth.check_backward(grads, [torch.tensor(1.0)], torch.bfloat16).require()


def test_the_predictor_is_checked_with_its_relu():
    # Without it a provider could skip the ReLU, which the model leaves to this op.
    inputs = tiny("mask_predictor_loss").build("cpu", torch.float32)
    loss = kernels.mask_predictor_loss(*inputs.args, backend="torch")
    with pytest.raises(WrongResultError):
        Truth("mask_predictor_loss", inputs).check_forward(loss, torch.bfloat16).require()


def test_one_of_two_losses_is_not_enough():
    # Each has its own gradient to see: the deltas' is that of the box loss alone.
    inputs = tiny("rpn_loss").build("cpu", torch.float32, grad=True)
    objectness, box = get_provider("torch", "rpn_loss")(inputs)
    incoming = [torch.tensor(2.0), torch.tensor(-3.0)]
    grads = torch.autograd.grad([objectness, box], inputs.leaves, incoming)
    truth = Truth("rpn_loss", inputs)
    truth.check_backward(grads, incoming, torch.float32).require()
    for wrong in ((grads[0], 0 * grads[1]), (0 * grads[0], grads[1]), (grads[0], -grads[1])):
        with pytest.raises(WrongResultError):
            truth.check_backward(wrong, incoming, torch.float32).require()


BATCHES = ("multiscale_roi_align", "joint_multiscale_roi_align", *BATCHED)


@pytest.mark.parametrize("op", BATCHES)
def test_every_image_can_be_checked(op):
    # A provider that computes only the images that are always looked at must not pass: others are drawn later.
    sizes = Sizes(4, (128, 160), rois=6, mask_rois=3, channels=2, objects=3, levels=1, masks=4)
    inputs = Workload(op, "four", "cpu", sizes).build("cpu", torch.float32)
    assert count_images(op, inputs) == 4
    output = computed(op, inputs)
    for images in ([1, 2], [3], [0, 2]):
        truth = Truth(op, inputs, images)
        truth.check_forward(output, torch.float32).require()
        last = listed(output)[-1]
        if op in ROI_OPS:  # of a joint op, the last set alone is wrong
            last[listed(inputs.args[1])[-1][:, 0] == images[-1]] += 1
        elif op in LABEL_OPS:
            output[0][images[-1]] = -1 - output[0][images[-1]]
        else:
            last[images[-1]] = ~last[images[-1]] if op in BOOLEANS else last[images[-1]] + 1
        with pytest.raises(WrongResultError):
            truth.check_forward(output, torch.float32).require()
        output = computed(op, inputs)


def test_every_group_of_an_image_can_be_checked():
    # A group is a level of an image: to draw among as many groups as there are images would leave four in five out.
    inputs = tiny("nms_mask").build("cpu", torch.float32)
    assert count_images("nms_mask", inputs) == 10 and count_images("mask_bce_loss", inputs) == 0


def test_torchvision_is_never_silently_measured_in_another_dtype():
    # It has no bf16 RoIAlign: rows carry the dtypes that were really measured, the best one and the nearest one.
    dtypes = {}
    for op in ("roi_align", "mask_bce_loss"):
        chosen = variants(Call(replace(tiny(op), suite="train"), "forward", torch.bfloat16))
        dtypes[op] = {v.dtype for v in chosen if v.provider == "torchvision"}
    assert dtypes == {"roi_align": {torch.float32, torch.float16}, "mask_bce_loss": {torch.bfloat16}}


@pytest.mark.parametrize(
    "field", ["loss_errors", "gradient_errors", "decode_errors", "score_errors", "pyramid_gradients"]
)
def test_following_refuses_nan(field):
    # make demo must not go green on a diverged model.
    good = Following(
        loss_errors=[0.0], gradient_errors=[0.0], decode_errors=[0.0], score_errors=[0.0], pyramid_gradients=[1.0],
        rois=[9], levels=[3], anchors=2000,
    )  # fmt: skip
    good.launches.update(k for names in KERNELS.values() for k in names)
    assert good.ok
    getattr(good, field).append(float("nan"))
    assert not good.ok
