"""`mrcnn predict`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kernels import use_backend

from ..checkpoint import Checkpoint, load_checkpoint
from ..errors import ConfigError, DataError
from ..evaluation import detections_to_coco
from ..predict import predict as predict_file
from ..visualize import draw_detections
from .common import CheckpointOption, Device, DeviceOption, Ops, OpsOption, choose_device, console, progress_bar


def predict(
    image: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and predictions.json.")],
    score_threshold: Annotated[float, typer.Option(min=0, max=1, help="Show detections above this score.")] = 0.5,
    ops: OpsOption = Ops.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Draw boxes, masks and names on images, and write the detections as COCO results."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; a folder is wanted")
    missing = [str(path) for path in image if not path.is_file()]
    if missing:
        raise DataError(f"no such image file: {', '.join(missing)}")
    loaded = load_checkpoint(checkpoint, choose_device(device, ops))
    output.mkdir(parents=True, exist_ok=True)
    results, failed = [], 0
    with progress_bar() as bar, use_backend(ops):
        task = bar.add_task("predicting", total=len(image), status="")
        for number, path in enumerate(image):
            try:
                pixels, found = predict_file(loaded, path)
            except DataError as error:  # the other files are still wanted
                failed += 1
                print(f"error: {error}", file=sys.stderr)
                continue
            shown = {name: value[found["scores"] > score_threshold] for name, value in found.items()}
            picture = draw_detections(pixels, **shown, class_names=loaded.class_names)
            picture.save(output / f"{number:04d}_{path.stem}.png")
            for entry in detections_to_coco(number, shown, loaded.category_ids):
                results.append({"file_name": str(path), "category": _name(loaded, entry), **entry})
            bar.advance(task)
    (output / "predictions.json").write_text(json.dumps(results) + "\n")
    console.print(
        f"{len(results)} detections with a score above {score_threshold} (--score-threshold) in "
        f"{len(image) - failed} images; wrote {output}"
    )
    if failed:
        raise typer.Exit(1)


def _name(checkpoint: Checkpoint, entry: dict) -> str:
    return checkpoint.class_names[checkpoint.category_ids.index(entry["category_id"], 1)]
