"""The report's figures: few, and narrow enough that their text stays readable on a phone.

A row that is stale is drawn hollow: it must not pass for a measurement of the present code.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .results import best_triton_rows
from .workloads import WORKLOADS, Workload

MARKS = {  # colour and shape, for those who see few colours
    "triton": ("#e8590c", "o"),
    "triton atomic": ("#f59f00", "v"),
    "triton apart": ("#c2255c", "P"),
    "torchvision": ("#3b7dd8", "s"),
    "torchvision deterministic": ("#7048e8", "X"),
    "torch": ("#868e96", "^"),
    "torch.compile": ("#2b9a66", "D"),
}
SIZES = {
    "rois": "RoIs an image",
    "roi_size": "side of every RoI, pixels",
    "channels": "channels",
    "image_size": "image size, pixels",
    "objects": "objects an image, on average",
    "masks": "positive masks",
    "classes": "classes, background included",
    "paste_masks masks": "masks",
    "nms_mask rois": "boxes a group",
}
INK = "#123456"  # stands for the page's text colour: in the SVG it becomes `currentColor`
INK_ON_WHITE = "#1c1e21"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif", "font.size": 9}


@dataclass(frozen=True)
class Plot:
    """One figure in both forms: SVG for the page, PNG for Markdown."""

    name: str
    title: str
    svg: str
    draw: Callable[[str], Figure]  # in a colour of ink

    @property
    def png(self) -> bytes:
        """Drawn when asked for: a study writes the page alone."""
        with mpl.rc_context(STYLE):
            png = io.BytesIO()
            FigureCanvasAgg(self.draw(INK_ON_WHITE)).print_png(png, metadata={"Software": None})
        return png.getvalue()


def make_plots(table: pd.DataFrame) -> list[Plot]:
    """Speed-ups of the train suite, then times and scaling curves of every op and direction."""
    timed = table[table["median"].notna()]
    triton = best_triton_rows(timed[timed["suite"] == "train"]).dropna(subset=["ratio"])
    plots = []
    if not triton.empty:
        title = "Triton's speed-up over the best baseline, train suite"
        plots.append(render("speedup", title, lambda ink: _speedup_figure(triton, ink)))
    for (op, direction), rows in timed.groupby(["op", "direction"], sort=False):
        single = rows[rows["suite"] != "sweep"]
        if not single.empty:
            title = f"{op}, {direction}: {rows['time'].iloc[0]}"
            plots.append(render(f"{op}-{direction}", title, lambda ink, rows=single: _time_figure(rows, ink)))
        curves = scaling_curves(op, rows)
        if curves:
            title = f"{op}, {direction}: scaling of {rows['time'].iloc[0]}"
            draw = lambda ink, curves=curves: _scaling_figure(curves, ink)
            plots.append(render(f"{op}-{direction}-scaling", title, draw))
    return plots


def scaling_curves(op: str, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Swept size -> rows, each with its `size` and its `label`; only what makes at least two points of a curve."""
    curves = {}
    for name in dict.fromkeys(w.sweep for w in WORKLOADS if w.op == op and w.sweep):
        sizes = {w.name: getattr(w.sizes, name) for w in _sweep(op, name)}
        swept = rows[rows["workload"].isin(sizes) & (rows["suite"] == "sweep")]
        points = rows[rows["workload"].isin(sizes) & rows["dtype"].isin(swept["dtype"])]
        points = points.assign(
            size=[math.prod(s) if isinstance(s, tuple) else s for s in points["workload"].map(sizes)],
            label=["x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in points["workload"].map(sizes)],
        )
        if not swept.empty and points.groupby("provider")["workload"].nunique().max() > 1:
            curves[name] = points
    return curves


def _sweep(op: str, name: str) -> Iterator[Workload]:
    """The workloads that vary `name`, and the canonical ones that they vary where these have such a size."""
    points = [w for w in WORKLOADS if w.op == op and w.sweep == name]
    yield from points
    for canonical in (w for w in WORKLOADS if w.op == op and w.suite in ("train", "inference")):
        size = getattr(canonical.sizes, name)
        if size and replace(points[0].sizes, **{name: size}) == canonical.sizes:
            yield canonical


def format_seconds(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:  # what would be rounded up to 1000 of the smaller unit
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} µs"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def render(name: str, title: str, draw: Callable[[str], Figure]) -> Plot:
    """A figure that `draw` makes in a colour of ink."""
    with mpl.rc_context(STYLE):
        svg = io.StringIO()
        draw(INK).savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, title, _inline(svg.getvalue(), title), draw)


def _inline(svg: str, title: str) -> str:
    """Drop the XML preamble and fixed size; take the text colour from the page; name it for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg) if "xlink:href" not in svg else svg
    return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def new_figure(height: float, ink: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, `height` inches in all, with a log scale from left to right."""
    figure = Figure(figsize=(4.8, height), dpi=160, layout="constrained")
    axes = list(figure.subplots(panels, squeeze=False)[:, 0])
    for panel in axes:
        panel.set_xscale("log")
        panel.tick_params(which="both", colors=ink, labelsize=9)
        panel.xaxis.label.set_color(ink)
        for side, spine in panel.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(ink)
        panel.grid(axis="both", color=ink, alpha=0.15, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def _name_lines(axes: Axes, names: list[str]) -> None:
    """One line of the figure each, from top to bottom."""
    axes.tick_params(left=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def few_ticks(axis: mpl.axis.Axis, low: float, high: float, text: Callable[[float], str]) -> None:
    """At 1, 2, 5 times powers of ten, or at the powers only where the range is wide."""
    steps = (1, 2, 5) if high / low < 60 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = sorted({step * 10.0**decade for decade in decades for step in steps})
    ticks = [t for t in ticks if low * 0.8 <= t <= high * 1.25]
    axis.set_ticks(ticks, [text(t) for t in ticks])
    axis.set_minor_formatter("")
    axis.set_tick_params(which="minor", length=0)


def _short_seconds(seconds: float) -> str:
    return format_seconds(seconds).replace(".00", "").replace(".0", "")


def legend(figure: Figure, rows: pd.DataFrame, ink: str, line: str, extra: Sequence[Line2D] = ()) -> None:
    """The providers of `rows`, what else is drawn, and `extra`."""
    entries = [
        Line2D([], [], color=color, marker=marker, linestyle=line, markersize=5, label=provider)
        for provider, (color, marker) in MARKS.items()
        if provider in set(rows["provider"])
    ]
    if rows["stale"].notna().any():
        hollow = {"marker": "o", "markerfacecolor": "none", "linestyle": "none", "markersize": 5}
        entries.append(Line2D([], [], color=ink, label="hollow: stale", **hollow))
    if rows["roof"].notna().any():
        entries.append(Line2D([], [], color=ink, linestyle=":", label="roof: a bound, no time"))
    entries += extra
    options = {"labelcolor": ink, "frameon": False, "columnspacing": 1.0, "handletextpad": 0.4, "borderpad": 0}
    figure.legend(handles=entries, loc="outside upper left", ncols=4 if len(entries) < 5 else 2, **options)


def _quickest(rows: pd.DataFrame) -> pd.DataFrame:
    """Each provider's quickest variant of every workload and dtype."""
    return rows.loc[rows.groupby(["workload", "dtype", "provider"], sort=False)["median"].idxmin()]


def point_style(row: pd.Series) -> dict:
    """How a provider's row is drawn; hollow where it is stale."""
    color, marker = MARKS[row.provider]
    filled = "none" if pd.notna(row.stale) else color
    return {"color": color, "marker": marker, "markerfacecolor": filled, "markersize": 5.5, "linewidth": 1.2}


def _time_figure(rows: pd.DataFrame, ink: str) -> Figure:
    """One line a workload and dtype, one mark a provider, from the 25 % to the 75 % quantile; the roof as dots."""
    calls = list(_quickest(rows).groupby(["workload", "dtype"], sort=False))
    figure, (axes,) = new_figure(0.85 + 0.26 * len(calls), ink)
    for place, (_, providers) in enumerate(calls):
        for row in providers.itertuples():
            axes.plot([row.q25, row.q75], [place, place], color=point_style(row)["color"], linewidth=1.2)
            axes.plot(row.median, place, **point_style(row))
        if providers["roof"].notna().any():  # of the quickest: bytes depend on the dtype
            roof = providers["roof"].min()
            axes.plot([roof, roof], [place - 0.4, place + 0.4], color=ink, linestyle=":", linewidth=1.6)
    _name_lines(axes, [f"{workload} {dtype}" for (workload, dtype), _ in calls])
    low, high = rows[["q25", "roof"]].min().min(), rows["q75"].max()
    axes.set_xlim(low / 1.5, high * 1.5)
    few_ticks(axes.xaxis, low, high, _short_seconds)
    legend(figure, rows, ink, "none")
    return figure


def _speedup_figure(triton: pd.DataFrame, ink: str) -> Figure:
    """Best baseline over Triton, with its interval: right of the line at 1 Triton is faster, left of it slower."""
    names = [f"{r.op}\n{r.workload} {r.dtype}, {r.direction}" for r in triton.itertuples()]
    figure, (axes,) = new_figure(0.6 + 0.36 * len(triton), ink)
    color = MARKS["triton"][0]
    for place, row in enumerate(triton.itertuples()):
        stale = pd.notna(row.stale)
        axes.barh(place, row.ratio - 1, left=1, height=0.6, facecolor="none" if stale else color, edgecolor=color,
                  linestyle="--" if stale else "-", alpha=1 if row.ratio >= 1 else 0.6)  # fmt: skip
        whiskers = [[max(row.ratio - row.low, 0)], [max(row.high - row.ratio, 0)]]
        axes.errorbar(row.ratio, place, xerr=whiskers, color=ink, capsize=2.5, linewidth=1)
        text = f"{row.ratio:.2f}x" + (" (stale)" if stale else "")
        axes.annotate(text, (max(row.high, 1), place), (5, 0), textcoords="offset points", va="center", color=ink)
    axes.axvline(1, color=ink, linewidth=1)
    low, high = min(0.5, triton["low"].min() / 1.2), max(2, triton["high"].max() * 2)
    axes.set(xlim=(low, high), xlabel="times as fast as the best baseline")
    few_ticks(axes.xaxis, low, high, "{:g}".format)
    _name_lines(axes, names)
    return figure


def _scaling_figure(curves: dict[str, pd.DataFrame], ink: str) -> Figure:
    """One panel a swept size, one line a provider."""
    figure, panels = new_figure(0.5 + 2.3 * len(curves), ink, len(curves))
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        points = _quickest(points).sort_values("size")
        axes.set_yscale("log")
        for _, line in points.groupby("provider", sort=False):
            axes.plot(line["size"], line["median"], color=point_style(line.iloc[0])["color"], linewidth=1.2)
            for row in line.itertuples():
                axes.plot(row.size, row.median, **point_style(row))
        roofs = points.groupby("size")["roof"].min().dropna()
        axes.plot(roofs.index, roofs, color=ink, linestyle=":", linewidth=1.4)
        ticks = points.drop_duplicates("size")
        axes.set_xticks(ticks["size"], ticks["label"])
        axes.minorticks_off()
        axes.set_xlabel(SIZES.get(f"{points['op'].iloc[0]} {name}", SIZES[name]))
        few_ticks(axes.yaxis, points[["median", "roof"]].min().min(), points["median"].max(), _short_seconds)
    legend(figure, pd.concat(curves.values()), ink, "-")
    return figure
