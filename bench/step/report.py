"""README.md of a record: verdict, tables, ladder, ablation, inference, where it loses, environment."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from ..report import _template, write_whole
from ..tables import machine_text
from ..verdicts import SLOWER
from . import report_tables as tables
from .providers import ABLATION, BASELINE, CHECK, INFERENCE, LADDER, LOADER, TOP
from .record import STEP_FILE, Record, StepError, source_hash
from .report_tables import NOT_MEASURED, View

REPORT_FILE, TEMPLATE = "README.md", "step.md.j2"
EAGER_NAMED = "torchvision nchw fp16 eager"  # what most people run: named beside the best


def write_step_report(record: Record, folder: Path) -> Path:
    """Render and write README.md; returns its path.

    Raises:
        StepError: the record holds no session.
        OSError: it cannot be written.
    """
    if not record.sessions:
        raise StepError(f"{folder} holds no {STEP_FILE}: run `mrcnn-bench step` first")
    write_whole(folder / REPORT_FILE, _template(TEMPLATE).render(report_context(record)).encode())
    return folder / REPORT_FILE


def report_context(record: Record) -> dict[str, Any]:
    """What the template needs."""
    view, session = View(record), record.newest_session()
    baselines = view.providers(BASELINE)
    best = view.best(baselines)
    return {
        "on_gpu": view.on_gpu,
        "machine": machine_text(session["environment"]),
        "session": session,
        "workload": session["workload"],
        "verdict": _verdict(view, best, TOP),
        "losses": _where_it_loses(view, best, TOP),
        "training": [tables.training_line(view, p, best) for p in [*baselines, *view.providers(LADDER)]],
        "ladder": tables.ladder(view, best),
        "phases": [tables.phase_line(view, p) for p in view.providers(BASELINE, LADDER)],
        "device_work": [tables.device_line(view, p) for p in view.providers(BASELINE, LADDER)],
        "groups": tables.groups(view, [best["name"] if best else None, TOP]),
        "ours": tables.ours(view, TOP),
        "ablation": tables.ablation(view, TOP),
        "inference": tables.inference(view),
        "loader": tables.loader(view),
        "check": tables.check(view),
        "counts": [tables.counts_line(view, p) for p in view.providers(BASELINE, LADDER)],
        "missing": tables.missing(view),
        "stale": [
            p.name
            for p in view.providers(BASELINE, LADDER, ABLATION, INFERENCE, LOADER, CHECK)
            if (row := view.row(p.name)) and row["sources"] != source_hash(p.name.startswith("torchvision"))
        ],
        "noise": f"{100 * view.noise():.1f} %" if view.noise() else NOT_MEASURED,
        "file": STEP_FILE,
    }


def _verdict(view: View, best: dict | None, top: str) -> str:
    row = view.row(top)
    if not view.on_gpu:
        return "Figures of a CPU and of a tiny model: they show that the command works and say nothing about a GPU."
    if row is None or best is None:
        return f"Nothing can be said yet: {top if row is None else 'the baseline'} was {NOT_MEASURED}."
    text, _ = view.speed(top, best)
    named = view.row(EAGER_NAMED)
    beside = ""
    if named and named["name"] != best["name"]:
        ratio = row["images_per_second"] / named["images_per_second"]
        beside = f"; {ratio:.2f}x {EAGER_NAMED} (not in the same rounds)"
    return (
        f"**{row['images_per_second']:.1f} img/s** ({row['mode']}) against {best['images_per_second']:.1f} img/s of "
        f"the best baseline, {best['name']}: {text}{beside}."
    )


def _where_it_loses(view: View, best: dict | None, top: str) -> list[str]:
    """Sentences: rows of ours that are slower than what they are compared with, rungs that cost, ops that cost."""
    found: list[str] = []
    if not view.on_gpu:
        return found
    for provider in view.providers(LADDER):
        _, comparison = view.speed(provider.name, best)
        if comparison and comparison.verdict == SLOWER:
            found.append(f"{provider.name} is slower than {best['name']}: {comparison.ratio:.2f}x")
    rungs = [row for p in view.providers(LADDER) if (row := view.row(p.name))]
    found += [
        f"{after['name']} is slower than the rung before it, {before['name']}"
        for before, after in pairwise(rungs)
        if after["seconds_per_step"] > before["seconds_per_step"] * (1 + view.noise())
    ]
    whole = view.row(top)
    for provider in view.providers(ABLATION):
        row = view.row(provider.name)
        if row and whole and row["seconds_per_step"] < whole["seconds_per_step"] * (1 - view.noise()):
            found.append(f"{provider.name} is quicker than the Triton kernel in its place")
    row = view.row(top)
    if row and best and row["memory"] and row["memory"]["allocated_bytes"] > best["memory"]["allocated_bytes"]:
        found.append("it takes more memory than the best baseline")
    for images, rows in tables.by_images(view).items():
        theirs = min((r for n, r in rows if n.startswith("torchvision")), key=_time, default=None)
        ours = min((r for n, r in rows if n.startswith("ours")), key=_time, default=None)
        if theirs and ours and _time(ours) > _time(theirs):
            found.append(f"inference of {images} is slower than {theirs['name']}")
    return found


def _time(row: dict) -> float:
    return row["seconds_per_step"]
