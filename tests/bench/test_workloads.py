import hashlib
from dataclasses import replace

import pytest
import torch
from tiny_workloads import TINY, tiny

import kernels
from bench import mask_inputs
from bench.boxes import anchor_grid
from bench.inputs import Inputs
from bench.mask_inputs import draw_pool
from bench.rpn_inputs import near_labels
from bench.workloads import DTYPE_NAMES, MASK_OPS, OPS, RPN_OPS, SUITES, WORKLOADS, Sizes, Workload, calls


def same(a, b):
    if isinstance(a, (list, tuple)):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, kernels.MaskPool):
        return same(a.flat(), b.flat())
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
    "mask_predictor_loss": "f856f6d24056",
    "mask_targets": "f4aa5496ef49",
    "paste_masks": "41298945140a",
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


def test_the_word_mask_selects_the_mask_branch():
    # `study --only mask` is how a session on a GPU gets these rows alone.
    for device in ("cuda", "cpu"):
        assert {call.workload.op for call in calls(device) if "mask" in call.words} == set(MASK_OPS)
    passes = {(c.workload.op, c.direction) for c in calls("cuda") if c.workload.op in MASK_OPS}
    losses, rest = ("mask_predictor_loss", "mask_bce_loss"), ("mask_targets", "paste_masks")
    assert passes == {(op, d) for op in losses for d in ("forward", "backward")} | {(op, "forward") for op in rest}
    types = {(w.op, DTYPE_NAMES[d]) for w in WORKLOADS if (w.op in MASK_OPS and w.suite == "train") for d in w.dtypes}
    assert types == {(op, d) for op in losses for d in ("bf16", "fp32")} | {("mask_targets", "fp32")}


def test_the_canonical_masks_are_those_of_the_goals():
    # 2048 positives of 81 classes, 128 of each of 16 images with 50 objects on average; 100 masks pasted.
    found = {w.op: w for w in WORKLOADS if w.op in MASK_OPS and w.suite in ("train", "inference")}
    features, weight, *_ = found["mask_predictor_loss"].boxes_only(torch.bfloat16).args
    assert (features.shape, weight.shape) == ((2048, 256, 28, 28), (81, 256))
    assert (features.dtype, weight.dtype) == (torch.bfloat16, torch.float32)  # as under autocast
    masks, boxes, image_size = found["paste_masks"].boxes_only(torch.float32).args
    assert (masks.shape, boxes.shape, image_size) == ((100, 28, 28), (100, 4), (800, 1333))
    pool, boxes, matched, size = found["mask_targets"].boxes_only(torch.float32).args
    assert (boxes.shape, size, pool.padded_size, pool.packed) == ((16, 128, 4), 28, (800, 1344), True)
    counts = (pool.extent[..., 2] > 0).sum(1)
    assert counts.float().mean() == 50 and counts.min() == 1 and counts.max() == 99
    objects = pool.extent.gather(1, matched[..., None].expand(-1, -1, 4)).float()
    iou = torch.stack([kernels.box_iou(a, b, backend="torch").diag() for a, b in zip(boxes, objects, strict=True)])
    assert (iou >= 0.5).float().mean() > 0.95  # boxes a detector takes for positive, of objects that are there


def test_a_pool_holds_blobs_in_the_boxes_of_its_objects():
    # The bits against an ordinary picture: a row, a byte or an offset out of place would be another workload.
    objects = torch.tensor([[[3.2, 2.0, 20.7, 11.5], [0, 0, 0, 0], [30.0, 5.0, 38.0, 21.9]], [[0, 0, 0, 0]] * 3])
    pool = draw_pool(objects, (24, 40), torch.Generator().manual_seed(0))
    assert pool.extent.tolist() == [[[3, 2, 21, 12], [0, 0, 0, 0], [30, 5, 38, 22]], [[0, 0, 0, 0]] * 3]
    assert pool.offset.tolist() == [[0, 0, 30], [0, 0, 0]] and len(pool.bitmaps) == 30 + 17
    assert pool.sizes.tolist() == [[24, 40]] * 2
    for slot, (x0, y0, x1, y1) in ((0, (3, 2, 21, 12)), (2, (30, 5, 38, 22))):
        mask = pool.dense(0)[slot]
        crop = mask[y0:y1, x0:x1]
        assert crop.sum() == mask.sum() and 0.6 < crop.float().mean() < 0.9  # an ellipse fills 0.785 of its box
        assert crop.any(1).all() and (crop.int().diff(dim=1).abs().sum(1) <= 2).all()  # one interval in each row
    assert not pool.dense(1).any()


def test_a_fresh_pool_has_other_masks_in_the_same_places():
    # Objects of other sizes would be a pool of another length, which cannot go into the same tensors.
    once, again = (tiny("mask_targets").build("cpu", torch.float32, fresh=n).args for n in (0, 1))
    assert torch.equal(once[0].extent, again[0].extent) and not torch.equal(once[0].bitmaps, again[0].bitmaps)
    assert not torch.equal(once[1], again[1])


def test_a_fingerprint_sees_the_pools_form_and_the_options():
    # The same bytes, packed or not, are other masks; with the ReLU it is another loss.
    inputs = tiny("mask_targets").build("cpu", torch.float32)
    plain = Inputs((replace(inputs.args[0], packed=False), *inputs.args[1:]))
    assert inputs.shapes() == plain.shapes() and inputs.numbers() != plain.numbers()
    workload = tiny("mask_predictor_loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mask_inputs.OPTIONS, "mask_predictor_loss", {"relu": False})
        changed = replace(workload).fingerprint
    assert changed != workload.fingerprint


def test_a_mapped_pool_keeps_its_integers():
    # The truth is computed from float64 copies; bits and places are none.
    inputs = tiny("mask_targets").build("cpu", torch.float32).map(lambda t: t.double() if t.is_floating_point() else t)
    pool, boxes, *_ = inputs.args
    assert boxes.dtype == torch.float64 and pool.bitmaps.dtype == torch.uint8
