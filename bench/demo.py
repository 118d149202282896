"""The whole project in one command: train, compare with the reference ops, draw, measure, report."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from mrcnn.checkpoint import Checkpoint
from mrcnn.config import CONFIGS, Config
from mrcnn.data.augment import build_transform
from mrcnn.data.collate import Collate
from mrcnn.data.shapes import ShapesDataset
from mrcnn.evaluation import format_table
from mrcnn.inference import detect, evaluate
from mrcnn.train import train
from mrcnn.visualize import draw_detections, draw_sheet

from .follow import TOLERANCE, follow, following_table
from .memory import OUT_OF_MEMORY
from .plots import format_seconds
from .providers import is_ours
from .report import write_report
from .results import STUDY_FILE, ResultsError, read_results
from .study import StudyError, run_study
from .worker import WorkerError

MIN_MASK_AP50 = 0.35
FOLLOW_STEPS = 20
# On a GPU; on a CPU there is little to measure.
MEASURED = ("train bf16", "train label_grid_anchors", "train nms_mask", "train box_iou")
MEASURING = 240.0  # seconds
NO_GPU = "No GPU: the Triton kernels were checked, not timed. Run the demo on a GPU for the speed-ups."
SHEET_IMAGES = 6
SHEET_SCORE = 0.3  # a model of a few minutes is not sure of much


def demo_config(on_gpu: bool) -> Config:
    """`tiny` on a CPU; on a GPU the full ResNet-50 model at 512 pixels, with the recipe of `tiny`."""
    tiny = CONFIGS["tiny"]
    if not on_gpu:
        return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, steps=320, log_every=40))
    full = CONFIGS["torchvision"]
    return Config(
        name="demo",
        model=dataclasses.replace(full.model, weights="", norm="gn", frozen_stages=0),
        data=dataclasses.replace(full.data, image_size=512, max_size=512),
        train=dataclasses.replace(tiny.train, steps=400, batch_size=16, lr=2e-4, workers=8, log_every=25),
    )


def run_demo(output: Path, console: Console) -> bool:
    """Run every part, writing to `output`; False where a part did not reach what it has to."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    config = demo_config(on_gpu)
    size = config.data.image_size
    held_out = ShapesDataset(64, size, seed=1_000_000)

    console.rule(f"1. training {config.name} on synthetic shapes, {size} x {size}, on {_device_name(device)}")
    checkpoint = _train(config, size, output, device, console)
    results = evaluate(checkpoint.model, held_out, checkpoint.config)
    console.print(format_table(results))
    # The threshold is calibrated for what a CPU trains: 300 such steps reached 0.42, 350 reached 0.46.
    learned = on_gpu or results["segm"]["AP50"] >= MIN_MASK_AP50
    wanted = "" if on_gpu else f", wanted {MIN_MASK_AP50}"
    console.print(_verdict(learned, f"held-out mask AP50 {results['segm']['AP50']:.3f}{wanted}"))

    console.rule(
        "2. the Triton kernels" + ("" if on_gpu else ", in Triton's interpreter,") + " beside the reference ops"
    )
    followed = _follow(checkpoint, size, device, console)

    console.rule("3. ground truth beside prediction")
    sheet = output / "sheet.png"
    _draw(checkpoint, held_out, sheet)
    console.print(f"wrote {sheet}: detections with a score above {SHEET_SCORE}")

    console.rule("4. measuring the ops")
    measured = _measure(output, on_gpu, console)
    return learned and followed and measured


def _train(config: Config, size: int, output: Path, device: torch.device, console: Console) -> Checkpoint:
    def on_step(step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            parts = "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in metrics.items() if k.startswith("loss_"))
            console.print(f"step {step:4d}  loss {metrics['loss']:.3f}  ({parts})  {metrics['seconds']:.0f} s")

    (output / "checkpoint.pt").unlink(missing_ok=True)  # of an earlier demo
    dataset = ShapesDataset(config.train.steps * config.train.batch_size, size, seed=0)
    return train(dataset, config, output, device, on_step=on_step)


def _follow(checkpoint: Checkpoint, size: int, device: torch.device, console: Console) -> bool:
    """Twenty steps from the trained weights, on one image of few RoIs: the interpreter is slow."""
    model = copy.deepcopy(checkpoint.model)
    few = {} if device.type == "cuda" else {"roi_samples": 16, "pre_nms_top_n": (40, 40), "post_nms_top_n": (50, 50)}
    # A low canonical scale spreads the shapes over three levels of the pyramid.
    model.configure(canonical_scale=size // 3, **few)
    dataset = ShapesDataset(FOLLOW_STEPS, size, seed=7)
    collate = Collate(dataset.max_objects)
    batches = [collate([dataset[i]]).to(device) for i in range(len(dataset))]
    with console.status("training") as status, warnings.catch_warnings():
        # The interpreter computes the 0/0 of masked-out lanes with numpy, which warns.
        warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)
        seen = follow(model, batches, lr=1e-3, on_step=lambda step: status.update(f"step {step} of {FOLLOW_STEPS}"))
    console.print(following_table(seen, FOLLOW_STEPS))
    losses = ", ".join(f"{ours:.6f} / {reference:.6f}" for ours, reference in (seen.losses[0], seen.losses[-1]))
    console.print(f"loss, Triton / reference, first and last step: {losses}")
    console.print(f"smallest gradient norm of the feature pyramid: {seen.smallest_gradient:.3g}")
    text = f"largest relative difference: losses {seen.loss_error:.1e}, gradients {seen.gradient_error:.1e}"
    console.print(_verdict(seen.ok, f"{text}, allowed {TOLERANCE:.0e}"))
    return seen.ok


def _draw(checkpoint: Checkpoint, dataset: ShapesDataset, path: Path) -> None:
    """The first held-out images with their objects and with what the model finds."""
    data, names = checkpoint.config.data, checkpoint.class_names
    resize = build_transform(False, data.image_size, data.max_size)
    samples = [dataset[i] for i in range(SHEET_IMAGES)]
    batch = Collate(dataset.max_objects)([resize(image, target) for image, target in samples])
    rows = []
    for (image, target), (_, found) in zip(samples, detect(checkpoint.model, batch), strict=True):
        shown = {name: value[found["scores"] > SHEET_SCORE] for name, value in found.items()}
        truth = draw_detections(image, target["boxes"], target["labels"], None, target["masks"].bool(), names)
        rows.append((truth, draw_detections(image, **shown, class_names=names)))
    draw_sheet(rows, path)


def _measure(output: Path, on_gpu: bool, console: Console) -> bool:
    """A short study (its worker is a process of its own, where the kernels are compiled) and its report.

    False where a provider failed, or a Triton result was wrong. A baseline that is wrong in float16, or runs out of
    memory, is no rival, no more: the report says so.
    """
    folder, device = output / "study", "cuda" if on_gpu else "cpu"
    (folder / STUDY_FILE).unlink(missing_ok=True)  # of an earlier demo
    try:
        with console.status("measuring") as status:
            progress = run_study(folder, device, MEASURED if on_gpu else (), MEASURING, on_event=status.update)
        table = read_results(folder).table()
    except (StudyError, WorkerError, ResultsError) as error:
        console.print(_verdict(False, str(error)))
        return False
    timed = table["median"].notna()
    console.print(f"{timed.sum()} rows measured, {(~timed).sum()} not; the report says why")
    for path in write_report(folder, output / "report")[:2]:
        console.print(f"wrote {path}")
    console.print(speedup_table(table) if on_gpu else NO_GPU)
    ours, status = table["provider"].map(is_ours).astype(bool), table["status"]
    too_large = table["reason"].str.startswith(OUT_OF_MEMORY) & ~ours  # a baseline's, and a result
    bad = table[((status == "failed") & ~too_large) | ((status == "red") & ours)]
    for row in bad.itertuples():
        console.print(_verdict(False, f"{row.op} {row.direction}, {row.workload}, {row.provider}: {row.reason}"))
    for name, reason in progress.lost.items():
        console.print(_verdict(False, f"{name}: {reason}"))
    return bad.empty and not progress.lost


def speedup_table(results: pd.DataFrame) -> Table:
    """Triton's fastest time of every training workload against torchvision's; the report has all of both."""
    results = results[results["median"].notna()]
    table = Table(title="Triton against torchvision")
    for column in ("op", "direction", "workload", "dtype", "Triton", "torchvision", "speed-up"):
        table.add_column(column)
    for names, rows in results[results["suite"] == "train"].groupby(["op", "direction", "workload", "dtype"]):
        ours, theirs = (rows[rows["provider"] == p].nsmallest(1, "median") for p in ("triton", "torchvision"))
        if ours.empty or theirs.empty:
            continue
        ours, theirs = ours.iloc[0], theirs.iloc[0]
        ran_in = "" if theirs["measured_dtype"] == theirs["dtype"] else f" (in {theirs['measured_dtype']})"
        times = [format_seconds(ours["median"]), format_seconds(theirs["median"]) + ran_in]
        table.add_row(*names, *times, f"{theirs['median'] / ours['median']:.2f} x")
    return table


def _verdict(ok: bool, text: str) -> str:
    return f"[green]ok[/green]    {text}" if ok else f"[red]FAILED[/red] {text}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU ({torch.get_num_threads()} threads)"
