"""How fast the loader is alone: images a second by workers, and where the time of an image goes.

Nothing is trained, and nothing is copied to a GPU: the main process takes a batch and drops it. What is measured is the
machine's CPU, so a rate says something about the machine that it was measured on and about no other.

The stages are measured one after the other in one process with one thread, as a worker has, on the same images:

| stage | what it is |
| --- | --- |
| decode | the file, from the page cache, to uint8 RGB |
| masks | run lengths to masks of the image's size |
| transform | flip, colours, resize of image, boxes and masks |
| collate | padding; masks cropped and packed to bits |
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrcnn.config import Config, DataConfig, TrainConfig, validate
from mrcnn.data.augment import build_transform
from mrcnn.data.coco import CocoDataset
from mrcnn.data.collate import Collate
from mrcnn.errors import ConfigError
from mrcnn.loader import training_batches

from .environment import describe_environment
from .jpeg_set import write_jpeg_set
from .report import write_whole
from .timing import steady

STAGES = ("decode", "masks", "transform", "collate")
MOST_IMAGES = 64  # of a data set, for the stages
STEPS_MS = (50.0, 100.0, 200.0, 400.0)
CPU_ALONE = "of this machine's CPU alone: no step is taken, and nothing is copied to a GPU"


@dataclass(frozen=True)
class Rate:
    """What a number of workers delivers; 0 workers are the main process."""

    workers: int
    images_per_second: float
    images: int  # that were timed


@dataclass(frozen=True)
class LoaderRates:
    """Stages in milliseconds an image, and rates."""

    stages: dict[str, float]
    rates: list[Rate]
    batch: int

    @property
    def milliseconds(self) -> float:
        """An image's, in one process."""
        return sum(self.stages.values())


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4, ... and all cores."""
    powers = itertools.takewhile(lambda workers: workers < cores, (1 << k for k in itertools.count()))
    return [0, *powers, cores]


def measure_loader(dataset: CocoDataset, config: Config, workers: Sequence[int], rounds: int = 4) -> LoaderRates:
    """Measure the stages, then the rate of each number of `workers` over `rounds` batches a worker."""
    stages = measure_stages(dataset, config)
    rates = [measure_rate(dataset, config, count, rounds) for count in workers]
    return LoaderRates(stages, rates, config.train.batch_size)


def measure_named(
    images: Path | None,
    annotations: Path | None,
    workers: Sequence[int] | None,
    batch: int,
    image_size: int,
    max_size: int,
    grouped: bool,
    rounds: int,
    made_up: int,
    out: Path | None,
    console: Console,
) -> LoaderRates:
    """What `mrcnn-bench loader` does: measure the user's data set or a made-up one, print tables, write JSON.

    Raises:
        ConfigError: values that cannot work, or a data set of which one half is named.
        DataError: the data set cannot be read.
        OSError: no room for the made-up set, or `out` cannot be written.
    """
    config = Config(
        data=DataConfig(image_size=image_size, max_size=max_size, group_by_aspect=grouped),
        train=TrainConfig(batch_size=batch),
    )
    validate(config)
    if (images is None) != (annotations is None):
        raise ConfigError("a data set needs both --images and --annotations")
    with tempfile.TemporaryDirectory(prefix="mrcnn-loader-") as folder:
        source = f"{annotations}"
        if images is None or annotations is None:
            images, annotations = write_jpeg_set(Path(folder), made_up)
            source = f"{made_up} made-up JPEG files"
        dataset = CocoDataset(images, annotations, skip_broken=True)
        console.print(
            f"{source}: {len(dataset)} images; {describe_environment()['cpu_name']}, {available_cores()} cores"
        )
        counts = list(workers) if workers else worker_counts(available_cores())
        found = measure_loader(dataset, config, counts, rounds)
    for part in rate_report(found):
        console.print(part)
    if out is not None:
        write_whole(out, rates_json(found, config, source).encode())
        console.print(f"wrote {out}")
    return found


def measure_stages(dataset: CocoDataset, config: Config) -> dict[str, float]:
    """Milliseconds an image of each of `STAGES`: medians over at most `MOST_IMAGES` images, or their batches.

    The median, as a neighbour on the machine that takes the core away makes single images many times slower.

    Raises:
        DataError: an image cannot be read.
    """
    data, batch = config.data, config.train.batch_size
    transform = build_transform(True, data.image_size, data.max_size, data.augment)
    collate = Collate(data.max_objects or dataset.max_objects)
    records = dataset._records[:MOST_IMAGES]
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def timed(stage: str, images: int, call: Callable, *arguments: object) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        seconds[stage].append((time.perf_counter() - start) / images)
        return result

    with steady(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        dataset.read(records[0])  # what the first call imports and allocates is not an image's
        for first in range(0, len(records), batch):
            samples = []
            for record in records[first : first + batch]:
                image, target = timed("decode", 1, dataset.read, record), timed("masks", 1, dataset.target, record)
                samples.append(timed("transform", 1, transform, image, target))
            timed("collate", len(samples), collate, samples)
    return {stage: 1e3 * statistics.median(seconds[stage]) for stage in STAGES}


def measure_rate(dataset: CocoDataset, config: Config, workers: int, rounds: int = 4) -> Rate:
    """Images a second of `training_batches`, over `rounds` batches of each worker after its first.

    Workers start together and so deliver together: the clock starts when each has given its first batch, which also
    leaves out how long they took to start.
    """
    started = max(1, workers)
    steps = started * (rounds + 1)
    train = dataclasses.replace(config.train, workers=workers, steps=steps)
    images, start = 0, 0.0
    with steady():
        batches = training_batches(dataset, dataclasses.replace(config, train=train), 0, torch.cuda.is_available())
        for number, batch in enumerate(batches, 1):
            if number == started:
                start = time.perf_counter()
            elif number > started:
                images += len(batch.image_ids)
        seconds = time.perf_counter() - start
    return Rate(workers, images / seconds, images)


def rates_json(found: LoaderRates, config: Config, source: str) -> str:
    """The figures, what was loaded and how, and what they were measured on."""
    settings = {
        "source": source,
        "batch": found.batch,
        "data": asdict(config.data),
        "pinned": torch.cuda.is_available(),
        "cores": available_cores(),
        "note": CPU_ALONE,
    }
    content = {"stages_ms_an_image": found.stages, "rates": [asdict(rate) for rate in found.rates]}
    return json.dumps({"environment": describe_environment(), "settings": settings, **content}, indent=1)


def rate_report(found: LoaderRates) -> list[str | Table]:
    """Tables, each under a line that says what it is."""
    return [
        "An image's way through one worker with one thread, medians:",
        stage_table(found),
        f"The loader alone, {CPU_ALONE}:",
        rate_table(found),
        f"What a step of {found.batch} images needs; workers are computed from {found.milliseconds:.1f} ms an image on "
        "a core each, not measured:",
        need_table(found),
    ]


def stage_table(found: LoaderRates) -> Table:
    """Milliseconds an image by stage."""
    table = _table("stage", "ms an image", "share")
    for stage, milliseconds in found.stages.items():
        table.add_row(stage, f"{milliseconds:.2f}", f"{milliseconds / found.milliseconds:.0%}")
    table.add_row("all", f"{found.milliseconds:.2f}", "")
    return table


def rate_table(found: LoaderRates) -> Table:
    """Images a second by workers, and the shortest step that they keep up with."""
    cores = available_cores()
    table = _table("workers", "images/s", "images timed", f"a step of {found.batch} takes at least")
    for rate in found.rates:
        workers = "0 (main process)" if not rate.workers else str(rate.workers)
        note = " > cores" if rate.workers > cores else ""
        shortest = f"{1e3 * found.batch / rate.images_per_second:.0f} ms"
        table.add_row(workers + note, f"{rate.images_per_second:.1f}", str(rate.images), shortest)
    return table


def need_table(found: LoaderRates) -> Table:
    """The rate that a step of so many milliseconds needs, and how many workers like this machine's would give it."""
    table = _table("step", "images/s", "workers")
    for milliseconds in STEPS_MS:
        needed = 1e3 * found.batch / milliseconds
        workers = math.ceil(needed * found.milliseconds / 1e3)
        table.add_row(f"{milliseconds:g} ms", f"{needed:.0f}", str(workers))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table
