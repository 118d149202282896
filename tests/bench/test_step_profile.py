"""Real profiles of small steps, and traces of a GPU that were made up."""

import dataclasses
import gzip
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench.cli import app
from bench.step_profile import run
from bench.step_profile.phases import BACKWARD, OTHER, PREFIX, STEP, UPDATE, WAIT
from bench.step_profile.report import profile_report
from bench.step_profile.run import profile_named, profile_steps
from bench.step_profile.trace import read_events, read_trace
from mrcnn.config import load_config

SMALL = ["model.roi_samples=8", "model.post_nms_top_n=[8, 8]", "model.pre_nms_top_n=[20, 20]"]
STAGES = ["normalize", "backbone", "fpn", "rpn", "anchors", "proposals", "rpn_loss", "roi_sampler", "pooler"]
STAGES += ["box_head", "box_loss", "mask_head", "mask_loss", BACKWARD, UPDATE]


def text_of(result, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    for part in profile_report(result):
        console.print(part)
    return console.export_text()


def plant_item(model):
    model.fpn.register_forward_hook(lambda module, args, out: out[0].sum().item() and None)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    config = load_config("tiny", SMALL)
    result = profile_steps(config, folder, (64, 64), 1, torch.device("cpu"), 1, 1, "torchvision", prepare=plant_item)
    return folder, result


def test_the_trace_holds_the_phases(profiled):
    folder, result = profiled
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert all(names.count(PREFIX + name) == 1 for name in [STEP, *STAGES])
    assert [phase.name for phase in result.phases] == [*STAGES, OTHER]
    kept = json.loads((folder / "profile.json").read_text())
    assert kept["settings"]["config"]["name"] == "tiny" and kept["environment"]["versions"]["torch"]
    assert [phase["name"] for phase in kept["phases"]] == [*STAGES, OTHER]


def test_phases_sum_to_the_step(profiled):
    _, result = profiled
    named = sum(phase.host for phase in result.phases if phase.name != OTHER)
    assert 0.8 * result.seconds <= named <= result.seconds
    assert all(phase.device is None and phase.kernels is None for phase in result.phases)


def test_a_planted_item_is_seen_in_its_phase(profiled):
    _, result = profiled
    assert result.waits["fpn: aten::_local_scalar_dense"] == 1
    assert {phase.name: phase.waits for phase in result.phases}["fpn"] == 1
    assert not any(place.startswith(("backbone", "rpn:", UPDATE)) for place in result.waits)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_cpus_times_are_called_so(profiled, width):
    shown = text_of(profiled[1], width)
    assert "on a CPU (" in shown and "no GPU" in shown and "say nothing about a GPU" in shown.replace("\n", " ")
    assert "would wait on a GPU" in shown and "device" not in shown


def test_inference(tmp_path):
    result = profile_named(tmp_path, "tiny", SMALL, "64x96", 1, 1, 1, "auto", "cpu", training=False)
    names = [phase.name for phase in result.phases]
    assert names == [*STAGES[:6], "pooler", "box_head", "box_selection", "mask_head", OTHER]
    assert BACKWARD not in text_of(result)
    assert result.settings["image_size"] == (64, 96) and result.title.startswith("detection of tiny, 1 x 64 x 96")


def test_triton_launches_are_counted(tmp_path, device):
    # In the interpreter, or on a GPU; the first step is not counted. Anchors are labelled, and proposals.
    result = profile_steps(load_config("tiny", SMALL), tmp_path, (64, 64), 1, device, 1, 1, "triton")
    wanted = {"roi_align_forward_kernel": 2, "roi_align_gather_kernel": 1, "label_anchors_kernel": 2}
    assert {name: result.launches[name] for name in wanted} == wanted
    assert "label_anchors_kernel" in text_of(result)


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def gpu_trace():
    """Two steps of 100 us, 1000 us apart: a stage, the backward in another thread, the wait."""
    for start in (0, 1000):
        yield event("user_annotation", PREFIX + STEP, start, 100)
        yield event("user_annotation", PREFIX + "rpn", start + 10, 20)
        yield event("user_annotation", PREFIX + BACKWARD, start + 40, 30)
        yield event("user_annotation", PREFIX + WAIT, start + 80, 20)
        # Launched in rpn, runs during the backward; the range's copy on the device is no kernel.
        yield event("cuda_runtime", "cudaLaunchKernel", start + 12, 2, correlation=start + 1)
        yield event("kernel", "gemm", start + 50, 7, tid=7, correlation=start + 1)
        yield event("gpu_user_annotation", PREFIX + "rpn", start + 50, 7, tid=7, correlation=start + 1)
        # Triton's launches go through the driver; autograd's thread is not the main one.
        yield event("cuda_driver", "cuLaunchKernelEx", start + 45, 2, tid=2, correlation=start + 2)
        yield event("kernel", "roi_align_backward_kernel", start + 60, 9, tid=7, correlation=start + 2)
        yield event("cuda_runtime", "cudaMemcpyAsync", start + 14, 2, correlation=start + 3)
        yield event("gpu_memcpy", "Memcpy DtoH", start + 58, 1, tid=7, correlation=start + 3)
        # An item(): the call belongs to the innermost operator.
        yield event("cpu_op", "aten::item", start + 13, 10)
        yield event("cpu_op", "aten::_local_scalar_dense", start + 13.5, 9)
        yield event("cuda_runtime", "cudaStreamSynchronize_v3020", start + 17, 5, correlation=start + 4)
        yield event("cuda_runtime", "cudaDeviceSynchronize_v3020", start + 85, 10, correlation=start + 5)
    # Outside the steps.
    yield event("cuda_runtime", "cudaLaunchKernel", 500, 2, correlation=99)
    yield event("kernel", "warm-up", 510, 30, tid=7, correlation=99)
    yield event("cuda_runtime", "cudaDeviceSynchronize", 900, 10, correlation=98)


def test_a_gpus_trace_is_read():
    seconds, phases, waits = read_trace(list(gpu_trace()), on_gpu=True)
    found = {phase.name: phase for phase in phases}
    assert seconds == pytest.approx(100e-6) and list(found) == ["rpn", BACKWARD, WAIT, OTHER]
    assert found["rpn"].host == pytest.approx(20e-6) and found[OTHER].host == pytest.approx(30e-6)
    assert found["rpn"].device == pytest.approx(8e-6) and found["rpn"].kernels == 1
    assert found[BACKWARD].device == pytest.approx(9e-6) and found[BACKWARD].kernels == 1
    assert waits == {"rpn: aten::_local_scalar_dense, cudaStreamSynchronize": 1}
    assert found["rpn"].waits == 1 and found[WAIT].waits == 0


def test_a_kernel_without_its_launch_is_in_no_phase():
    events = [event("user_annotation", PREFIX + STEP, 0, 100), event("kernel", "lost", 20, 5, tid=7, correlation=3)]
    (other,) = read_trace(events, on_gpu=True)[1]
    assert other.name == OTHER and other.device == pytest.approx(5e-6) and other.kernels == 1


def test_nested_waiting_operators_are_one():
    events = [
        event("user_annotation", PREFIX + STEP, 0, 100),
        event("user_annotation", PREFIX + "box_selection", 10, 50),
        event("cpu_op", "torchvision::nms", 20, 20),
        event("cpu_op", "aten::nonzero", 25, 5),
        event("cpu_op", "aten::nonzero", 45, 5),
    ]
    waits = read_trace(events, on_gpu=False)[2]
    assert waits == {"box_selection: torchvision::nms": 1, "box_selection: aten::nonzero": 1}


# Written out again: a call that is dropped from the lists would be a wait that nobody sees.
CALLS = [
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cudaFree",
]
SIZED = ["_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_dim"]
OPERATORS = [*(f"aten::{name}" for name in [*SIZED, "unique_consecutive"]), "torchvision::nms"]


@pytest.mark.parametrize("name", [*CALLS, *OPERATORS])
def test_everything_that_waits_is_counted(name):
    on_gpu = name in CALLS
    step, stage = event("user_annotation", PREFIX + STEP, 0, 100), event("user_annotation", PREFIX + "rpn", 10, 50)
    found = event("cuda_runtime" if on_gpu else "cpu_op", name, 20, 5, correlation=1)
    assert read_trace([step, stage, found], on_gpu)[2] == {f"rpn: {name}": 1}


def test_an_optimizers_counts_are_no_waits_on_a_cpu():
    # A fused one reads them on the host there, and on a GPU in its kernels; anything else in its phase is a wait.
    events = [
        event("user_annotation", PREFIX + STEP, 0, 100),
        event("user_annotation", PREFIX + UPDATE, 10, 50),
        event("cpu_op", "aten::_local_scalar_dense", 20, 5),
        event("cpu_op", "aten::nonzero", 30, 5),
    ]
    assert read_trace(events, on_gpu=False)[2] == {f"{UPDATE}: aten::nonzero": 1}


def test_the_table_of_a_gpu_names_it(profiled):
    seconds, phases, waits = read_trace(list(gpu_trace()), on_gpu=True)
    result = dataclasses.replace(
        profiled[1], on_gpu=True, title="on an invented GPU", seconds=seconds, phases=phases, waits=waits
    )
    shown = text_of(result)
    assert "invented GPU" in shown and "device" in shown and "allocated on the GPU" in shown
    assert "CPU" not in shown and "8.00 µs" in shown


def test_the_trace_is_readable_again(profiled):
    folder, result = profiled
    assert read_trace(read_events(folder / "trace.json.gz"), on_gpu=False)[0] == result.seconds


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 10. GiB"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("a bug"),
    ],
)
def test_a_run_that_fails_leaves_the_last_result(error, tmp_path, monkeypatch):
    # Nothing of the folder is touched before there is something better; what does not fit is a sentence, a bug is not.
    kept = {"profile.json": b"hours of work", "trace.json.gz": b"its trace"}
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)

    def fail(*_):
        raise error

    monkeypatch.setattr(run, "read_events", fail)  # after the steps and their trace
    arguments = ["--out", str(tmp_path), "--image-size", "64", "--batch", "1", "--steps", "1", "--warmup", "1"]
    small = [word for setting in SMALL for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["profile", *arguments, *small, "--device", "cpu"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    if str(error) == "a bug":
        assert result.exception is error
    else:
        assert result.exit_code == 2 and result.output.startswith("error: not enough memory for this step")


def test_command_errors_are_sentences(tmp_path):
    (tmp_path / "file").touch()
    no_gpu = [] if torch.cuda.is_available() else [(["--device", "cuda"], "sees no GPU")]
    for arguments, said in [
        (["--config", "nothing"], "unknown configuration"),
        (["--set", "model.nothing=1"], "unknown key"),
        (["--image-size", "big"], "image-size"),
        *no_gpu,
    ]:
        result = CliRunner().invoke(app, ["profile", "--out", str(tmp_path / "new"), *arguments])
        assert result.exit_code == 2 and said in result.output and result.output.startswith("error: ")
    result = CliRunner().invoke(app, ["profile", "--out", str(tmp_path / "file"), "--image-size", "64"])
    assert result.exit_code == 2 and "cannot be written" in result.output
    assert not (tmp_path / "new").exists()
