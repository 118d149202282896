import hashlib
from dataclasses import replace

import pytest
import torch
from tiny_workloads import TINY, tiny

import kernels
from bench.boxes import anchor_grid
from bench.rpn_inputs import near_labels
from bench.workloads import DTYPE_NAMES, OPS, RPN_OPS, SUITES, WORKLOADS, Sizes, Workload, calls


def same(a, b):
    if isinstance(a, (list, tuple)):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, kernels.AnchorGrid):
        return torch.equal(a.cells, b.cells) and (a.extents, a.strides) == (b.extents, b.strides)
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


@pytest.mark.parametrize("op", OPS)
def test_a_fresh_draw_has_other_values_in_the_same_shapes(op):
    # After timing, other values go into the same tensors: equal ones would let a kept result pass.
    once, again = (tiny(op).build("cpu", torch.float32, fresh=n) for n in (0, 1))
    assert once.shapes() == again.shapes() and not same(once.args, again.args)
    if "label" in op:
        assert torch.equal(once.args[2], again.args[2])  # providers hold slices of the first `count` boxes
    once.overwrite(again)
    assert same(once.args, again.args)


FROZEN = {
    "multiscale_roi_align": "c091cdcc4da3",
    "multiscale_roi_align roi-size": "629379d0a9a0",
    "joint_multiscale_roi_align": "906c8e19045e",
    "roi_align": "7e8d2c240bb3",
    "roi_align one-image": "1079d7ac6303",
    "label_anchors": "800ec4bc41be",
    "label_grid_anchors": "d6406780bf34",
    "box_iou": "a65d954a1e2e",
    "box_iou anchors": "c7bf0e9bd48b",
    "rpn_loss": "a647122d6a69",
    "stable_topk": "c62c5f6cce14",
    "decode_proposals": "951b6920e646",
    "nms_mask": "33b229841d6a",
    "mask_bce_loss": "5ba62f238de3",
}


@pytest.mark.parametrize("group", FROZEN)
def test_the_generators_are_frozen(group):
    # Committed results were measured on these very boxes. A changed hash makes all of them stale: change it only
    # together with the reports. A workload that is added gets a hash of its own, so that the others keep theirs.
    prints = "".join(w.fingerprint for w in WORKLOADS if group_of(w) == group)
    assert hashlib.sha256(prints.encode()).hexdigest()[:12] == FROZEN[group]


def group_of(workload):
    """The longest key of FROZEN that the workload's op and name begin with."""
    return max((g for g in FROZEN if f"{workload.op} {workload.name}".startswith(g)), key=len)


def test_a_fingerprint_sees_boxes_and_sizes():
    # Two workloads that differ in the distribution alone, or in a size alone, must not pass for each other.
    sizes = TINY["roi_align"]
    changed = [Sizes(2, (512, 672), rois=6, channels=n, boxes=b) for n, b in ((3, "uniform"), (4, "clustered"))]
    prints = {Workload("roi_align", "tiny", "cpu", s).fingerprint for s in (sizes, *changed)}
    assert len(prints) == 3


def test_a_fingerprint_sees_the_grid():
    # Anchors that are made in the kernel are in no tensor: a map of another size would pass for the old one.
    sizes = tiny("label_grid_anchors").sizes
    changed = [Workload("label_grid_anchors", "tiny", "cpu", s) for s in (sizes, replace(sizes, image_size=(128, 164)))]
    inputs = [w.build("cpu", torch.float32) for w in changed]
    inputs[1].args = (inputs[1].args[0], *inputs[0].args[1:])
    assert len({str((i.shapes(), i.numbers())) for i in inputs}) == 2


def test_a_fingerprint_sees_how_many_bins_each_set_gets():
    # The sizes of a joint op's outputs are in a list, and decide half of its bytes.
    changed = [tiny("joint_multiscale_roi_align").sizes] * 2
    changed[1] = replace(changed[0], output_size=8)
    prints = {Workload("joint_multiscale_roi_align", "tiny", "cpu", s).fingerprint for s in changed}
    assert len(prints) == 2


@pytest.mark.parametrize("side", [32, 512])
def test_rois_of_one_size_are(side):
    # A point of the curve over RoI size: proposals of another size would be on it, too.
    workload = Workload("roi_align", "one-size", "cpu", Sizes(1, (800, 1344), rois=64, channels=1, roi_size=side))
    boxes = workload.build("cpu", torch.float32).args[1][:, 1:]
    wh = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(wh.prod(1).sqrt(), torch.full((64,), float(side)), rtol=1e-4, atol=0)
    assert 0.5 <= (wh[:, 0] / wh[:, 1]).min() < 0.7 and 1.4 < (wh[:, 0] / wh[:, 1]).max() <= 2.0
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] < torch.tensor([1344, 800])).all()


def test_joint_rois_are_of_one_distribution():
    # Mask RoIs lie around the same objects as the box RoIs, as a step's positives do, and are not the same boxes.
    boxes, masks = (r[r[:, 0] == 0, 1:] for r in tiny("joint_multiscale_roi_align").boxes_only(torch.float32).args[1])
    assert len(boxes) == 9 and len(masks) == 4
    assert not torch.isin(masks, boxes).any()


def test_names_are_unique_and_the_training_step_comes_first():
    # Results are found by name; a study that is cut off must have spent its time on what matters.
    assert len({(w.op, w.name) for w in WORKLOADS}) == len(WORKLOADS)
    order = [SUITES.index(c.workload.suite) for c in calls("cuda")]
    assert order == sorted(order)
    assert {c.workload.op for c in list(calls("cuda"))[:10]} >= {"multiscale_roi_align", "label_anchors", "box_iou"}


@pytest.mark.parametrize("boxes", ["one_spot", "whole_map"])
def test_adversarial_boxes_are_what_they_are_called(boxes):
    # One spot: all gradient atomics collide. Whole map: a RoI longer than any tile of cells.
    workload = Workload("roi_align", boxes, "cpu", Sizes(1, (512, 672), rois=64, channels=1, boxes=boxes))
    rois = workload.build("cpu", torch.float32).args[1][:, 1:]
    if boxes == "one_spot":
        assert (rois.amax(0) - rois.amin(0)).max() <= 2
    else:
        assert ((rois[:, 2:] - rois[:, :2]) > 0.89 * torch.tensor([672, 512])).all()
    assert (rois[:, :2] >= 0).all() and (rois[:, 2:] < torch.tensor([672, 512])).all()
    assert len(rois.unique(dim=0)) == 64


@pytest.mark.parametrize("name", ["train-box", "cpu"])
def test_rois_reach_every_level_and_overlap(name):
    # One level or disjoint boxes would flatter: no divergence between levels, no colliding gradient atomics.
    workload = next(w for w in WORKLOADS if (w.op, w.name) == ("multiscale_roi_align", name))
    slim = Workload(workload.op, name, "cpu", Sizes(2, workload.sizes.image_size, rois=128, channels=1))
    rois = slim.boxes_only(torch.float32).args[1]
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
    train = next(w for w in WORKLOADS if (w.op, w.name) == ("label_anchors", "train"))
    anchors, gt_boxes, gt_count = train.build("cpu", torch.float32).args
    assert anchors.shape == (268_569, 4) and gt_boxes.shape == (16, 99, 4)
    assert gt_count.float().mean() == 50 and gt_count.min() == 1 and gt_count.max() == 99
    train = next(w for w in WORKLOADS if (w.op, w.name) == ("label_grid_anchors", "train"))
    grid, _, count = train.build("cpu", torch.float32).args
    assert torch.equal(grid.anchors(), anchors) and torch.equal(count.msort(), gt_count.msort())
    tall = next(w for w in WORKLOADS if (w.op, w.name) == ("box_iou", "anchors")).boxes_only(torch.float32)
    assert [len(boxes) for boxes in tall.args] == [268_569, 100]
    maps = Workload("multiscale_roi_align", "slim", "cpu", Sizes(1, (800, 1344), rois=1, channels=1))
    assert sum(f.numel() for f in maps.build("cpu", torch.float32).args[0]) == 89_250


@pytest.mark.parametrize("objects", [1, 30])
def test_near_labels_are_the_labels(objects):
    # A loss on made-up labels would gather another number of positives, from other places.
    grid = anchor_grid((256, 320))
    sizes = Sizes(1, (256, 320), objects=objects)
    boxes = Workload("label_anchors", "near", "cpu", sizes).build("cpu", torch.float32).args[1][0]
    boxes = torch.cat([boxes, boxes[:1]])  # a tie: the first takes the anchors
    expected = kernels.label_grid_anchors(grid, boxes[None], torch.tensor([len(boxes)]), backend="torch")
    labels, matched = near_labels(grid, boxes)
    assert torch.equal(labels, expected[0][0]) and torch.equal(matched, expected[1][0].long())
    assert {1, 0} <= set(labels.tolist())


def test_slots_hold_a_draw_of_the_labels():
    # The op promises nothing where an anchor is drawn twice; all positives or none would be another loss.
    workload = tiny("rpn_loss")
    logits, _, grid, boxes, matched, index, drawn, positive = workload.build("cpu", torch.float32).args
    assert logits.shape == (3, len(grid)) and index.shape == (3, 32) and drawn.all()
    for image in range(3):
        count = int((boxes[image].abs().sum(1) > 0).sum())
        labels, matches = near_labels(grid, boxes[image, :count])
        assert torch.equal(matched[image].long(), matches)
        assert len(index[image].unique()) == 32 and 0 < positive[image].sum() <= 16
        assert torch.equal(labels[index[image]] == 1, positive[image]) and (labels[index[image]] >= 0).all()


def test_a_map_without_enough_anchors_leaves_slots_empty():
    # 45 anchors for 256 slots: what is not drawn must not look like a draw of anchor 0.
    sizes = Sizes(1, (20, 20), objects=1, slots=256)
    *_, index, drawn, positive = Workload("rpn_loss", "narrow", "cpu", sizes).build("cpu", torch.float32).args
    number = int(drawn.sum())
    assert 0 < number < 256 and drawn[0, :number].all() and len(index[0, :number].unique()) == number
    assert not (positive & ~drawn).any()


def test_groups_of_boxes_are_an_images_levels():
    # The highest level has fewer anchors than are asked for: its group is not full, as in the model.
    boxes, valid, threshold = (
        next(w for w in WORKLOADS if (w.op, w.name) == ("nms_mask", "train")).build("cpu", torch.float32).args
    )
    assert boxes.shape == (80, 2000, 4) and threshold == 0.7
    assert valid.view(16, 5, 2000).sum(-1).unique(dim=0).tolist() == [[2000, 2000, 2000, 2000, 819]]
    assert not boxes[~valid].any() and (boxes[valid][:, 2:] > boxes[valid][:, :2]).all()
    kept = kernels.nms_mask(boxes[:1, :500], valid[:1, :500], threshold, backend="torch").sum()
    assert 100 < kept < 450  # neither everything nor a handful


def test_the_word_rpn_selects_what_a_proposal_network_needs():
    # `study --only rpn` is how a session on a GPU gets these rows alone.
    found = {call.workload.op for call in calls("cuda") if "rpn" in call.words}
    assert found == set(RPN_OPS) and {"label_grid_anchors", "rpn_loss", "nms_mask", "box_iou"} <= found
    assert {c.workload.op for c in calls("cpu") if "rpn" in c.words} == found
    types = {DTYPE_NAMES[d] for w in WORKLOADS if (w.op, w.suite) == ("rpn_loss", "train") for d in w.dtypes}
    assert types == {"bf16", "fp32"}
