"""Predictions for the proposal network: loops by hand, their turns against the kernels' own in the interpreter."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_predict import sass
from tiny_workloads import tiny

import kernels
from bench import predict, predict_rpn
from bench.boxes import anchor_grid, clustered, random_objects
from bench.predict_rpn_work import best_searches, nms_work, tile_visits
from bench.sass import Code, PredictionError, parse_sass
from bench.workloads import Sizes, Workload
from kernels import HAS_TRITON
from kernels.nms.reference import screen
from kernels.runtime import record_launches

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the launches are Triton's")

LOOPS = parse_sass(
    sass(
        "MOV R1, R2",
        "@!P0 BRA `(.L_x_9)",  # around everything
        ".L_x_0:",
        "FADD R1, R1, R2",
        "@P1 BRA `(.L_x_0)",
        ".L_x_1:",
        "FADD R1, R1, R2",
        "FADD R1, R1, R3",
        "FADD R1, R1, R4",
        ".L_x_2:",
        "FCHK P0, R1, R2",
        "@!P0 BRA `(.L_x_3)",
        "MOV R4, 0x180",
        "CALL.REL.NOINC `($__internal_0_$slowpath)",
        ".L_x_3:",
        "@P2 BRA `(.L_x_4)",
        "FMUL R5, R5, R5",
        "FMUL R5, R5, R5",
        "FMUL R5, R5, R5",
        ".L_x_4:",
        "@P3 BRA `(.L_x_2)",
        "@P4 BRA `(.L_x_1)",
        ".L_x_9:",
        "STG.E desc[UR4][R2.64], R1",
        "EXIT",
        "WARPSYNC R1",
        "BRA `(.L_x_2)",
        "$__internal_0_$slowpath:",
        "FMUL R1, R1, R1",
        "RET.REL.NODEC R4",
    )
)


def test_parts_of_nested_loops():
    # The two instructions of a slow division, its subroutine and what stands behind the exit hardly ever run; the loop
    # of two instructions only counts.
    assert LOOPS.parts("(())") == [2 + 2 + 2, 4, 7]
    assert LOOPS.detour() == 3
    assert LOOPS.until_exit() == 2 + 2


@pytest.mark.parametrize("shape", ["", "()", "()()", "((()))", "()(())"])
def test_other_shapes_are_refused(shape):
    # A compiler that unrolls or splits a loop would have its parts multiplied by the wrong numbers.
    with pytest.raises(PredictionError, match="expected the loops"):
        LOOPS.parts(shape)


def test_overlapping_loops_are_refused():
    with pytest.raises(PredictionError, match="overlap"):
        Code(["FADD"] * 20, [(9, 2, False), (15, 6, False)]).parts("(())")


def test_a_program_leaves_at_its_first_exit():
    # Without a branch around the loops: what stands before the exit is all that an idle program runs.
    code = parse_sass(sass("MOV R1, R2", "@P0 EXIT", ".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT"))
    assert code.until_exit() == 2


def counting(monkeypatch, module, name):
    """How often the interpreter calls a device function of a kernel's module."""
    calls, original = Counter(), getattr(module, name)

    def counted(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def few_objects():
    """An image's objects: among them a small one, one larger than all anchors, and one longer than all of its size."""
    boxes = random_objects(5, (128, 160), torch.Generator().manual_seed(0))
    boxes[:3] = torch.tensor([[40.0, 50, 47, 58], [2, 1, 158, 126], [1, 60, 157, 76]])
    return boxes


def one_object():
    """One that anchors of two sizes may be called ignored for: the lower threshold decides, not its best IoU."""
    return torch.tensor([[50.0, 40, 90, 80]])


def recorded(grid, boxes):
    with record_launches() as launches:
        kernels.label_grid_anchors(grid, boxes[None], torch.tensor([len(boxes)]), backend="triton")
    return {launch.kernel.__name__: launch.meta for launch in launches}


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("objects", [few_objects, one_object])
def test_turns_are_the_kernels_own(objects, monkeypatch):
    # The point of the model: which objects a tile looks at and what a search visits decide the kernels' times.
    from kernels.label_anchors import kernel, kernel_best

    grid, boxes = anchor_grid((128, 160)), objects()
    op = sys.modules["kernels.label_anchors.op"]
    monkeypatch.setattr(op, "_tile_shape", lambda extents, per_cell: (16, 64))  # several tiles, interpreted too
    meta = recorded(grid, boxes)
    visits = counting(monkeypatch, kernel, "load_gt")
    blocks = counting(monkeypatch, kernel_best, "load_grid_anchors")
    levels = counting(monkeypatch, kernel_best, "_pick")
    kernels.label_grid_anchors(grid, boxes[None], torch.tensor([len(boxes)]), backend="triton")

    search = meta["best_iou_with_grid_kernel"]
    found = best_searches(grid, boxes, search["TILE_H"], search["TILE_W"])
    assert sum(s.blocks for s in found) == blocks["load_grid_anchors"]
    assert sum(s.levels for s in found) == levels["_pick"] / 4
    assert len(boxes) == 1 or sum(s.levels for s in found) > len(boxes)  # some go through several levels
    best = torch.tensor([s.best for s in found])
    assert torch.equal(best, kernels.box_iou(boxes, grid.anchors(), backend="torch").amax(1))
    tiles = tile_visits(grid, boxes, best, 16, 64, 0.3)
    assert int(tiles.sum()) == visits["load_gt"] > 0


def doubtful_pairs(boxes, threshold):
    """Pairs of boxes too close to the threshold to tell without a division."""
    share, slack = screen(threshold)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    inside = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - low).clamp(min=0).prod(-1)
    enough = share * area[:, None] + share * area[None]
    return (inside > slack * enough) & (inside <= enough)


def test_nms_turns_by_hand():
    # A chain in which each suppresses the next takes a round for every link, and one that finds nothing to change.
    corner = torch.arange(5.0)[:, None] * torch.tensor([2.0, 0, 2, 0])
    boxes = (torch.tensor([0.0, 0, 16, 16]) + corner)[None]  # neighbours' IoU is 14/18, that of the next but one 12/20
    work = nms_work(boxes, torch.ones(1, 5, dtype=torch.bool), screen(0.7), 32, 1, 1)
    assert (work.tiles, work.close, work.rounds) == (1, 0, [5])
    apart = nms_work(boxes * 100, torch.tensor([[True, False, False, False, True]]), screen(0.7), 32, 1, 1)
    assert (apart.tiles, apart.rounds) == (1, [2 - 1])


@pytest.mark.parametrize("block_rows", [8, 32])
def test_nms_turns_of_a_crowd(block_rows):
    # Tiles on and above the diagonal, those without a valid box left out, and steps with a pair that needs a division.
    generator = torch.Generator().manual_seed(3)
    objects = random_objects(2, (200, 200), generator)
    boxes = torch.stack([clustered(objects, 96, (200, 200), generator) for _ in range(3)])
    valid = torch.ones(3, 96, dtype=torch.bool)
    valid[1, 40:], valid[2] = False, False
    boxes[0, 70] = boxes[0, 3] + torch.tensor([0.0, 0, 0, 1e-6])  # equal boxes are far from any threshold but 1
    threshold = kernels.box_iou(boxes[0, 5:6], boxes[0, 60:61], backend="torch").item()
    work = nms_work(boxes, valid, screen(threshold), block_rows, 1, 4)

    tiles, close = 0, 0
    for of_group, counts in zip(boxes, valid, strict=True):
        doubtful = doubtful_pairs(of_group, threshold)
        for row in range(0, 96, block_rows):
            for column in range(0, 96, 32):
                here = slice(row, row + block_rows), slice(column, column + 32)
                if column + 32 <= row or not counts[here[0]].any() or not counts[here[1]].any():
                    continue
                tiles += 1
                close += sum(bool(part.any()) for part in doubtful[here].split(4))
    assert (work.tiles, work.close) == (tiles, close) and close > 0
    assert work.rounds[2] == 3 and 3 < work.rounds[0] <= 30  # nothing valid: a round for each of three blocks


TINY_WORKLOADS = [
    tiny("label_grid_anchors"),
    Workload("box_iou", "tiny", "cpu", Sizes(1, (512, 672), rois=300, objects=20)),
    tiny("nms_mask"),
    tiny("rpn_loss"),
]


@needs_triton
def test_a_kernel_without_a_model_is_refused(monkeypatch):
    # Left out unnoticed, it would make the op look quicker than it is.
    monkeypatch.setattr(predict_rpn, "MODELS", ("label_anchors_kernel",))
    with pytest.raises(PredictionError, match="there is no model of best_iou_with_grid_kernel"):
        list(predict.predict(TINY_WORKLOADS[:1]))


@needs_triton
def test_chunks_of_columns_are_counted(monkeypatch):
    # 20 columns: one wide chunk of 16 and a narrow one of 4, for each program of rows.
    code = Code(["FADD"] * 30, [(12, 3, False), (25, 16, False)])
    monkeypatch.setattr(predict, "machine_code", lambda launch: (code, 4))
    (found,) = predict.predict(TINY_WORKLOADS[1:2])
    (launch,) = predict_rpn.launches("box_iou", TINY_WORKLOADS[1].boxes_only(torch.float32))
    meta, (rows, shares) = launch.meta, launch.grid
    wide, narrow = 20 // meta["BLOCK_M"], -(-(20 % meta["BLOCK_M"]) // meta["NARROW"])
    assert shares == 1 and found.longest == 10 + wide * 10 + narrow * 10
    assert found.instructions == 4 * rows * found.longest


def test_a_long_program_bounds_a_launch_of_few():
    # 80 programs cannot keep 528 schedulers busy: all instructions evenly spread would promise too much.
    few = predict.Prediction("train", "fp32", "forward", "nms_sweep_kernel", 1000, 0, longest=1000)
    assert few.issue_s == 1000 / predict.HERTZ and predict._bound(few) == "chain"
    many = predict.Prediction("train", "fp32", "forward", "nms_words_kernel", 10**9, 0, longest=1000)
    assert many.issue_s == 10**9 / (predict.SCHEDULERS * predict.HERTZ) and predict._bound(many) == "issue"


@needs_triton
def test_the_compilers_code_is_as_the_model_has_it():
    # Loops and branches come from the installed Triton's compiler, in a process that does not interpret.
    program = """
from bench.predict import predict
from test_predict_rpn import TINY_WORKLOADS
for p in predict(TINY_WORKLOADS):
    print(p.kernel, p.direction, p.dtype, p.instructions >= p.longest > 0)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(kernels.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "best_iou_with_grid_kernel forward fp32 True",
        "label_anchors_kernel forward fp32 True",
        "box_iou_kernel forward fp32 True",
        "nms_words_kernel forward fp32 True",
        "nms_sweep_kernel forward fp32 True",
        "rpn_loss_forward_kernel forward fp32 True",
        "rpn_loss_backward_kernel backward fp32 True",
    ], done.stderr
