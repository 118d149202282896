"""Floors are compared with slow counts on tiny inputs: a floor too high would promise what nobody can reach."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_workloads import tiny

import kernels
from bench.boxes import anchor_grid, random_objects
from bench.floors import IOU, IOU_BACKWARD, MASK, MASK_BACKWARD, Floor, floor, overlapping_pairs, roof
from bench.inputs import Inputs
from bench.parts import listed
from bench.providers import get_provider
from bench.workloads import RPN_OPS

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


@pytest.mark.parametrize("op", RPN_OPS)
def test_a_floor_is_no_more_than_what_is_handed_over(op):
    # Inputs read whole, outputs written whole, gradients too: a floor above that charges something twice.
    inputs = tiny(op).build("cpu", FP32, grad=op in ("box_iou", "rpn_loss"))
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


def test_roof_is_the_slowest_limit_and_dram_counts_only_when_cold():
    # A warm call may find everything in L2; its roof must not be that of memory.
    ceilings = SimpleNamespace(dram_bytes_per_s=4.0, l2_bytes_per_s=8.0, issue_per_s=2.0)
    assert roof(Floor(80, 1), ceilings, cold=True) == (20.0, "DRAM")
    assert roof(Floor(80, 1), ceilings, cold=False) == (10.0, "L2")
    assert roof(Floor(80, 60), ceilings, cold=True) == (30.0, "issue")
