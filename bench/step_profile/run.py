"""The steps under the profiler."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torchvision.transforms.v2 import CenterCrop

from kernels import launch_counts, use_backend
from mrcnn.cli.common import Device, Ops, choose_device
from mrcnn.config import Config, load_config, validate
from mrcnn.data.collate import Collate
from mrcnn.data.shapes import ShapesDataset
from mrcnn.inference import autocast
from mrcnn.modeling import MaskRCNN
from mrcnn.step import TrainingStep
from mrcnn.structures import Batch
from mrcnn.summary import parse_image_size

from ..environment import describe_commit, describe_environment
from ..report import write_whole
from ..tables import machine_text
from .phases import PREFIX, STEP, WAIT, phase_range, watch_stages
from .trace import Phase, read_events, read_trace

TRACE, NUMBERS = "trace.json.gz", "profile.json"
TOP = 10


@dataclass(frozen=True)
class StepProfile:
    """What a step of one configuration does on one machine."""

    title: str
    on_gpu: bool
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: float  # a step, with the profiler watching
    phases: list[Phase]
    waits: dict[str, float]  # "phase: what" -> a step
    launches: dict[str, float]  # of Triton kernels, by name, a step
    operators: list[tuple[str, float, float]]  # name, calls and seconds of its own a step: the device's, or the host's
    peak_bytes: int  # of the GPU's allocator, or of the process


def profile_named(
    out: Path,
    config: str,
    overrides: Iterable[str],
    image_size: str | None,
    batch_size: int | None,
    steps: int,
    warmup: int,
    ops: str,
    device: str,
    training: bool,
) -> StepProfile:
    """`profile_steps` from what the command line says; what it leaves out is the configuration's.

    Raises:
        ConfigError: no such configuration or value, no GPU for device "cuda", or the ops do not run on the device.
        OSError: `out` cannot be written.
    """
    resolved = validate(load_config(config, overrides))
    size = parse_image_size(image_size or str(resolved.data.image_size or 800))
    batch_size = batch_size or resolved.train.batch_size
    chosen = choose_device(Device(device), Ops(ops))
    return profile_steps(resolved, out, size, batch_size, chosen, steps, warmup, ops, training)


def profile_steps(
    config: Config,
    out: Path,
    size: tuple[int, int],
    batch_size: int,
    device: torch.device,
    steps: int = 3,
    warmup: int = 2,
    ops: str = "auto",
    training: bool = True,
    prepare: Callable[[MaskRCNN], None] = lambda model: None,
) -> StepProfile:
    """Profile `steps` steps after `warmup` others; writes trace.json.gz and profile.json to the folder `out`.

    Args:
        config: of the model and the optimizer. The weights are random.
        out: folder, made where there is none.
        size: (height, width) of the images: synthetic shapes, the same in every step and on the device already.
        batch_size: images a step.
        device: to run on.
        steps, warmup: at least 1.
        ops: backend of the detection ops.
        training: forward, backward and optimizer; else detection.
        prepare: called with the model before the first step.

    Raises:
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The folder is found to be writable before the work, and what is in it stays until the work is done.
    with tempfile.TemporaryDirectory(dir=out, prefix=".profile-") as scratch:
        trace = Path(scratch) / TRACE
        result = _profile(config, trace, size, batch_size, device, steps, warmup, ops, training, prepare)
        trace.replace(out / TRACE)
    write_whole(out / NUMBERS, (json.dumps(dataclasses.asdict(result), indent=2) + "\n").encode())
    return result


def _profile(
    config: Config,
    trace: Path,
    size: tuple[int, int],
    batch_size: int,
    device: torch.device,
    steps: int,
    warmup: int,
    ops: str,
    training: bool,
    prepare: Callable[[MaskRCNN], None],
) -> StepProfile:
    """The work of `profile_steps`; writes `trace`."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(config.train.seed)
    model = MaskRCNN(config.model).to(device).train(training)
    if on_gpu:  # as in training
        model = model.to(memory_format=torch.channels_last)
    prepare(model)
    step = _make_step(model, synthetic_batch(size, batch_size, config).to(device), config, training)
    with use_backend(ops), watch_stages(model):
        operators, launches = _run(step, trace, device, steps, warmup)
    seconds, phases, waits = read_trace(read_events(trace), on_gpu)
    environment = _environment(on_gpu)
    return StepProfile(
        title=_title(config, size, batch_size, training, environment),
        on_gpu=on_gpu,
        settings={"config": dataclasses.asdict(config), "image_size": size, "batch": batch_size, "steps": steps,
                  "warmup": warmup, "ops": ops, "training": training},
        environment=environment,
        seconds=seconds,
        phases=phases,
        waits=waits,
        launches={name: count / steps for name, count in launches.items()},
        operators=[(name, count / steps, seconds / steps) for name, count, seconds in operators],
        peak_bytes=_peak_bytes(device),
    )  # fmt: skip


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: of the GPU, of numpy, or of PyTorch's on the CPU, which has no class of its own."""
    words = ("DefaultCPUAllocator", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def synthetic_batch(size: tuple[int, int], batch_size: int, config: Config) -> Batch:
    """Coloured shapes on images of (height, width), padded as in training; labels beyond the model's are clamped."""
    dataset = ShapesDataset(batch_size, max(*size, 32), seed=config.train.seed, transform=CenterCrop(size))
    batch = Collate(config.data.max_objects or dataset.max_objects)([dataset[i] for i in range(batch_size)])
    batch.targets.labels.clamp_(max=config.model.num_classes - 1)
    return batch


def _make_step(model: MaskRCNN, batch: Batch, config: Config, training: bool) -> Callable[[], object]:
    """What is profiled: stage by stage, so neither compiled nor captured."""
    if training:
        settings = dataclasses.replace(config.train, compile=False, cuda_graphs=False)
        step = TrainingStep(model, settings, phase=phase_range)
        return lambda: step(batch)

    @torch.no_grad()
    def detect() -> object:
        with autocast(batch.images.device):
            return model(batch.images, batch.sizes)

    return detect


def _run(
    step: Callable[[], object], trace: Path, device: torch.device, steps: int, warmup: int
) -> tuple[list[tuple[str, int, float]], Counter]:
    """Run and write the trace; (operators with their calls and seconds, Triton launches) of the profiled steps."""
    on_gpu = device.type == "cuda"
    operators: list[tuple[str, int, float]] = []

    def finish(profiler: profile) -> None:
        profiler.export_chrome_trace(str(trace))
        operators.extend(_operators(profiler.key_averages(), on_gpu))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    plan = schedule(wait=0, warmup=warmup, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish, acc_events=True) as profiler:
        for number in range(warmup + steps):
            if number == warmup:
                before = launch_counts.copy()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
            with record_function(PREFIX + STEP):
                step()
                if on_gpu:
                    with record_function(PREFIX + WAIT):
                        torch.cuda.synchronize(device)
            profiler.step()
    return operators, launch_counts - before


def _operators(averages: Iterable, on_gpu: bool) -> list[tuple[str, int, float]]:
    """(name, calls, seconds of its own) of PyTorch's operators, the slowest first."""
    found = []
    for entry in averages:
        if entry.device_type != torch.autograd.DeviceType.CPU or "::" not in entry.key:
            continue  # a kernel, which its operator stands for, or a range
        microseconds = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        found.append((entry.key, entry.count, microseconds / 1e6))
    return sorted(found, key=lambda row: -row[2])[:TOP]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def _environment(on_gpu: bool) -> dict[str, Any]:
    environment = describe_environment() | {"commit": describe_commit(), "cpu_threads": torch.get_num_threads()}
    return environment if on_gpu else environment | {"gpu": None}  # one that was not used


def _title(config: Config, size: tuple[int, int], batch: int, training: bool, environment: dict[str, Any]) -> str:
    what = "training step" if training else "detection"
    return f"{what} of {config.name}, {batch} x {size[0]} x {size[1]} pixels, on {machine_text(environment)}"
