"""The summary as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .record import Stage, Summary


def summary_table(summary: Summary) -> Table:
    """The stages and their tensors in the order in which they are made, the totals and the notes."""
    mode = "training" if summary.training else "inference"
    images = f"{summary.batch} x {summary.size[0]} x {summary.size[1]}"
    table = Table(
        title=f"{summary.config}, {mode}, {images} pixels",
        caption="\n".join([summary.totals, "", *summary.notes]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("stage", "tensor", "shape", "anchors", "parameters", "GFLOPs"):
        right = column in ("parameters", "GFLOPs")
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in _rows(summary.stages):
        table.add_row(*map(escape, row))
    return table


def _rows(stages: Sequence[Stage]) -> Iterator[tuple[str, ...]]:
    """A line a tensor; what is said of a stage, or of the stages of one part, stands in its first line alone."""
    previous = ""
    for stage in stages:
        part = stage.name.partition(".")[0]
        name, anchors = (part, _anchors_text(stage)) if part != previous else ("", "")
        parameters, gflops = _parameters_text(stage), _gflops_text(stage)
        for tensor in stage.tensors:
            shape = f"[{', '.join(map(str, tensor.shape))}]"
            yield name, tensor.name, shape, ", ".join(filter(None, (anchors, tensor.note))), parameters, gflops
            name = anchors = parameters = gflops = ""
        previous = part


def _anchors_text(stage: Stage) -> str:
    return "" if stage.name == "input" else "yes" if stage.anchors else "no"


def _parameters_text(stage: Stage) -> str:
    parts = [f"{stage.trainable:,}"] if stage.trainable else []
    return " + ".join([*parts, *([f"{stage.frozen:,} frozen"] if stage.frozen else [])])


def _gflops_text(stage: Stage) -> str:
    digits = 1 if stage.flops >= 1e10 else 3
    return f"{stage.flops / 1e9:,.{digits}f}" if stage.flops else ""
