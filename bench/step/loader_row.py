"""The step on what the real loader brings: JPEG files decoded, resized, augmented and packed by worker processes.

Here the model trains on its own proposals: the shapes, and so the work, are the same. The images are of two sizes,
landscape and portrait; "step alone" takes a batch that is on the device already, the first that the loader brought.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from mrcnn.config import Config
from mrcnn.data.coco import CocoDataset
from mrcnn.structures import Batch

from .workload import Workload

IMAGES = {"cuda": 192, "cpu": 8}
WARMUP_BATCHES = {"cuda": 20, "cpu": 1}  # both orientations are captured by then: a third is portrait
SECONDS = {"cuda": 15.0, "cpu": 0.5}
Take = Callable[[Batch], object]


@contextmanager
def loaded_batches(workload: Workload, workers: int | None = None) -> Iterator[Iterator[Batch]]:
    """The loader's batches, on the device, from files in a temporary folder."""
    from mrcnn.loader import device_batches, training_batches

    from ..jpeg_set import write_jpeg_set

    device = workload.device
    with tempfile.TemporaryDirectory() as folder:
        pictures, annotations = write_jpeg_set(Path(folder), IMAGES[device.type], 0)
        dataset = CocoDataset(pictures, annotations)
        config = loader_config(workload, workers)
        batches = device_batches(training_batches(dataset, config, pin_memory=device.type == "cuda"), device)
        try:
            yield batches
        finally:
            if hasattr(batches, "close"):
                batches.close()  # its workers read files of the folder


def loader_config(workload: Workload, workers: int | None = None) -> Config:
    """The workload's, at the size of the usual schedule, in groups of one orientation."""
    config, on_gpu = workload.config, workload.device.type == "cuda"
    workers = (os.cpu_count() or 1 if on_gpu else 0) if workers is None else workers
    size = {"image_size": 800, "max_size": 1333} if on_gpu else {"image_size": 64, "max_size": 128}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, group_by_aspect=True, **size),
        train=dataclasses.replace(config.train, workers=workers),
    )


def rate(batches: Iterator[Batch], take: Take, device: torch.device) -> dict[str, float]:
    """Images a second of `take` on batch after batch, for some seconds after a warm-up."""
    for batch in islice(batches, WARMUP_BATCHES[device.type]):
        take(batch)
    _synchronize(device)
    images, steps, start = 0, 0, time.perf_counter()
    for batch in batches:
        take(batch)
        images, steps = images + len(batch.images), steps + 1
        if time.perf_counter() - start > SECONDS[device.type]:
            break
    _synchronize(device)
    seconds = time.perf_counter() - start
    return {"images_per_second": images / seconds, "steps": steps, "seconds": seconds}


def measure_loader(workload: Workload) -> dict:
    """Of the loader alone."""
    with loaded_batches(workload) as batches:
        return {"rates": {"loader alone": rate(batches, lambda batch: None, workload.device)}} | _machine()


def measure_with_step(workload: Workload, step: Take) -> dict:
    """Of the step on the loader's batches, and on the first of them again and again."""
    with loaded_batches(workload) as batches:
        first = next(batches)
        both = rate(batches, step, workload.device)
    alone = rate(iter(lambda: first, None), step, workload.device)
    return {"rates": {"step alone": alone, "step and loader": both}, "size": list(first.images.shape)} | _machine()


def _machine() -> dict:
    return {"cpus": os.cpu_count()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
