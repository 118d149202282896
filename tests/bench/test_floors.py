"""Floors are compared with slow counts on tiny inputs: a floor too high would promise what nobody can reach."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_workloads import tiny

import kernels
from bench.boxes import anchor_grid, random_objects
from bench.floors import IOU, IOU_BACKWARD, Floor, floor, overlapping_pairs, roof
from bench.inputs import Inputs
from bench.mask_floors import MASK, MASK_BACKWARD
from bench.parts import listed
from bench.providers import get_provider
from bench.workloads import DIRECTIONS, MASK_OPS, RPN_OPS, WORKLOADS

FP32, BF16 = torch.float32, torch.bfloat16
SCALES = [1 / 4, 1 / 8]
CHANNELS = 32  # one lane each: instructions are then the multiply-adds of one channel


def maps(images=2, height=64, width=96, channels=CHANNELS):
    shapes = [(images, channels, round(height * s), round(width * s)) for s in SCALES]
    return [torch.zeros(shape, requires_grad=True) for shape in shapes]


def rois(count=12):
    """RoIs of both images and levels; one in three sticks out of the map."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(torch.empty(count, 2).uniform_(1.0, 5.2, generator=generator))
    center = torch.rand(count, 2, generator=generator) * torch.tensor([96.0, 64.0])
    image = torch.randint(0, 2, (count, 1), generator=generator).float()
    boxes = torch.cat([center - size / 2, center + size / 2], dim=1)
    boxes[2::3] += 40
    return torch.cat([image, boxes], dim=1)


def roi_floor(features, boxes, ratio=2, direction="forward", dtype=FP32, output=3, aligned=False):
    inputs = Inputs((features, boxes, output, SCALES, ratio, aligned))
    return floor("multiscale_roi_align", direction, inputs, dtype)


def read_cells(features, boxes, ratio, aligned, pick=None, output=3):
    """(level, image, y, x) of the cells with a weight in `pick`ed output elements: those whose gradient is not zero."""
    out = kernels.multiscale_roi_align(features, boxes, output, SCALES, ratio, aligned, backend="torch")
    out = out.sum() if pick is None else out[(0, 0, *pick)]
    grads = torch.autograd.grad(out, features, allow_unused=True)
    return {(i, image, y, x) for i, g in enumerate(grads) for image, c, y, x in g.nonzero().tolist() if c == 0}


def slow_multiply_adds(features, box, ratio, aligned):
    """The cheaper order of summing one RoI, along x or along y first, term by term."""
    bins = {b: read_cells(features, box[None], ratio, aligned, b) for b in itertools.product(range(3), repeat=2)}
    costs = []
    for first in (0, 1):  # the axis summed second: 0 is y
        partial = {}  # (line, bin of the first axis) -> cells on it
        second = 0
        for b, cells in bins.items():
            lines = {cell[2 + first] for cell in cells}
            second += len(lines)
            for line in lines:
                partial[line, b[1 - first]] = {c[3 - first] for c in cells if c[2 + first] == line}
        costs.append(second + sum(len(cells) - 1 for cells in partial.values()))
    return min(costs)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 0])
def test_roi_align_counts_what_the_reference_reads(ratio, aligned):
    # The geometry (levels, borders, fixed and adaptive grids) has to be the op's own.
    features, boxes = maps(), rois()
    cells = len(read_cells(features, boxes, ratio, aligned))
    expected = 4 * (boxes.numel() + CHANNELS * (cells + len(boxes) * 9))
    steps = sum(slow_multiply_adds(features, box, ratio, aligned) for box in boxes)
    assert 0 < cells < sum(f[:, 0].numel() for f in features)
    assert roi_floor(features, boxes, ratio, aligned=aligned) == Floor(expected, steps)


def test_roi_align_backward_writes_every_cell_and_reads_what_flows():
    # Zero gradients are written too; of grad_output, bins outside the map need not be read.
    features, boxes = maps(), rois()
    out = kernels.multiscale_roi_align([torch.ones_like(f) for f in features], boxes, 3, SCALES, 2, backend="torch")
    flowing = int((out != 0).sum())
    assert flowing < out.numel()
    expected = boxes.numel() * 4 + 2 * (sum(f.numel() for f in features) + flowing)
    assert roi_floor(features, boxes, direction="backward", dtype=BF16).dram_bytes == expected


def joint_floor(features, sets, sizes, direction="forward", dtype=FP32):
    return floor("joint_multiscale_roi_align", direction, Inputs((features, sets, sizes, SCALES, 2)), dtype)


def test_joint_pooling_reads_the_union_of_cells_once():
    # What joining can save at best: cells that box and mask RoIs share. Outputs and arithmetic are each set's own.
    features, boxes, masks = maps(), rois(), rois(20)[12:] + torch.tensor([0.0, 3, 3, 3, 3])
    apart = [read_cells(features, boxes, 2, False), read_cells(features, masks, 2, False, output=5)]
    union = len(apart[0] | apart[1])
    assert max(map(len, apart)) < union < sum(map(len, apart))
    found = joint_floor(features, [boxes, masks], [3, 5])
    assert found.dram_bytes == 4 * (5 * 20 + CHANNELS * (union + 12 * 9 + 8 * 25))
    singles = [roi_floor(features, boxes), roi_floor(features, masks, output=5)]
    assert found.instructions == sum(single.instructions for single in singles)


def test_joint_backward_writes_every_cell_once():
    # Apart, each set's call writes maps full of gradient, and autograd reads both to add them.
    features, boxes, masks = maps(), rois(), rois(20)[12:]
    singles = [
        roi_floor(features, boxes, direction="backward"),
        roi_floor(features, masks, output=5, direction="backward"),
    ]
    found = joint_floor(features, [boxes, masks], [3, 5], "backward")
    written = 4 * sum(f.numel() for f in features)
    assert found.dram_bytes == sum(single.dram_bytes for single in singles) - written
    assert joint_floor(features, [boxes], [3], "backward") == singles[0]


def test_equal_rois_cost_their_features_and_sums_once():
    # A thousand RoIs on one spot are an easy workload: their cells are in the cache after the first.
    features, one = maps(), torch.tensor([[0.0, 8, 8, 40, 40]])
    once, often = roi_floor(features, one), roi_floor(features, one.repeat(100, 1))
    assert often.instructions == once.instructions
    assert often.dram_bytes - once.dram_bytes == 99 * 4 * (5 + 9 * CHANNELS)


def test_no_rois_and_rois_that_meet_no_map():
    # Empty batches and padding slots happen in training.
    features = maps()
    cells = sum(f.numel() for f in features)
    away = torch.tensor(
        [[0, 500.0, 500, 600, 600], [0, -90, 0, -60, 30], [7, 0, 0, 50, 50], [0, float("nan"), 0, 9, 9]]
    )
    for ratio in (2, 0):
        assert roi_floor(features, torch.zeros(0, 5), ratio) == Floor(0, 0)
        assert roi_floor(features, torch.zeros(0, 5), ratio, "backward") == Floor(cells * 4, 0)
        assert roi_floor(features, away, ratio) == Floor(4 * (20 + len(away) * 9 * CHANNELS), 0)
        assert roi_floor(features, away, ratio, "backward") == Floor(4 * (20 + cells), 0)


def test_single_level_is_a_pyramid_of_one():
    # Its features and scale are not lists.
    feature, boxes = torch.zeros(2, CHANNELS, 16, 24), rois()
    single = floor("roi_align", "forward", Inputs((feature, boxes, 3, 1 / 4, 2)), FP32)
    assert single == floor("multiscale_roi_align", "forward", Inputs(([feature], boxes, 3, [1 / 4], 2)), FP32)


@pytest.mark.parametrize(("spots", "least", "most"), [(512, 0.55, 0.70), (64, 0.05, 0.30)])
def test_union_of_a_training_step(spots, least, most):
    # A simulation gave 63 % of all cells for evenly spread boxes: "every cell once" flatters, most for crowded ones.
    generator = torch.Generator().manual_seed(0)
    features = [torch.empty(16, 256, 800 // s, 1344 // s, device="meta") for s in (4, 8, 16, 32)]
    rows = []
    for image in range(16):
        boxes = random_objects(spots, (800, 1344), generator).repeat(512 // spots, 1)
        boxes += torch.rand(512, 1, generator=generator)
        rows.append(torch.cat([torch.full((512, 1), float(image)), boxes], dim=1))
    inputs = Inputs((features, torch.cat(rows), 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2))
    result = floor("multiscale_roi_align", "forward", inputs, BF16)
    cells = (result.dram_bytes - 8192 * 20 - 2 * 8192 * 256 * 49) / (2 * sum(f.numel() for f in features))
    assert least < cells < most
    assert result.instructions / 0.93e12 < 0.05e-3  # far below the bytes: RoIAlign's roof is not arithmetic


def iou_inputs(dtype=FP32):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.stack([random_objects(n, (200, 300), generator) for _ in range(3)]) for n in (40, 7))
    return a.to(dtype), b.to(dtype)


def test_box_iou():
    # fp64 is counted as such, since gradcheck's rows would otherwise be twice too good.
    a, b = iou_inputs()
    pairs = int((kernels.box_iou(a, b, backend="torch") > 0).sum())
    assert 0 < pairs < 3 * 40 * 7
    assert floor("box_iou", "forward", Inputs((a, b)), FP32) == Floor(4 * 3 * (47 * 4 + 280), pairs * IOU // 32)
    backward = floor("box_iou", "backward", Inputs((a, b)), FP32)
    assert backward == Floor(4 * 3 * 2 * 47 * 4 + 4 * pairs, pairs * IOU_BACKWARD // 32)
    wide = floor("box_iou", "forward", Inputs((a[0].double(), b[0].double())), torch.float64)
    assert wide.dram_bytes == 8 * (47 * 4 + 280)


def test_label_anchors():
    # Only objects that exist are read, and no pair is worth an instruction that a bound might not save.
    anchors, gt = iou_inputs()
    gt[1, 2, 0] = float("inf")
    count, anchors = torch.tensor([0, 5, 99], dtype=torch.int32), anchors[0]
    result = floor("label_anchors", "forward", Inputs((anchors, gt, count)), FP32)
    assert result == Floor(40 * 16 + 12 * 16 + 3 * 4 + 3 * 40 * 5, 0)
    nothing = floor("label_anchors", "forward", Inputs((anchors, gt, count * 0)), FP32)
    assert nothing == Floor(3 * 4 + 3 * 40 * 5, 0)  # the labels do not depend on the anchors


def test_a_grid_costs_its_cells():
    # The anchors of a grid are nowhere in memory: charging 16 bytes for each would let a kernel beat its floor.
    _, gt = iou_inputs()
    grid, count = anchor_grid((64, 96)), torch.tensor([0, 5, 99], dtype=torch.int32)
    result = floor("label_grid_anchors", "forward", Inputs((grid, gt, count)), FP32)
    assert result == Floor(5 * 3 * 16 + 12 * 16 + 3 * 4 + 3 * len(grid) * 5, 0)
    nothing = floor("label_grid_anchors", "forward", Inputs((grid, gt, count * 0)), FP32)
    assert nothing == Floor(3 * 4 + 3 * len(grid) * 5, 0)


def loss_inputs(dtype=FP32):
    """2 images of 9 anchors, 4 slots: image 0 has two positives with one object, image 1 a negative; 4 are empty."""
    drawn = torch.tensor([[True, True, True, False], [True, False, False, False]])
    positive = torch.tensor([[True, True, False, True], [False, False, False, False]])  # one in a slot that is empty
    index = torch.tensor([[3, 4, 5, 6], [3, 0, 0, 0]])
    logits, deltas = torch.zeros(2, 9, dtype=dtype), torch.zeros(2, 9, 4, dtype=dtype)
    matched = torch.ones(2, 9, dtype=torch.int32)
    return logits, deltas, torch.rand(9, 4), torch.rand(2, 5, 4), matched, index, drawn, positive


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rpn_loss_reads_its_slots(dtype):
    # Of 9 anchors 4 are drawn and 2 positive, and these two want one object: nothing else has to be read.
    size = dtype.itemsize
    read = 8 + 4 * (8 + 1 + size) + 2 * (4 * size + 4) + 2 * 16 + 16 + 2 * 4
    logits, deltas, *rest = loss_inputs(dtype)
    assert floor("rpn_loss", "forward", Inputs((logits, deltas, *rest)), dtype) == Floor(read, 0)
    backward = floor("rpn_loss", "backward", Inputs((logits, deltas, *rest)), dtype)
    assert backward == Floor(read + 2 * 9 * 5 * size, 0)
    grid = anchor_grid((20, 20))
    cells = floor("rpn_loss", "forward", Inputs((logits, deltas, grid, *rest[1:])), dtype)
    assert cells.dram_bytes == read - 2 * 16 + 5 * 3 * 16


def test_what_rpn_loss_is_said_to_read_is_what_it_depends_on():
    # The count, from the other side: NaN in all that is not counted changes neither loss nor gradient.
    logits, deltas, anchors, boxes, matched, index, drawn, positive = loss_inputs()
    chosen = drawn & positive
    spoilt = [torch.full_like(t, float("nan")) for t in (logits, deltas, anchors, boxes)]
    image, slot = drawn.nonzero(as_tuple=True)
    spoilt[0][image, index[image, slot]] = logits[image, index[image, slot]]
    image, slot = chosen.nonzero(as_tuple=True)
    spoilt[1][image, index[image, slot]] = deltas[image, index[image, slot]]
    spoilt[2][index[image, slot]] = anchors[index[image, slot]]
    spoilt[3][0, 1] = boxes[0, 1]
    rest = (matched, index, drawn, positive)
    losses = [kernels.rpn_loss(*four, *rest, backend="torch") for four in ((logits, deltas, anchors, boxes), spoilt)]
    assert all(torch.equal(a, b) and a.isfinite() for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize(("dtype", "k", "picked"), [(FP32, 7, 7), (BF16, 400, 300)])
def test_topk_reads_every_value(dtype, k, picked):
    # The largest could be anywhere, and asking for more than there are costs no more.
    values = torch.zeros(2, 300, dtype=dtype)
    assert floor("stable_topk", "forward", Inputs((values, k)), dtype) == Floor(
        600 * dtype.itemsize + 2 * picked * 8, 600 // 32
    )


def test_decoding_reads_what_was_picked():
    # Empty slots name no anchor, and one that two slots, or two images, name has to be read once an image at most.
    index = torch.tensor([[1, 2, 2, -1], [1, 3, -1, -1]])
    heads = torch.zeros(2, 9, dtype=BF16), torch.zeros(2, 9, 4, dtype=BF16)
    sizes = torch.zeros(2, 2, dtype=torch.int64)
    common = 2 * 4 * 8 + 32 + 4 * 5 * 2 + 2 * 4 * 20
    given = floor("decode_proposals", "forward", Inputs((*heads, index, torch.zeros(9, 4), sizes)), BF16)
    assert given == Floor(common + 3 * 16, 0)
    grid = floor("decode_proposals", "forward", Inputs((*heads, index, anchor_grid((20, 20)), sizes)), BF16)
    assert grid == Floor(common + 5 * 3 * 16, 0)


def test_nms_reads_boxes_that_count():
    # What is not valid may hold anything, and a box that is alone in its group is kept unseen.
    valid = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert floor("nms_mask", "forward", Inputs((torch.zeros(3, 3, 4), valid, 0.7)), FP32) == Floor(2 * 9 + 2 * 16, 0)


@pytest.mark.parametrize("op", (*RPN_OPS, *MASK_OPS))
def test_a_floor_is_no_more_than_what_is_handed_over(op):
    # Inputs read whole, outputs written whole, gradients too: a floor above that charges something twice.
    inputs = tiny(op).build("cpu", FP32, grad="backward" in DIRECTIONS[op])
    run = get_provider("torch", op)
    outputs = listed(run(run.adapt(inputs)))
    handed = sum(t.nbytes for t in (*inputs.tensors(), *outputs))
    assert 0 < floor(op, "forward", inputs, FP32).dram_bytes <= handed
    if inputs.leaves:
        handed += sum(leaf.nbytes for leaf in inputs.leaves)
        assert 0 < floor(op, "backward", inputs, FP32).dram_bytes <= handed


def test_boxes_that_touch_or_are_empty_do_not_overlap():
    # An IoU of zero needs no arithmetic; NaN compares false with everything.
    boxes = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [1, 1, 1, 3], [3, 3, 2, 2], [float("nan"), 0, 9, 9]])
    assert overlapping_pairs(boxes, boxes) == 2
    assert overlapping_pairs(boxes, boxes[:0]) == 0


def test_mask_loss_reads_one_channel_of_filled_slots():
    # Its whole point: 1 of 81 channels forward, while the backward has to write them all.
    logits, targets = torch.zeros(8, 81, 4, 4, dtype=BF16), torch.zeros(8, 4, 4)
    labels = torch.tensor([1, -1, 3, 4, -1, 6, 7, 80])
    read = 8 * 8 + 6 * 16 * (2 + 4) + 4
    inputs = Inputs((logits, labels, targets))
    assert floor("mask_bce_loss", "forward", inputs, BF16) == Floor(read, 96 * MASK // 32)
    expected = Floor(read + 2 * logits.numel(), 96 * MASK_BACKWARD // 32)
    assert floor("mask_bce_loss", "backward", inputs, BF16) == expected


def predictor(dtype=BF16):
    """8 slots of 16 pixels and 24 channels, 6 of them with RoIs, of 4 classes; the weight is fp32."""
    labels = torch.tensor([1, -1, 3, 3, -1, 6, 3, 80])
    features, targets = torch.zeros(8, 24, 4, 4, dtype=dtype), torch.zeros(8, 4, 4)
    return Inputs((features, torch.zeros(81, 24), torch.zeros(81), labels, targets))


def test_the_predictor_reads_features_once_and_one_class_of_each():
    # 81 channels are the ordinary path's business, and so is everything between the two passes.
    least = floor("mask_predictor_loss", "forward", predictor(), BF16)
    assert least == Floor(8 * 8 + 4 * (24 * 4 + 4) + 6 * 16 * (24 * 2 + 4) + 4, 0)
    backward = floor("mask_predictor_loss", "backward", predictor(), BF16)
    assert backward == Floor(8 * 8 + 4 * 24 * 4 + 4 + 8 * 24 * 16 * 2 + 81 * (24 + 1) * 4, 0)
    wide = Inputs(tuple(a.double() if a.is_floating_point() else a for a in predictor().args))
    found = floor("mask_predictor_loss", "forward", wide, torch.float64)
    assert found == Floor(8 * 8 + 4 * (24 * 8 + 8) + 6 * 16 * (24 * 8 + 8) + 8, 0)


def test_both_passes_of_the_predictor_are_the_bytes_of_its_goal():
    # 1644 MB of features and their gradient, 0.382 ms at 4.3 TB/s: what the goal of this op is stated in.
    train = next(w for w in WORKLOADS if (w.op, w.name) == ("mask_predictor_loss", "train"))
    inputs = train.boxes_only(BF16)
    both = sum(floor(train.op, direction, inputs, BF16).dram_bytes for direction in ("forward", "backward"))
    assert both == pytest.approx(2 * 2048 * 256 * 784 * 2, rel=5e-3) and both > 2 * 2048 * 256 * 784 * 2


def test_what_the_predictor_is_said_to_read_is_what_it_depends_on():
    # The count, from the other side: NaN in empty slots and in the weights of absent classes changes nothing.
    features, weight, bias, labels, targets = predictor(FP32).args
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(features.shape, generator=generator), torch.randn(81, 24, generator=generator)
    absent = torch.ones(81, dtype=torch.bool)
    absent[[1, 3, 6, 80]] = False
    four = (features, weight, bias, targets)
    spoilt = [t.clone() for t in four]
    spoilt[0][labels < 0], spoilt[3][labels < 0] = float("nan"), float("nan")
    spoilt[1][absent], spoilt[2][absent] = float("nan"), float("nan")
    losses = [
        kernels.mask_predictor_loss(x, w, b, labels, t, relu=True, backend="torch") for x, w, b, t in (four, spoilt)
    ]
    assert torch.equal(*losses) and losses[0].isfinite()


def pool_of(*boxes, packed=True):
    """One image of 32 x 48 pixels with full rectangles."""
    extents = torch.tensor(boxes, dtype=torch.int32)
    masks = torch.ones(len(boxes), 32, 48)
    return kernels.MaskPool.of([masks], [extents], len(boxes), (32, 48), packed)


@pytest.mark.parametrize(("packed", "touched"), [(True, 3 * 10 + 1 * 4), (False, 18 * 10 + 6 * 4)])
def test_targets_read_what_lies_below_a_box(packed, touched):
    # Object 0 has two boxes, of which the larger counts: columns 6 to 23 of 4..39, in bytes 0 to 2, by 10 rows. Object
    # 2 has one that reaches beyond it: its last 6 columns and 4 rows. Nobody wants object 1.
    pool = pool_of((4, 2, 40, 30), (0, 0, 9, 9), (30, 20, 46, 31), packed=packed)
    boxes = torch.tensor([[[5.5, 2.5, 23.5, 12.9], [10.0, 4.0, 12.0, 6.0], [39.2, 26.1, 60.0, 50.0]]])
    matched = torch.tensor([[0, 0, 2]])
    fixed = 3 * 16 + 3 * 8 + 16 + 2 * (8 + 16) + 3 * 25 * 4
    assert floor("mask_targets", "forward", Inputs((pool, boxes, matched, 5)), FP32) == Floor(fixed + touched, 0)
    binary = floor("mask_targets", "forward", Inputs((pool, boxes, matched, 5, "detectron2")), FP32)
    assert binary.dram_bytes == fixed + touched - 3 * 25 * 3


def test_a_box_beside_its_object_reads_no_bit():
    pool = pool_of((4, 2, 20, 12))
    boxes = torch.tensor([[[25.0, 2.0, 40.0, 12.0], [6.2, 3.0, 6.8, 9.0]]])  # the second holds no whole pixel
    found = floor("mask_targets", "forward", Inputs((pool, boxes, torch.zeros(1, 2, dtype=torch.int64), 5)), FP32)
    assert found.dram_bytes == 2 * 16 + 2 * 8 + 16 + 24 + 2 * 25 * 4


def test_targets_depend_on_every_pixel_that_is_counted():
    # Each on its own, one bit of a byte a pixel: clearing it must change the target of the box.
    pool = pool_of((4, 2, 40, 30), packed=False)
    box, matched = torch.tensor([[[6.4, 3.3, 31.7, 12.2]]]), torch.zeros(1, 1, dtype=torch.int64)
    plain = kernels.mask_targets(pool, box, matched, 5, backend="torch")
    counted = floor("mask_targets", "forward", Inputs((pool, box, matched, 5)), FP32).dram_bytes
    seen = 0
    for y, x in itertools.product(range(2, 30), range(4, 40)):
        place = (y - 2) * 36 + x - 4
        pool.bitmaps[place] = 0
        changed = not torch.equal(kernels.mask_targets(pool, box, matched, 5, backend="torch"), plain)
        pool.bitmaps[place] = 1
        seen += changed
        assert changed or not (6.4 <= x <= 31.7 and 3.3 <= y <= 12.2)
    assert counted - (16 + 8 + 16 + 24 + 100) == 25 * 9 <= seen


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ((2.0, 3.0, 30.0, 20.0), 8 * 8),
        ((-500.0, 3.0, -400.0, 20.0), 0),
        ((4.0, 3.0, 5.5, 20.0), None),
        ((-40.0, 3.0, 20.0, 20.0), None),
    ],
)
def test_pasting_reads_the_cells_that_it_shows(box, cells):
    # All of a mask that is enlarged, none of one outside, some of one that is made smaller or cut off.
    masks, boxes = torch.rand(1, 8, 8), torch.tensor([box])
    found = floor("paste_masks", "forward", Inputs((masks, boxes, (24, 40))), FP32).dram_bytes
    values = kernels.paste_masks(masks, boxes, (24, 40), None, backend="torch")
    shown = 0
    for y, x in itertools.product(range(8), range(8)):
        changed = masks.clone()
        changed[0, y, x] += 1
        shown += not torch.equal(kernels.paste_masks(changed, boxes, (24, 40), None, backend="torch"), values)
    assert found == 16 + 4 * shown + 24 * 40
    assert shown == cells if cells is not None else 0 < shown < 64


def test_roof_is_the_slowest_limit_and_dram_counts_only_when_cold():
    # A warm call may find everything in L2; its roof must not be that of memory.
    ceilings = SimpleNamespace(dram_bytes_per_s=4.0, l2_bytes_per_s=8.0, issue_per_s=2.0)
    assert roof(Floor(80, 1), ceilings, cold=True) == (20.0, "DRAM")
    assert roof(Floor(80, 1), ceilings, cold=False) == (10.0, "L2")
    assert roof(Floor(80, 60), ceilings, cold=True) == (30.0, "issue")
