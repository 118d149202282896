"""`mrcnn evaluate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kernels import use_backend

from ..checkpoint import Checkpoint, load_checkpoint
from ..data.coco import CocoDataset
from ..data.shapes import ShapesDataset
from ..errors import DataError
from ..evaluation import format_table
from ..inference import evaluate as evaluate_model
from .common import (
    FROM_CHECKPOINT,
    CheckpointOption,
    Data,
    Device,
    DeviceOption,
    Ops,
    OpsOption,
    choose_device,
    coco_dataset,
    console,
    held_out_shapes,
    progress_bar,
)


def evaluate(
    checkpoint: CheckpointOption,
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Their COCO JSON file.")] = None,
    data: Annotated[Data, typer.Option(help="shapes evaluates on 64 held-out synthetic images.")] = Data.coco,
    max_dets: Annotated[int, typer.Option(min=1, help="Detections an image, taken and counted.")] = 100,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    min_mask_ap50: Annotated[float | None, typer.Option(help="Exit with status 1 below this mask AP50.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default=FROM_CHECKPOINT)] = None,
    workers: Annotated[int | None, typer.Option(min=0, show_default=FROM_CHECKPOINT)] = None,
    ops: OpsOption = Ops.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Print COCO box and mask AP."""
    loaded = load_checkpoint(checkpoint, choose_device(device, ops))
    if data is Data.shapes:
        dataset = held_out_shapes(loaded.config)
    else:
        dataset = coco_dataset(images, annotations, "--images", "--annotations")
    _check_same_classes(loaded, dataset)
    given = {"batch_size": batch_size, "workers": workers}
    settings = dataclasses.replace(loaded.config.train, **{k: v for k, v in given.items() if v is not None})
    loaded.config = dataclasses.replace(loaded.config, train=settings)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    loaded.model.configure(max_detections=max_dets)
    with progress_bar() as bar, use_backend(ops):
        task = bar.add_task("evaluating", total=len(dataset), status="")
        results = evaluate_model(loaded.model, dataset, loaded.config, max_dets, lambda n: bar.advance(task, n))
    console.print(format_table(results))
    text = json.dumps({"checkpoint": str(checkpoint), "step": loaded.step, "max_dets": max_dets, **results}, indent=2)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n")
    if min_mask_ap50 is not None and results["segm"]["AP50"] < min_mask_ap50:
        print(f"error: mask AP50 {results['segm']['AP50']:.3f} is below {min_mask_ap50}", file=sys.stderr)
        raise typer.Exit(1)


def _check_same_classes(checkpoint: Checkpoint, dataset: CocoDataset | ShapesDataset) -> None:
    known = list(zip(checkpoint.category_ids, checkpoint.class_names, strict=True))[1:]
    wanted = list(zip(dataset.category_ids, dataset.class_names, strict=True))[1:]
    if known != wanted:
        raise DataError(f"the checkpoint knows the categories {known}, the data has {wanted}")
