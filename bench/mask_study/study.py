"""The loop over seeds and arms, with progress; every finished run is written at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..environment import describe_commit, describe_environment
from .arms import ARMS, arm_config
from .measure import run_pair
from .record import MaskStudyError, Record, load_record, source_hash, study_settings


def run_study(
    out: Path, seeds: Sequence[int], steps: int, images: int, device: torch.device, console: Console
) -> Record:
    """Run what is missing, all arms of a seed before the next seed; returns the record with all runs.

    Raises:
        MaskStudyError: `out` holds a study with other settings, or a number is too small.
    """
    if min(len(seeds), steps, images) < 1:
        raise MaskStudyError(f"seeds, steps and images must be at least 1, got {len(seeds)}, {steps} and {images}")
    record = load_record(out, study_settings(steps, images, device.type))
    missing = [(seed, arm) for seed in seeds for arm in ARMS if record.run(arm, seed) is None]
    if kept := len(ARMS) * len(seeds) - len(missing):
        console.print(f"kept from before: {kept} of {len(ARMS) * len(seeds)} runs")
    # Now: a file that changes while the study runs is not what was imported.
    made_by = {"source": source_hash(), "commit": describe_commit(), "threads": torch.get_num_threads()}
    made_by |= {"environment": _environment()}
    record.save(out)  # an unwritable folder is found before the work
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        everything = progress.add_task("all steps", total=len(missing) * steps)
        for seed, arm in missing:
            progress.update(everything, description=f"seed {seed}, {arm}")
            result = run_pair(arm_config(arm, seed, steps), images, device, lambda: progress.advance(everything))
            record.runs.append({"arm": arm, "seed": seed, **result, **made_by})
            record.save(out)
            console.print(describe(record.runs[-1]))
    return record


def describe(run: dict) -> str:
    """One line about a finished run."""
    metrics = run["metrics"]
    names = ("segm_AP", "segm_AP50", "bbox_AP", "given_iou", "best_iou", "best_merged", "jump")
    values = ", ".join(f"{name} {metrics[name]:.3f}" for name in names if metrics[name] is not None)
    return f"seed {run['seed']} {run['arm']:7s} {values}; {run['train_seconds'] + run['measure_seconds']:.0f} s"


def _environment() -> dict[str, object]:
    """The machine and its versions, without the thread counts that are the clock's."""
    environment = describe_environment()
    return {key: environment[key] for key in ("gpu", "driver", "versions", "cuda", "python", "cpu_name")} | {
        "cpus": os.cpu_count()
    }
