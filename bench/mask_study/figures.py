"""The study's pictures: loss curves, the numbers of every run, and masks of all arms beside ground truth."""

from __future__ import annotations

import io
import warnings

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mrcnn.data.rle import mask_api
from mrcnn.visualize import draw_detections

from .arms import ARMS, METRICS, arm_config, held_out_set
from .record import Record
from .statistics import t_interval, values_of

MARKS = {"bce": ("#e8590c", "o"), "softmax": ("#3b7dd8", "s"), "canvas": ("#2b9a66", "^")}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mask-study", "font.family": "sans-serif", "font.size": 9}
SMOOTH = 10  # steps that a curve is averaged over
SHOWN = (
    *("segm_AP", "bbox_AP", "given_iou", "given_fill"),
    *("best_iou", "best_fill", "best_merged", "jump"),
)
TILE, MARGIN, HEADER = 288, 6, 24


def curves(record: Record) -> Figure:
    """Total and mask loss: mean over the seeds, band from the lowest to the highest."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("total", "mask"), ("total loss", "mask loss"), strict=True):
        for arm, (colour, _) in MARKS.items():
            found = [_smooth(run["curves"][key]) for run in record.runs if run["arm"] == arm]
            if not found:
                continue
            values = np.stack(found)
            steps = np.arange(1, values.shape[1] + 1) + min(SMOOTH, record.settings["steps"]) - 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # steps where no seed's loss is finite
                axes.fill_between(steps, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.15, lw=0)
                axes.plot(steps, np.nanmean(values, 0), color=colour, label=arm, lw=1.4)
        _plain(axes, title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    return figure


def numbers(record: Record) -> Figure:
    """Each run a dot, each arm's mean a line with its 95 % interval."""
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    titles = {metric.name: metric.title for metric in METRICS}
    for axes, name in zip(figure.subplots(2, 4).flat, SHOWN, strict=True):
        for place, (arm, (colour, mark)) in enumerate(MARKS.items()):
            values = list(values_of(record.runs, arm, name).values())
            interval = t_interval(values)
            if interval is None:
                continue
            shift = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(place + shift, values, mark, color=colour, ms=4, alpha=0.6, mec="none")
            axes.plot([place - 0.3, place + 0.3], [interval.mean] * 2, color=colour, lw=1.6)
            if interval.low is not None:
                axes.vlines(place, interval.low, interval.high, color=colour, lw=1)
        _plain(axes, titles[name])
        axes.set_xticks(range(len(MARKS)), list(MARKS), fontsize=8)
        axes.set_xlim(-0.6, len(MARKS) - 0.4)
        axes.set_ylim(bottom=0)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """The figure as `svg` or `png`, the same bytes every time."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        if kind == "svg":
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
        else:
            figure.set_dpi(160)
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def sheet(record: Record) -> bytes | None:
    """JPEG: a row a held-out picture of the first seed, ground truth and the masks of each arm in the given boxes."""
    seed = min(run["seed"] for run in record.runs)
    runs = {arm: record.run(arm, seed) for arm in ARMS}
    if not all(runs.values()):
        return None
    dataset = held_out_set(arm_config("bce", seed, record.settings["steps"]), record.settings["images"])
    rows = len(next(iter(runs.values()))["sheet"])
    width, height = (1 + len(ARMS)) * (TILE + MARGIN) + MARGIN, rows * (TILE + MARGIN) + HEADER
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(("ground truth", *ARMS)):
        draw.text((MARGIN + column * (TILE + MARGIN), MARGIN), title, fill="black", font=ImageFont.load_default(14))
    for row in range(rows):
        image, target = dataset[row]
        columns = [target["masks"]]
        columns += [_decode(run["sheet"][row]["masks"], dataset.image_size) for run in runs.values()]
        for column, masks in enumerate(columns):
            drawn = draw_detections(image, target["boxes"], target["labels"], None, masks, dataset.class_names)
            place = (MARGIN + column * (TILE + MARGIN), HEADER + row * (TILE + MARGIN))
            picture.paste(drawn.resize((TILE, TILE), Image.Resampling.LANCZOS), place)
    file = io.BytesIO()
    # A palette speckles the noise of the pictures, and as a PNG of all colours the sheet is twice as large.
    picture.save(file, format="JPEG", quality=75, optimize=True)
    return file.getvalue()


def _decode(counts: list[str], side: int) -> torch.Tensor:
    if not counts:
        return torch.zeros(0, side, side, dtype=torch.bool)
    decoded = mask_api().decode([{"size": [side, side], "counts": c.encode()} for c in counts])
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))).bool()


def _smooth(values: list[float | None]) -> np.ndarray:
    window = min(SMOOTH, len(values))
    return np.convolve(np.array([np.nan if v is None else v for v in values]), np.full(window, 1 / window), "valid")


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.5)
    axes.set_axisbelow(True)
