"""Every kernel compiles for real GPUs, keeps what the committed tables promise, and the gate sees what would break it.

The kernels are compiled once, each target in a process of its own; the faults of `planted_kernels` with them.
"""

import dataclasses
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import kernels
from bench.resources import Row, measure_resources
from bench.resources.calls import op_calls
from bench.resources.command import resources
from bench.resources.gate import check_resources
from bench.resources.measure import TARGETS
from bench.resources.row import Assembly, wide
from bench.resources.table import read_tables, render, write_table
from kernels import HAS_TRITON, box_iou, launch_counts
from kernels.runtime import record_launches

REPOSITORY = Path(kernels.__file__).parents[1]
COMMITTED = read_tables(REPOSITORY / "reports" / "resources")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is what compiles")


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        return measure_resources(TARGETS, calls="planted_kernels:PLANTED")


@pytest.fixture(scope="module")
def rows(measured) -> list[Row]:
    return [row for row in measured if not row.call.startswith("planted")]


def planted(measured: list[Row], name: str, target: str) -> list[str]:
    """What the gate says of a planted kernel."""
    return check_resources([r for r in measured if r.call == f"planted {name}" and r.target == target], {}, "")


@needs_triton
def test_no_kernel_got_worse(rows):
    # The gate itself, over every op: this is what fails when a change to a kernel costs it a vector load.
    assert check_resources(rows, COMMITTED, version("triton")) == []


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(rows, target):
    # The interpreter accepts more than the compiler does. A new kernel has to be reached by a call of calls.py.
    files = [f for pattern in ("*/kernel*.py", "device*.py") for f in (REPOSITORY / "kernels").glob(pattern)]
    text = "".join(path.read_text() for path in files)
    assert set(re.findall(r"def (\w+_kernel)\(", text)) == {r.kernel.split("/")[0] for r in rows if r.target == target}


@needs_triton
@pytest.mark.parametrize("target", NVIDIA)
def test_exact_kernels_divide_as_ieee_does(rows, target):
    # That no fused and no fast operation is found would mean nothing if the search found none at all.
    found = {row.kernel.split("/")[0]: row.assembly for row in rows if row.target == target}
    assert all(found[name].ieee_divisions for name in ("roi_geometry_kernel", "box_iou_kernel", "nms_words_kernel"))
    assert all(found[name].fma for name in ("roi_align_forward_kernel", "mask_bce_forward_kernel"))
    # The sums ask for each of theirs, but those of the mask loss, whose exp and log are not exact to begin with.
    assert {row.kernel.split("/")[0] for row in rows if row.fusion} == {"mask_predictor_forward_kernel"}


@needs_triton
@pytest.mark.parametrize("target", NVIDIA)
def test_pooling_moves_16_bytes_at_a_time(rows, target):
    # What the channels_last layout is for, in every call on such maps: each RoI's bins and each tile of gradients.
    kernels = ("roi_align_forward_kernel", "roi_align_matrix_kernel", "roi_align_gather_kernel")
    pooled = [r for r in rows if r.target == target and r.kernel.split("/")[0] in kernels and "channels_last" in r.call]
    assert len(pooled) >= 20
    assert all(wide(row.assembly.loads) for row in pooled)
    assert all(wide(row.assembly.stores) for row in pooled if "to nchw" not in row.call)


@needs_triton
@pytest.mark.parametrize(("note", "transposed"), [("", False), (" many RoIs", True)])
def test_pooling_calls_are_what_they_are_called(note, transposed):
    # How many RoIs make it worth transposing the maps is the op's business: it must not empty a name of its meaning.
    (call,) = [c for c in op_calls() if c.name == f"multiscale_roi_align bf16 nchw 7x7 2x2{note}"]
    with record_launches() as launches:
        call.run()
    (forward,) = [launch for launch in launches if launch.kernel.__name__ == "roi_align_forward_kernel"]
    assert forward.meta["MAPS_CHANNELS_LAST"] == transposed


def test_call_names_are_unique():
    # A row of the table is found by the name of its call.
    names = [call.name for call in op_calls()]
    assert len(set(names)) == len(names)


@needs_triton
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("spill", r"spills \(\d+ with"),
        ("contraction", r"fused multiply-adds where results must be exact"),
        ("fast_division", r"approximate divisions where results must be exact"),
    ],
)
def test_a_planted_fault_is_seen(measured, target, name, complaint):
    # A gate that was never seen red guards nothing: through the compiler, the disassembler and the parser.
    (sentence,) = planted(measured, name, target)
    assert re.search(complaint, sentence)


@needs_triton
def test_a_planted_cas_loop_is_seen(measured):
    # Only sm_80 has no bf16 atomic; on the others the same kernel is fine.
    assert any("compare-and-swap" in sentence for sentence in planted(measured, "cas", "sm_80"))
    assert planted(measured, "cas", "sm_90") == planted(measured, "cas", "gfx942") == []


def test_the_pages_show_the_tables():
    # The Markdown is written beside the JSON: one regenerated, or edited, without the other would mislead.
    assert COMMITTED
    for triton, table in COMMITTED.items():
        page = REPOSITORY / "reports" / "resources" / f"triton-{triton}.md"
        assert page.read_text(encoding="utf-8") == render(triton, table)


def a_row(**changes) -> Row:
    """A row without fault; `changes` go to the row or to its assembly."""
    code = Assembly(40, 0, 0, {"16": 8}, {"16": 1}, {"F32x4": 8}, {}, 700, 0, 12, 0)
    row = Row("sm_90", "an op", "a_kernel", "C=128", 4, 0, 75, code)
    fields = Row.__dataclass_fields__
    code = dataclasses.replace(code, **{k: v for k, v in changes.items() if k not in fields})
    return dataclasses.replace(row, assembly=code, **{k: v for k, v in changes.items() if k in fields})


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ({"loads": {"4": 32}}, "16-byte loads"),
        ({"stores": {"8": 2}}, "16-byte stores"),
        ({"atomics": {"F32": 32}}, "vector atomics"),
    ],
)
def test_a_lost_vector_access_is_seen(lost, what):
    # Lost is what every committed table has; what one compiler found and another did not is nobody's promise.
    tables = {"1.0": [a_row()], "2.0": [a_row(registers=60)]}
    assert check_resources([a_row()], tables, "9.9") == []
    (sentence,) = check_resources([a_row(**lost)], tables, "9.9")
    assert sentence == f"sm_90, an op, a_kernel: lost its {what}, which every committed table has"
    assert check_resources([a_row(**lost)], tables | {"3.0": [a_row(**lost)]}, "9.9") == []


@pytest.mark.parametrize(
    ("worse", "what"),
    [
        ({"spills": 2}, "spills 2 times, 0 in the committed table"),
        ({"loads": {"16": 4, "4": 16}}, "4 16-byte loads, 8 in the committed table"),
        ({"stores": {"8": 2}}, "0 16-byte stores, 1 in the committed table"),
    ],
)
def test_less_than_the_same_compiler_gave_before_is_seen(worse, what):
    # Half of the vector loads gone is a regression too, and so is the first spill below the limit; of another
    # compiler it would be its business.
    sentences = check_resources([a_row(**worse)], {"1.0": [a_row()]}, "1.0")
    assert f"sm_90, an op, a_kernel: {what}" in sentences
    assert check_resources([a_row()], {"1.0": [a_row(**worse)]}, "1.0") == []


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        ({}, 0),
        ({"registers": 255, "instructions": 900}, 0),  # the compiler's business
        ({"spills": 4}, 0),
        ({"spills": 5}, 1),
        ({"target": "gfx942", "spills": 1}, 1),
        ({"kernel": "mask_bce_forward_kernel", "fma": 9, "fast_divisions": 1}, 0),  # need not be exact
        ({"kernel": "mask_bce_forward_kernel", "atomics": {"CAS": 1}}, 1),
        ({"fma": 9, "fast_divisions": 1}, 2),
        ({"kernel": "roi_align_forward_kernel", "fma": 9}, 0),  # asked for
        ({"kernel": "roi_align_forward_kernel", "fma": 9, "fusion": True}, 1),  # perhaps not asked for
        ({"kernel": "roi_align_forward_kernel", "fast_divisions": 1}, 1),
        ({"kernel": "roi_align_gather_kernel", "fast_divisions": 1}, 0),  # to find bins, with room to spare
        ({"kernel": "roi_align_matrix_kernel", "fast_divisions": 1}, 0),
        ({"kernel": "roi_align_gather_kernel", "fma": 9}, 1),
        ({"kernel": "roi_geometry_kernel", "fma": 9}, 1),
        ({"kernel": "list_rois_kernel/2", "fma": 9, "fast_divisions": 1}, 2),
        ({"occupancy": 0}, 1),
    ],
)
def test_what_the_gate_refuses(changes, complaints):
    # Each rule on its own, at its limit.
    assert len(check_resources([a_row(**changes)], {}, "1.0")) == complaints


def test_added_and_vanished_rows_are_seen():
    # Else a renamed call would drop its promises in silence. Other targets and other versions are not its business.
    table = [a_row(), a_row(call="gone"), a_row(target="sm_80")]
    sentences = check_resources([a_row(), a_row(call="new")], {"1.0": table}, "1.0")
    assert [s.split(": ")[1] for s in sentences] == [
        "not in the committed table; run `mrcnn-bench resources`",
        "only in the committed table; run `mrcnn-bench resources`",
    ]
    assert check_resources([a_row(), a_row(call="new")], {"1.0": table}, "2.0") == []


def test_table_keeps_the_targets_that_were_not_measured(tmp_path):
    # `--targets sm_90` must not empty the table of the others; the file is read back as it was written.
    write_table(tmp_path, "1.0", [a_row(target="sm_80"), a_row()])
    write_table(tmp_path, "1.0", [a_row(registers=50)])
    assert read_tables(tmp_path) == {"1.0": [a_row(target="sm_80"), a_row(registers=50)]}
    assert "compiled only" in (tmp_path / "triton-1.0.md").read_text(encoding="utf-8")


@needs_triton
def test_the_command_writes_and_checks(tmp_path, monkeypatch):
    # Exit 1 and a sentence are what CI sees; without --check it writes.
    app = typer.Typer()
    app.command()(resources)
    run = lambda *options: CliRunner().invoke(app, ["--targets", "sm_90", "--output", str(tmp_path), *options])
    monkeypatch.setattr("bench.resources.measure.measure_resources", lambda targets: [a_row()])
    nothing = run("--check")
    assert nothing.exit_code == 2 and "no table" in nothing.output  # compared with nothing, it must not pass
    assert run().exit_code == 0
    passed = run("--check")
    assert passed.exit_code == 0 and "nothing is worse" in passed.output
    monkeypatch.setattr("bench.resources.measure.measure_resources", lambda targets: [a_row(loads={"4": 32})])
    failed = run("--check")
    assert failed.exit_code == 1
    assert "worse: sm_90, an op, a_kernel: lost its 16-byte loads" in failed.output
    assert read_tables(tmp_path)[version("triton")] == [a_row()]
    written = run()  # says what it makes worse, before the next check finds nothing to complain about
    assert written.exit_code == 0 and "worse: sm_90" in written.output
    (tmp_path / "triton-1.0.json").write_text("{")
    assert run("--check").exit_code == 2
    assert run("--targets", "sm_42").exit_code == 2


@needs_triton
def test_recording_launches_nothing():
    # What the compile check rests on: the op's own launches, on any tensor, not counted as run, and over at the end.
    boxes = torch.tensor([[0.0, 0, 1, 1]]).requires_grad_()
    before = launch_counts.copy()
    with pytest.raises(KeyError), record_launches() as launches:
        torch.autograd.grad(box_iou(boxes, boxes.detach(), backend="triton").sum(), boxes)
        raise KeyError
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["box_iou_kernel", "box_iou_backward_kernel", "box_iou_backward_kernel"]
    assert launches[0].meta["enable_fp_fusion"] is False
    assert launch_counts == before
    with record_launches() as launches:
        pass
    assert launches == []
