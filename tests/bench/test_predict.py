"""Predictions from counts: the counts by hand on small code and few RoIs, the rest as the op launches it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kernels
from bench import predict
from bench.cli import app
from bench.predict_work import gather_work, matrix_chunks, roi_axes
from bench.sass import Code, PredictionError, parse_sass
from bench.workloads import Sizes, Workload
from kernels import HAS_TRITON
from kernels.roi_align import launches, reference

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the launches are Triton's")
MAP = [(1, 16, 64, 64)]  # one level at scale 1: boxes are in cells


def sass(*lines):
    """As nvdisasm prints: labels end in a colon, all else gets an address and a semicolon."""
    return "\n".join(f"{t}" if t.endswith(":") else f"        /*{16 * i:04x}*/  {t} ;" for i, t in enumerate(lines))


NESTED = sass(
    "MOV R1, c[0x0][0x28]",
    ".L_x_0:",
    "LDG.E R2, desc[UR4][R2.64]",
    ".L_x_1:",
    "HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24",
    "@!P1 BRA `(.L_x_1)",
    "ISETP.NE.AND P0, PT, R3, RZ, PT",
    "@P2 BRA `(.L_x_2)",
    "IADD3 R3, R3, -0x1, RZ",
    ".L_x_2:",
    "BRA.U UP0, `(.L_x_0)",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
    "NOP",
    "NOP",
)


def test_nested_loops():
    # Both ends of a loop run in every turn. Branches ahead, the trap behind the end and padding are no loops.
    code = parse_sass(NESTED)
    assert len(code.instructions) == 10
    assert code.loops(2) == [2, 7]


def test_a_loop_with_two_ways_back_is_one():
    # `continue` branches to the start from the middle: another loop there would be counted twice.
    assert Code([], [(5, 2, False), (9, 2, True)]).loops(1) == [8]


@pytest.mark.parametrize(("code", "depth"), [(parse_sass(NESTED), 1), (parse_sass(sass("EXIT")), 1)])
def test_other_loops_than_the_model_has_are_refused(code, depth):
    # The compiler may unroll or split a loop one day: a wrong prediction would look like any other.
    with pytest.raises(PredictionError, match="loops"):
        code.loops(depth)
    assert parse_sass(sass("EXIT")).loops(0) == []


def test_loops_side_by_side_are_not_nested():
    # The inner loop's turns are taken out of the outer: this must be where they are.
    with pytest.raises(PredictionError, match="nested"):
        Code([], [(5, 2, False), (9, 6, False)]).loops(2)


FAST = ("LDG.E R2, desc[UR4][R2.64]",)
MASKED = ("@P3 LDG.E R2, desc[UR4][R2.64]", "SEL R2, R2, RZ, P3")


@pytest.mark.parametrize(("first", "second"), [(FAST, MASKED), (MASKED, FAST)])
def test_the_half_with_masks_is_skipped(first, second):
    # Which half comes first is the compiler's choice. The branch over the slow half runs only where it comes second.
    text = sass("MOV R1, R2", "@!P5 BRA `(.L_x_0)", *first, "BRA `(.L_x_1)", ".L_x_0:", *second, ".L_x_1:", "EXIT")
    assert parse_sass(text).without_masks() == (5 if first is FAST else 4)


def test_code_without_the_branch_is_refused():
    # Were the two paths merged, counting all would be wrong, and so would counting a guess.
    with pytest.raises(PredictionError, match="if-else"):
        parse_sass(sass("MOV R1, R2", "@P0 EXIT", "EXIT")).without_masks()


def axes(*boxes, bins, aligned=False):
    rois = torch.tensor([[0.0, *box] for box in boxes])
    return roi_axes(MAP, rois, bins, [1.0], 2, aligned)


def test_pairs_and_chunks_of_a_roi_on_four_tiles():
    # 2 x 2 bins of 8 cells: samples from 2 to 14, so cells 2 to 15, and both bins are near both tiles of either axis.
    y, x = axes((0, 0, 16, 16), bins=2)
    assert (int(x.first), int(x.last)) == (2, 15)
    assert gather_work(y, x, 8, 8, 16) == (4, 4)
    assert gather_work(y, x, 8, 8, 3) == (4, 8)  # 4 bins are two chunks of 3
    assert gather_work(y, x, 4, 16, 16) == (4, 4)  # 4 tiles down, 1 across


def test_bins_near_a_row_of_tiles():
    # 7 bins of 8 cells over 7 tiles: 2 near the first and the last tile, 3 near the others; times 7 rows of one cell.
    y, x = axes((0, 16, 56, 23), bins=7)
    assert gather_work(y, x, 8, 8, 1) == (7, 7 * (2 + 5 * 3 + 2))
    assert gather_work(y, x, 8, 8, 16) == (7, 1 + 5 * 2 + 1)  # 14 and 21 bins a tile


def test_chunks_of_cells_under_rows_of_bins():
    # Cells 2 to 9 are under the first row of bins, 7 to 15 under the second (a hundredth to spare), 14 columns each.
    y, x = axes((0, 0, 16, 16), bins=2)
    assert matrix_chunks(y, x, rows=1, block=16) == 7 + 8  # of 112 and 126 cells
    assert matrix_chunks(y, x, rows=2, block=16) == 13  # of 196 cells


def test_rois_off_the_map_and_inverted_ones():
    # The first are in no list; the kernels take all bins and cells of the second: 5 x 5 cells on 4 tiles.
    y, x = axes((0, 500, 16, 560), bins=2)
    assert gather_work(y, x, 8, 8, 16) == (0, 0) and matrix_chunks(y, x, 1, 16) == 0
    y, x = axes((10.5, 10.5, 6.5, 6.5), bins=2, aligned=True)
    assert (int(x.first), int(x.last)) == (6, 10)
    assert gather_work(y, x, 8, 8, 1) == (4, 16) and matrix_chunks(y, x, 1, 16) == 2 * 2


@needs_triton
@pytest.mark.parametrize("aligned", [False, True])
def test_geometry_is_the_kernels_own(device, aligned):
    # Levels, borders and rounding: the loops run as often as the table says, not as a second formula would have it.
    shapes, scales = [(1, 16, 40, 60), (1, 16, 20, 30)], (1 / 4, 1 / 8)
    corner, extent = torch.rand(300, 2) * 240 - 30, torch.exp(torch.rand(300, 2) * 6)
    rois = torch.cat([torch.zeros(300, 1), corner, corner + extent], dim=1)
    y, x = roi_axes(shapes, rois, 7, scales, 2, aligned)

    pooling = launches.Pooling(((7, 7),), scales, 2, aligned, 224, 4)
    table = launches.empty_table([rois.to(device)])
    launches._fill_table(rois.to(device), table, (7, 7), 1, (40, 20), (60, 30), pooling)
    table = table.cpu()
    touches = (y.last >= y.first) & (x.last >= x.first)
    assert torch.equal(touches, table[:, 13] >= 0) and 0 < touches.sum() < 300
    found = torch.stack([y.first, y.last, x.first, x.last], dim=1)
    assert torch.equal(found[touches], table[touches, 12:].long())
    floats = torch.stack([y.start, y.bin_size, x.start, x.bin_size], dim=1)
    assert torch.equal(floats[touches], table[:, [0, 1, 2, 3]].view(torch.float32)[touches])
    assert len(set(reference.assign_levels(rois, reference.level_thresholds(scales, 224, 4)).tolist())) == 2


# Of all three kernels: products in bf16, samples in fp32, the gather in both.
TINY = Workload("multiscale_roi_align", "tiny", "train", Sizes(2, (128, 192), rois=12, channels=256, output_size=14))
FAKE = {
    "roi_align_forward_kernel": Code(["LDG"] * 3 + ["@P0 LDG"] * 5, [(0, 3, False), (2, 7, True)]),
    "roi_align_matrix_kernel": Code(["FMUL"] * 10, [(6, 3, False)]),
    "roi_align_gather_kernel": Code(["FMUL"] * 10, [(5, 4, False), (7, 2, False)]),
}


@pytest.fixture
def compiled(monkeypatch):
    """Code that needs no compiling, which this process cannot do; the launches seen."""
    seen = []

    def machine_code(launch):
        seen.append(launch)
        return FAKE[launch.kernel.__name__], 4

    monkeypatch.setattr(predict, "machine_code", machine_code)
    return seen


@needs_triton
def test_counts_are_put_together(compiled):
    # Each part of the code times how often it runs, over warps and blocks of channels.
    workload = replace(TINY, sizes=replace(TINY.sizes, channels=2000))  # no block holds them all
    found = [p.instructions for p in predict.predict([workload])]
    launched = {(launch.kernel.__name__[10:-7], launch.args[0][0].dtype): launch for launch in compiled}
    maps, *call = workload.boxes_only(torch.float32).args
    y, x = roi_axes([m.shape for m in maps], *call)

    matrix, forward = launched["matrix", torch.bfloat16], launched["forward", torch.float32]
    chunks = matrix_chunks(y, x, matrix.meta["ROWS"], matrix.meta["BLOCK_CELLS"])
    assert found[0] == 4 * matrix.grid[1] * (chunks * 4 + matrix.grid[0] * 6)
    assert found[2] == 4 * forward.grid[0] * forward.grid[1] * 4
    for i, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        gather = launched["gather", dtype]
        pairs, chunks = gather_work(y, x, 8, 8, gather.meta["BLOCK_BINS"])
        blocks = -(-2000 // gather.meta["BLOCK_C"])
        tiles = 2 * (4 * 6 + 2 * 3 + 1 * 2 + 1 * 1)
        assert blocks > 1
        assert found[i] == 4 * blocks * (tiles * 4 + pairs * 4 + chunks * 2)


@needs_triton
def test_the_command_says_that_nothing_was_measured(compiled, monkeypatch):
    # The figures look like measured ones, and must not be quoted as such.
    monkeypatch.setattr(predict, "training_workloads", lambda: [TINY, replace(TINY, name="second")])
    done = CliRunner().invoke(app, ["predict"])
    assert done.exit_code == 0, done.output
    assert "PREDICTED from counts" in done.output and "NOT measured" in done.output
    assert all(done.output.count(word) == 4 for word in ("tiny", "second"))


def test_the_canonical_workloads_are_there():
    # The command names them; a workload that is renamed must not only be missed when someone runs it.
    names = [(op, name) for op, of_op in predict.NAMES.items() for name in of_op]
    assert [(w.op, w.name) for w in predict.training_workloads()] == names and len(names) == 12


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU this process interprets")
def test_an_interpreting_process_is_refused():
    # Its launches have other tiles, and nothing it compiles would be what a GPU runs.
    done = CliRunner().invoke(app, ["predict"])
    assert done.exit_code == 2 and "TRITON_INTERPRET" in done.output


@needs_triton
def test_the_compilers_code_is_as_the_model_has_it():
    # Loops and branches come from the installed Triton's compiler, in a process that does not interpret.
    program = """
from bench.predict import predict
from test_predict import TINY
for p in predict([TINY]):
    print(p.kernel, p.direction, p.dtype, p.instructions > 0 < p.dram_bytes)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(kernels.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "roi_align_matrix_kernel forward bf16 True",
        "roi_align_gather_kernel backward bf16 True",
        "roi_align_forward_kernel forward fp32 True",
        "roi_align_gather_kernel backward fp32 True",
    ], done.stderr
