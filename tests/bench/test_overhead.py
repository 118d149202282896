"""What a call costs the host, measured without a GPU: with few calls, to see that the harness works."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.overhead import BATCH, PASSES, measure_overhead
from kernels import launch_counts

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are launched")


@needs_no_gpu
def test_launches_are_recorded_and_torchvision_is_left_out():
    # Without a GPU a time that holds the interpreter's, or torchvision's own computing, would not be overhead.
    before = launch_counts.copy()
    found = measure_overhead(calls=BATCH + 1)
    assert launch_counts == before
    assert [(row.what, row.variant) for row in found] == [
        (what, variant) for what in PASSES for variant in ("public op", "registered op")
    ]
    for row in found:
        assert 0 < row.q25 <= row.median <= row.q75 < 1e6 and row.calls == 2 * BATCH
    forward, _, both, _ = found
    assert both.median > forward.median


@needs_no_gpu
def test_the_command_says_what_it_measured(tmp_path):
    # Figures of our Python alone must not pass for those of a launch.
    done = CliRunner().invoke(app, ["overhead", "--calls", "20", "--out", str(tmp_path / "o.json")])
    assert done.exit_code == 0 and "recorded, not made" in done.output
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["launches"] == "recorded" and len(content["rows"]) == 4
    assert content["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_kernels_are_launched():
    before = launch_counts["roi_align_forward_kernel"]
    found = measure_overhead(calls=BATCH)
    assert launch_counts["roi_align_forward_kernel"] > before
    assert len(found) == 6 and found[-1].variant == "torchvision"
