"""Predictions for the mask branch: turns against the kernels' own in the interpreter or counted one by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_predict import sass
from test_predict_rpn import counting

import kernels
from bench import predict, predict_mask
from bench.mask_inputs import draw_pool
from bench.predict_mask_work import own_channel_work, paste_work, targets_work
from bench.sass import Code, PredictionError, parse_sass
from bench.workloads import Sizes, Workload
from kernels import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the launches are Triton's")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")

WHOLE_NUMBERS = parse_sass(
    sass(
        "MOV R1, R2",
        ".L_x_0:",
        "FADD R1, R1, R2",
        ".L_x_1:",
        "FADD R1, R1, R3",
        "@P2 BRA `(.L_x_3)",
        "FMUL R5, R5, R5",
        "FMUL R5, R5, R5",
        "@P5 BRA `(.L_x_2)",
        "I2F.RP R3, R4",
        "MUFU.RCP R3, R3",
        ".L_x_2:",
        "FMUL R5, R5, R5",
        ".L_x_3:",
        "@P3 BRA `(.L_x_1)",
        "@P4 BRA `(.L_x_9)",
        *["FMUL R6, R6, R6"] * 20,
        ".L_x_9:",
        "@P4 BRA `(.L_x_0)",
        "EXIT",
    )
)


def test_what_is_rare_is_the_callers_to_say():
    # A division of whole numbers is what some kernels are made of; of one it is a path that wide images never take.
    assert WHOLE_NUMBERS.parts("(())") == [2, 3 + 20, 9]
    assert WHOLE_NUMBERS.parts("(())", predict_mask.RARE) == [2, 3 + 20, 9 - 2]


def test_a_detour_of_the_inner_loop():
    # The outer loop's branch is longer, and skips something else.
    assert WHOLE_NUMBERS.detour() == 20 and WHOLE_NUMBERS.detour(1) == 6
    assert WHOLE_NUMBERS.detour(1, predict_mask.RARE) == 4


def watched(monkeypatch, module, name):
    """What the interpreter's calls of a device function return."""
    seen, original = [], getattr(module, name)

    def watching(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(module, name, watching)
    return seen


@needs_triton
@interpreted
def test_turns_of_targets_are_the_kernels_own(monkeypatch):
    # Tall, wide and beside the image: bands of rows of cells, blocks of columns, samples and cells decide the time.
    from kernels.mask_targets import kernel

    pool = draw_pool(torch.tensor([[[2.0, 1, 9, 60], [0, 0, 0, 0]]]), (64, 80), torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[3.0, 2.0, 5.0, 61.5], [1.0, 5.0, 78.0, 5.5], [90.0, 3.0, 99.0, 7.0], [0.0, 0, 40, 40]]])
    matched = torch.tensor([[0, 0, 0, 1]])  # the last one's object is an empty slot
    axes = watched(monkeypatch, kernel, "_axis")
    stored = counting(monkeypatch, kernel, "_store_weights")
    offsets = counting(monkeypatch, kernel, "_offset")
    kernels.mask_targets(pool, boxes, matched, 2, backend="triton")

    work = targets_work(pool, boxes, matched, 2, 32, 16)
    assert int(work.bands.sum() + work.blocks.sum()) == stored["_store_weights"] > 8
    assert int(work.samples_y.sum() + work.samples_x.sum()) == offsets["_offset"] - 2 * len(axes)
    touched = [[int(axis[4].handle.data.item()) for axis in axes[i : i + 2]] for i in range(0, 6, 2)]  # y, x
    assert work.cells.flatten().tolist() == [y * x for y, x in touched] + [0]
    assert work.rows.flatten().tolist() == [y * -(-x // 16) for y, x in touched] + [0]
    assert touched[0][0] > 16 and touched[1][1] > 32


def test_tiles_of_targets_have_turns_of_their_own():
    # 40 bins are two tiles: what one of them touches is not what the other does, and all bins of 1 cell touch 2 or 3.
    pool = draw_pool(torch.tensor([[[0.0, 0, 60, 60]]]), (64, 64), torch.Generator().manual_seed(0))
    boxes, matched = torch.tensor([[[2.0, 2.0, 82.0, 42.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    work = targets_work(pool, boxes, matched, 40, 32, 16)
    assert work.cells.shape == (1, 2, 2) and (work.bands == 1).all() and (work.blocks == 1).all()
    assert (work.samples_y == 1).all() and (work.samples_x == 2).all()
    assert work.cells[0, 0].tolist() == [2 * 3, 2 * 2]  # beyond column 63 there is one cell, and the one after it


@needs_triton
@interpreted
def test_turns_of_pasting_are_the_kernels_own(monkeypatch):
    # Which stretches of memory meet a box, rows that are no multiple of 16 included: one in four interpolates here.
    from kernels.paste_masks import kernel

    op = sys.modules["kernels.paste_masks.op"]
    monkeypatch.setattr(op, "_blocks", lambda largest: (2, 128, 32))
    masks = torch.rand(4, 3, 5)
    boxes = torch.tensor([[5.0, 4, 20, 9], [30, 1, 60, 3], [-40, 3, -20, 9], [float("nan"), 0, 9, 9]])
    interpolated = counting(monkeypatch, kernel, "_interpolate")
    stored = counting(monkeypatch, kernel, "_store")
    kernels.paste_masks(masks, boxes, (15, 37), backend="triton")
    work = paste_work(boxes, 5, (15, 37), 128, 32)
    assert work.parts == interpolated["_interpolate"] and 0 < work.parts < 4 * work.near
    assert work.blocks - work.near + 4 * work.near == stored["_store"] and 0 < work.near < work.blocks


@pytest.mark.parametrize("channels_last", [False, True])
def test_own_channels_one_by_one(channels_last):
    # Elements of the gradient that are not zero, stretch by stretch: a RoI of class 3, an empty slot, one of class 0.
    labels, classes, pixels, block, own = torch.tensor([3, -1, 0, 4]), 5, 12, 16, 4
    strides = (1, classes) if channels_last else (pixels, 1)
    places = [
        [roi * classes * pixels + label * strides[0] + pixel * strides[1] for pixel in range(pixels)]
        for roi, label in enumerate(labels.tolist())
        if label >= 0
    ]
    rois, chunks = own_channel_work(labels, 4 * classes * pixels, classes, pixels, strides, block, own)
    for program, (found_rois, found) in enumerate(zip(rois.tolist(), chunks.tolist(), strict=True)):
        inside = range(program * block, (program + 1) * block)
        here = [sum(place in inside for place in of_roi) for of_roi in places]
        assert found == sum(-(-number // own) for number in here)
        assert found_rois == len({min(place, 239) // 60 for place in inside})
    assert len(rois) == 15 and chunks.sum() >= 9


CODE = Code(["FADD"] * 30, [(12, 3, False), (25, 16, False)])  # 10 instructions outside of two loops of 10 each
LOSS = Workload("mask_predictor_loss", "tiny", "cpu", Sizes(0, (64, 64), masks=6, classes=4, channels=9, mask_size=5))


@needs_triton
def test_the_longest_class_bounds_the_weights_gradient(monkeypatch):
    # A class with many RoIs has one program for all of them, a class without any lists them all the same.
    inputs = LOSS.boxes_only(torch.float32)
    inputs.args[3].copy_(torch.tensor([2, 2, 2, 1, 2, 2]))
    (launch,) = [x for x in predict_mask.launches(LOSS.op, inputs) if x.kernel.__name__.endswith("weight_kernel")]
    monkeypatch.setitem(launch.meta, "ROWS", 2)
    monkeypatch.setitem(launch.meta, "BLOCK_N", 4)
    monkeypatch.setitem(launch.meta, "PARTS", 3)
    spans = launch.grid[1]
    assert predict_mask.count(CODE, launch, inputs) == (spans * (4 * (10 + 2 * 10) + (2 + 8) * 10), 10 + 20 + 8 * 10)


@needs_triton
def test_parts_of_a_roi_are_not_all_full():
    # 25 pixels in parts of 16 and blocks of 8: two turns and two, the last one of a single pixel.
    inputs = LOSS.boxes_only(torch.float32)
    found = {x.kernel.__name__: x for x in predict_mask.launches(LOSS.op, inputs)}
    code = Code(["FADD"] * 20, [(12, 3, False)])
    for name in ("mask_predictor_forward_kernel", "mask_predictor_features_kernel"):
        launch = found[name]
        launch.meta.update(PART=16, BLOCK=8)
        split = type(launch)(launch.kernel, (6, 2), launch.args, launch.meta)
        assert predict_mask.count(code, split, inputs) == (6 * (2 * 10 + 4 * 10), 10 + 2 * 10)


@needs_triton
def test_features_are_channels_last():
    # As the model's convolutions give them: the other layout is the slower one for both kernels.
    for launch in predict_mask.launches(LOSS.op, LOSS.boxes_only(torch.float32)):
        if launch.kernel.__name__ in ("mask_predictor_forward_kernel", "mask_predictor_features_kernel"):
            tensors = [a for a in launch.args if isinstance(a, torch.Tensor) and a.shape == (6, 9, 5, 5)]
            assert tensors and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


@needs_triton
def test_a_kernel_without_a_model_is_refused(monkeypatch):
    # Left out unnoticed, it would make the op look quicker than it is.
    monkeypatch.setattr(predict_mask, "MODELS", ("weighted_mean_kernel",))
    with pytest.raises(PredictionError, match="there is no model of mask_predictor_forward_kernel"):
        list(predict.predict([LOSS]))


TINY_WORKLOADS = [
    Workload("mask_predictor_loss", "tiny", "sweep", Sizes(0, (64, 64), masks=24)),
    Workload("mask_targets", "tiny", "small", Sizes(2, (200, 304), rois=8, objects=5, ragged=True)),
    Workload("paste_masks", "tiny", "small", Sizes(1, (200, 304), masks=5, objects=5)),
    Workload("mask_bce_loss", "tiny", "sweep", Sizes(0, (64, 64), masks=24)),
]


@needs_triton
def test_every_kernel_of_the_mask_branch_has_a_model():
    # Else the command stops at the first that has none, on a machine where somebody waits for it.
    launched = {
        launch.kernel.__name__
        for workload in TINY_WORKLOADS
        for launch in predict_mask.launches(workload.op, workload.boxes_only(torch.float32))
    }
    assert launched == set(predict_mask.MODELS)


@needs_triton
def test_the_compilers_code_is_as_the_model_has_it():
    # Loops and branches come from the installed Triton's compiler, in a process that does not interpret.
    program = """
from bench.predict import predict
from test_predict_mask import TINY_WORKLOADS
for p in predict(TINY_WORKLOADS):
    print(p.kernel, p.direction, p.dtype, p.instructions >= p.longest > 0, p.dram_bytes > 0)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(kernels.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "mask_predictor_forward_kernel forward bf16 True True",
        "weighted_mean_kernel forward bf16 True False",
        "mask_predictor_features_kernel backward bf16 True True",
        "mask_predictor_weight_kernel backward bf16 True False",
        "mask_targets_kernel forward fp32 True True",
        "paste_masks_kernel forward fp32 True True",
        "mask_bce_forward_kernel forward bf16 True True",
        "weighted_mean_kernel forward bf16 True False",
        "mask_bce_backward_kernel backward bf16 True True",
    ], done.stderr
