"""What the kernels of a region proposal network issue: their loops' instructions times how often they run.

| kernel | warp instructions |
| --- | --- |
| label_anchors | tiles x rest + blocks of objects x both loops over them + visited (tile, object) pairs x inner loop |
| best_iou_with_grid | objects x rest + levels, rows and blocks of columns searched x their loops |
| box_iou | programs x rest + wide and narrow chunks of columns x their loops |
| nms_words | tiles on or above the diagonal x rest + rows x loop + rows with a close pair x its division |
| nms_sweep | groups x rest + passes, blocks of rows read again, steps and rounds of settling x their loops |
| rpn_loss forward, backward | programs x rest + blocks of slots x loop (forward) |

Pairs that a kernel passes over, and how long a search goes on, follow from the workload's boxes (`predict_rpn_work`).
Programs with nothing to do count up to where they leave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import kernels
from kernels.nms.reference import screen
from kernels.runtime import Launch, record_launches

from .inputs import Inputs
from .predict_rpn_work import best_searches, nms_work, tile_visits
from .rpn_inputs import LOW
from .sass import Code

LEFT_OUT = ("box_iou_backward_kernel",)
BACKWARD = ("rpn_loss_backward_kernel",)
LESSER = ("best_iou_with_grid_kernel", "nms_sweep_kernel")  # an op's bytes are its other kernel's
Counts = tuple[int, int]  # instructions of a warp: of all programs together, of the longest


def launches(op: str, inputs: Inputs) -> list[Launch]:
    """Of the forward and, for the losses, the backward. Logits and deltas are never touched."""
    made = {id(t): torch.empty(t.shape, dtype=t.dtype) for t in inputs.tensors() if t.is_meta}
    leaves = [made[id(leaf)].requires_grad_() for leaf in inputs.leaves if id(leaf) in made]
    args = [made.get(id(a), a) for a in inputs.args]
    with record_launches() as found:
        outputs = getattr(kernels, op)(*args, backend="triton")
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    return found


def count(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    """Instructions of a warp of a kernel that has a model."""
    return _MODELS[launch.kernel.__name__](code, launch, inputs)


def _label_anchors(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, survey, search, visit = code.parts("()(())")
    grid, gt_boxes, gt_count = inputs.args
    meta, total, longest = launch.meta, 0, 0
    for boxes, number in zip(gt_boxes, gt_count.tolist(), strict=True):
        blocks = -(-number // meta["BLOCK_G"])
        best = torch.tensor([s.best for s in best_searches(grid, boxes[:number], 1, 1)])
        visits = tile_visits(grid, boxes[:number], best, meta["TILE_H"], meta["TILE_W"], LOW)
        alone = rest + blocks * (survey + search)
        total += len(visits) * alone + int(visits.sum()) * visit
        longest = max(longest, alone + int(visits.max()) * visit)
    return total, longest


def _best_iou(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, level, row, columns = code.parts("((()))")
    grid, gt_boxes, gt_count = inputs.args
    meta, found = launch.meta, []
    for boxes, number in zip(gt_boxes, gt_count.tolist(), strict=True):
        searches = best_searches(grid, boxes[:number], meta["TILE_H"], meta["TILE_W"])
        found += [rest + s.levels * level + s.rows * row + s.blocks * columns for s in searches]
    slots = launch.grid[0] * launch.grid[1]
    return sum(found) + (slots - len(found)) * code.until_exit(), max(found)


def _box_iou(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, wide, narrow = code.parts("()()")
    columns, meta = inputs.args[1].shape[-2], launch.meta
    chunks = -(-columns // (launch.grid[1] * meta["BLOCK_M"]))
    total, longest = 0, 0
    for first in range(0, columns, chunks * meta["BLOCK_M"]):
        here = min(chunks * meta["BLOCK_M"], columns - first)
        left = -(-(here % meta["BLOCK_M"]) // meta["NARROW"])
        program = rest + here // meta["BLOCK_M"] * wide + left * narrow
        total, longest = total + launch.grid[0] * program, max(longest, program)
    return total, longest


def _nms_words(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    (rest, row), division = code.parts("()"), code.detour()
    meta = launch.meta
    work = nms_work(*inputs.args[:2], launch.args[-2:], meta["BLOCK_ROWS"], meta["BLOCK_WORDS"], meta["STEP"])
    turns = meta["BLOCK_ROWS"] // meta["STEP"]
    idle = launch.grid[0] - work.tiles
    total = work.tiles * (rest + turns * (row - division)) + work.close * division + idle * code.until_exit()
    return total, rest + turns * (row - division)


def _nms_sweep(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, outer, again, step, settle = code.parts("(()(()))")
    boxes, valid, threshold = inputs.args
    rounds = nms_work(boxes, valid, screen(threshold), 32, 1, 1).rounds  # of each group
    words, meta = -(-valid.shape[1] // 32), launch.meta
    firsts = range(0, words, meta["WORDS"])
    blocks = sum(-(-first * 32 // meta["BLOCK_ROWS"]) for first in firsts)
    common = rest + len(firsts) * outer + blocks * again + words * step
    return sum(common + r * settle for r in rounds), common + max(rounds) * settle


def _rpn_forward(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, block = code.parts("()")
    index = inputs.args[5]
    program = rest + -(-index.shape[1] // launch.meta["BLOCK"]) * block
    return launch.grid[0] * program, program


def _rpn_backward(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    (program,) = code.parts("")
    return launch.grid[0] * launch.grid[1] * program, program


_MODELS: dict[str, Callable[[Code, Launch, Inputs], Counts]] = {
    "label_anchors_kernel": _label_anchors,
    "best_iou_with_grid_kernel": _best_iou,
    "box_iou_kernel": _box_iou,
    "nms_words_kernel": _nms_words,
    "nms_sweep_kernel": _nms_sweep,
    "rpn_loss_forward_kernel": _rpn_forward,
    "rpn_loss_backward_kernel": _rpn_backward,
}
MODELS = tuple(_MODELS)
