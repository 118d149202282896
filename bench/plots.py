"""The report's figures: horizontal bars, narrow enough that their text stays readable on a phone."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import best_triton_rows

COLORS = {"triton": "#e8590c", "torchvision": "#3b7dd8", "torch": "#868e96", "torch.compile": "#2b9a66"}
INK = "#123456"  # stands for the page's text colour: in the SVG it becomes `currentColor`
INK_ON_WHITE = "#1c1e21"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif", "font.size": 9}


@dataclass(frozen=True)
class Plot:
    """One figure in both forms: SVG for the page, PNG for Markdown."""

    name: str
    title: str
    svg: str
    png: bytes


def make_plots(table: pd.DataFrame) -> list[Plot]:
    """Times of every op and direction, and the speed-ups where there are Triton rows."""
    plots = []
    triton = best_triton_rows(table).dropna(subset=["ratio_best"])
    if not triton.empty:
        title = "Triton's speed-up over the best baseline"
        plots.append(_render("speedup", title, lambda ink: _speedup_figure(triton, ink)))
    for (op, direction), rows in table.groupby(["op", "direction"], sort=False):
        title = f"{op}, {direction}: median time of a call"
        plots.append(_render(f"{op}-{direction}", title, lambda ink, rows=rows: _time_figure(rows, ink)))
    return plots


def format_seconds(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:  # what would be rounded up to 1000 of the smaller unit
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} µs"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _render(name: str, title: str, draw) -> Plot:  # noqa: ANN001
    with mpl.rc_context(STYLE):
        png = io.BytesIO()
        figure = draw(INK_ON_WHITE)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        svg = io.StringIO()
        draw(INK).savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, title, _inline(svg.getvalue(), title), png.getvalue())


def _inline(svg: str, title: str) -> str:
    """Drop the XML preamble and fixed size; take the text colour from the page; name it for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg) if "xlink:href" not in svg else svg
    return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _figure(lines: float, ink: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 0.55 + 0.235 * lines), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=ink, labelsize=9, left=False)
    axes.xaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink)
    return figure, axes


def _time_figure(rows: pd.DataFrame, ink: str) -> Figure:
    """One group of bars a workload and dtype, a bar a provider; whiskers from the 25 % to the 75 % quantile."""
    groups = list(rows.groupby(["workload", "dtype"], sort=False))
    figure, axes = _figure(len(rows) + 1.3 * len(groups), ink)
    places = []
    for place, item in _stacked(groups):
        if isinstance(item, str):
            axes.annotate(item, (0, place), (4, 0), ("axes fraction", "data"), "offset points",
                          va="center", weight="bold", color=ink)  # fmt: skip
            continue
        places.append((place, _bar_name(item)))
        _time_bar(axes, place, item, ink)
    axes.set(xscale="log", xlim=(rows["q25"].min() / 4, rows["q75"].max() * 8), xlabel="log scale")
    axes.xaxis.set_major_formatter(lambda seconds, _: format_seconds(seconds).replace(".00", "").replace(".0", ""))
    axes.set_yticks([p for p, _ in places], [name for _, name in places])
    axes.set_ylim(max(p for p, _ in places) + 0.7, -0.7)
    axes.xaxis.set_minor_formatter("")
    return figure


def _stacked(groups: list[tuple[tuple, pd.DataFrame]]) -> Iterator[tuple[float, object]]:
    """Positions from top to bottom: a group's title, then its rows."""
    place = 0.0
    for names, rows in groups:
        yield place, ", ".join(names)
        for row in rows.itertuples():
            place += 1
            yield place, row
        place += 1.3


def _bar_name(row) -> str:  # noqa: ANN001
    name = row.provider if row.measured_dtype == row.dtype else f"{row.provider} {row.measured_dtype}"
    return f"{name} {row.layout}" if row.provider == "triton" and row.layout != "contiguous" else name


def _time_bar(axes: Axes, place: float, row, ink: str) -> None:  # noqa: ANN001
    axes.barh(place, row.median, height=0.72, color=COLORS[row.provider])
    whiskers = [[row.median - row.q25], [row.q75 - row.median]]
    axes.errorbar(row.median, place, xerr=np.maximum(whiskers, 0), color=ink, capsize=2.5, linewidth=1)
    axes.annotate(format_seconds(row.median), (row.q75, place), (5, 0), textcoords="offset points",
                  va="center", color=ink)  # fmt: skip


def _speedup_figure(triton: pd.DataFrame, ink: str) -> Figure:
    """Best baseline over Triton: right of the line at 1 Triton is faster, left of it slower."""
    groups = list(triton.groupby(["op", "direction"], sort=False))
    figure, axes = _figure(len(triton) + 1.3 * len(groups), ink)
    places = []
    for place, item in _stacked(groups):
        if isinstance(item, str):
            axes.annotate(item, (0, place), (4, 0), ("axes fraction", "data"), "offset points",
                          va="center", weight="bold", color=ink)  # fmt: skip
            continue
        places.append((place, f"{item.workload} {item.dtype}"))
        wins = item.ratio_best >= 1
        axes.barh(place, item.ratio_best - 1, left=1, height=0.72, color=COLORS["triton"], alpha=1 if wins else 0.5)
        axes.annotate(f"{item.ratio_best:.2f}x", (max(item.ratio_best, 1), place), (4, 0),
                      textcoords="offset points", va="center", color=ink)  # fmt: skip
        axes.plot([1, 1], [place - 0.55, place + 0.55], color=ink, linewidth=1)
    axes.set(xscale="log", xlim=(min(0.5, triton["ratio_best"].min() / 1.3), max(2, triton["ratio_best"].max() * 1.8)))
    axes.set(xlabel="times as fast as the best baseline, log scale")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks([p for p, _ in places], [name for _, name in places])
    axes.set_ylim(max(p for p, _ in places) + 0.7, -0.7)
    return figure
