"""The figures of peak memory over the number of objects, anchors, masks and classes.

A matrix of all pairs, or a channel for each class, is seen at a glance.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .boxes import anchor_grid
from .memory import OUT_OF_MEMORY
from .plots import SIZES, Plot, few_ticks, legend, new_figure, point_style, render, scaling_curves
from .workloads import MASK_OPS, RPN_OPS, WORKLOADS

MIB = 2**20
LABELS = {**SIZES, "anchors": "anchors an image"}
SWEPT = ("objects", "image_size", "masks", "classes")
ABOVE = 3.0  # times the most that anybody takes: there stands who ran out


def memory_plots(table: pd.DataFrame) -> list[Plot]:
    """One figure for each op and direction of the region proposal network and the mask branch with such a sweep."""
    plots = []
    rows_of_ops = table[table["op"].isin((*RPN_OPS, *MASK_OPS))]
    for (op, direction), rows in rows_of_ops.groupby(["op", "direction"], sort=False):
        curves = memory_curves(op, rows)
        if curves:
            what = "a forward and its backward" if direction == "backward" else "a call"
            title = f"{op}, {direction}: peak memory of {what}"
            draw = lambda ink, curves=curves, op=op: _figure(op, curves, ink)
            plots.append(render(f"{op}-{direction}-memory", title, draw))
    return plots


def memory_curves(op: str, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`scaling_curves` of the rows whose memory is known, in `mib`, or known not to suffice (`mib` is NaN).

    Of a backward it is that of both passes, each provider in the layout that takes least. Images of the region proposal
    network are put in the order of their anchors, which are what takes memory.
    """
    measured = "step_memory_bytes" if (rows["direction"] == "backward").all() else "peak_memory_bytes"
    gone = (rows["status"] == "failed") & rows["reason"].str.startswith(OUT_OF_MEMORY)
    known = rows[measured].where(rows["status"] == "ok").astype(float)
    rows = rows.assign(mib=(known / MIB).where(known > 0))[gone | (known > 0)]
    rows = rows.sort_values("mib", kind="stable").drop_duplicates(["workload", "dtype", "provider"]).sort_index()
    curves = {name: c for name, c in scaling_curves(op, rows).items() if name in SWEPT}
    if "image_size" in curves and op in RPN_OPS:
        points = curves.pop("image_size")
        sizes = {w.name: len(anchor_grid(w.sizes.image_size)) for w in WORKLOADS if w.op == op}
        anchors = points["workload"].map(sizes)
        curves["anchors"] = points.assign(size=anchors, label=[f"{n / 1000:.0f}k" for n in anchors])
    return {name: points for name, points in curves.items() if points["mib"].notna().any()}


def _figure(op: str, curves: dict[str, pd.DataFrame], ink: str) -> Figure:
    """One panel a swept size, one line a provider."""
    figure, panels = new_figure(0.7 + 2.3 * len(curves), ink, len(curves))
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        _panel(axes, points.sort_values("size"))
        axes.set_xlabel(SIZES.get(f"{op} {name}", LABELS[name]))
    points = pd.concat(curves.values())
    missing = {"marker": "x", "markeredgewidth": 2, "linestyle": "none", "markersize": 6}
    extra = [Line2D([], [], color=ink, label=OUT_OF_MEMORY, **missing)] if points["mib"].isna().any() else []
    legend(figure, points.assign(roof=float("nan")), ink, "-", extra)
    return figure


def _panel(axes: Axes, points: pd.DataFrame) -> None:
    axes.set_yscale("log")
    top = ABOVE * points["mib"].max()
    for _, line in points.groupby("provider", sort=False):
        style = point_style(line.iloc[0])
        axes.plot(line["size"], line["mib"], color=style["color"], linewidth=1.2)
        for row in line.itertuples():
            if pd.isna(row.mib):
                axes.plot(row.size, top, color=style["color"], marker="x", markeredgewidth=2, markersize=7)
            else:
                axes.plot(row.size, row.mib, **point_style(row))
    ticks = points.drop_duplicates("size")
    axes.set_xticks(ticks["size"], ticks["label"])
    axes.minorticks_off()
    low, high = points["mib"].min(), top if points["mib"].isna().any() else points["mib"].max()
    axes.set_ylim(low / 1.6, high * 1.6)
    few_ticks(axes.yaxis, low, high, "{:,g} MiB".format)
