"""What the kernels of a mask branch issue: their loops' instructions times how often they run.

| kernel | warp instructions |
| --- | --- |
| mask_predictor forward, features | programs x rest + blocks of pixels x loop |
| mask_predictor weight | programs x rest + blocks of labels x loop + rows of the class's RoIs x loop |
| weighted_mean | rest + blocks of RoIs x both loops |
| mask_bce forward | programs x all |
| mask_bce backward | programs x rest + RoIs in a stretch x outer loop + chunks of own channels x inner |
| mask_targets | programs x rest + bands, blocks, samples of both axes, rows and cells x their loops |
| paste_masks | programs x rest + blocks x loop + parts of those near a box x inner loop: interpolates in it |

Features and logits are channels_last. Both halves of a store count in paste_masks, a division of whole numbers, that
only narrow images need, does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import kernels
from kernels.runtime import Launch, record_launches

from .inputs import Inputs
from .mask_inputs import OPTIONS
from .predict_mask_work import own_channel_work, paste_work, targets_work
from .sass import Code

LEFT_OUT = ()
BACKWARD = ("mask_predictor_features_kernel", "mask_predictor_weight_kernel", "mask_bce_backward_kernel")
LESSER = ("mask_predictor_weight_kernel", "weighted_mean_kernel")  # an op's bytes are its other kernel's
RARE = ("CALL", "I2F.RP")  # a subroutine, a division of whole numbers: skipped by a branch where it is not needed
Counts = tuple[int, int]  # instructions of a warp: of all programs together, of the longest


def launches(op: str, inputs: Inputs) -> list[Launch]:
    """Of the forward and, for the losses, the backward. Features, logits and masks are never touched."""
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    made = {
        id(t): torch.empty(t.shape, dtype=t.dtype, memory_format=formats[t.ndim == 4])
        for t in inputs.tensors()
        if t.is_meta
    }
    leaves = [made[id(leaf)].requires_grad_() for leaf in inputs.leaves]
    args = [made.get(id(a), a) for a in inputs.args]
    with record_launches() as found:
        output = getattr(kernels, op)(*args, backend="triton", **OPTIONS.get(op, {}))
        if leaves:
            torch.autograd.grad(output, leaves, torch.empty_like(output))
    return found


def count(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    """Instructions of a warp of a kernel that has a model."""
    return _MODELS[launch.kernel.__name__](code, launch, inputs)


def _pixel_blocks(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    """Of kernels that go through a part of a RoI's pixels; all slots hold a RoI."""
    rest, loop = code.parts("()")
    meta, (rois, parts) = launch.meta, launch.grid
    sizes = [min(meta["PART"], meta["PIXELS"] - part * meta["PART"]) for part in range(parts)]
    turns = [-(-size // meta["BLOCK"]) for size in sizes]
    return rois * (parts * rest + sum(turns) * loop), rest + max(turns) * loop


def _predictor_weight(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, listing, adding = code.parts("()()")
    labels, meta, (classes, spans) = inputs.args[3], launch.meta, launch.grid
    rows = torch.bincount(labels[labels >= 0], minlength=classes) * meta["PARTS"]
    of_class = rest + -(-len(labels) // meta["BLOCK_N"]) * listing + -(-rows // meta["ROWS"]) * adding
    return spans * int(of_class.sum()), int(of_class.max())


def _weighted_mean(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, sums, scales = code.parts("()()")
    program = rest + -(-launch.args[5] // launch.meta["BLOCK"]) * (sums + scales)
    return program, program


def _bce_forward(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    (program,) = code.parts("")
    return launch.grid[0] * program, program


def _bce_backward(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, outer, inner = code.parts("(())")
    meta, (elements, classes) = launch.meta, launch.args[6:8]
    work = (elements, classes, meta["PIXELS"], launch.args[-2:], meta["BLOCK"], meta["OWN"])
    rois, chunks = own_channel_work(inputs.args[1], *work)
    programs = rest + rois * outer + chunks * inner
    return int(programs.sum()), int(programs.max())


def _targets(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    rest, band, sample_y, block, sample_x, row, cell = code.parts("(()(()(())))")
    work = targets_work(*inputs.args, launch.meta["BINS"], launch.meta["CELLS"])
    programs = rest + work.bands * band + work.samples_y * sample_y + work.blocks * block + work.samples_x * sample_x
    programs = programs + work.rows * row + work.cells * cell
    return int(programs.sum()), int(programs.max())


def _paste(code: Code, launch: Launch, inputs: Inputs) -> Counts:
    (rest, block, part), interpolation = code.parts("(())", RARE), code.detour(1, RARE)
    masks, boxes, image_size = inputs.args
    meta = launch.meta
    work = paste_work(boxes, masks.shape[2], image_size, meta["BLOCK"], meta["PART"])
    parts = meta["BLOCK"] // meta["PART"]
    total = launch.grid[0] * rest + work.blocks * block + work.near * parts * (part - interpolation)
    return total + work.parts * interpolation, rest + meta["STEPS"] * (block + parts * part)


_MODELS: dict[str, Callable[[Code, Launch, Inputs], Counts]] = {
    "mask_predictor_forward_kernel": _pixel_blocks,
    "mask_predictor_features_kernel": _pixel_blocks,
    "mask_predictor_weight_kernel": _predictor_weight,
    "weighted_mean_kernel": _weighted_mean,
    "mask_bce_forward_kernel": _bce_forward,
    "mask_bce_backward_kernel": _bce_backward,
    "mask_targets_kernel": _targets,
    "paste_masks_kernel": _paste,
}
MODELS = tuple(_MODELS)
