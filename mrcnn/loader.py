"""The batches that a run trains on: a function of the configuration and the step, wherever a run is taken up."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import Config
from .data.augment import build_transform
from .data.coco import CocoDataset
from .data.collate import Collate
from .data.shapes import ShapesDataset
from .structures import Batch


def training_batches(
    dataset: CocoDataset | ShapesDataset, config: Config, start: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The run's batches after its first `start` steps, all of the configured size.

    A small data set is drawn from again within a batch. The batch of a step is the same for any `start` and any number
    of workers. `pin_memory` is for a GPU, which copies from pinned memory while the host goes on.
    """
    train, data = config.train, config.data
    dataset = copy.copy(dataset)  # the caller's may be in use elsewhere, with another transform
    dataset.transform = build_transform(True, data.image_size, data.max_size, data.augment)
    loader = DataLoader(
        _Seeded(dataset, train.seed),
        batch_size=train.batch_size,
        # One epoch of the sampler is the whole run: workers start once, and no epoch ends in a smaller batch.
        sampler=_ShuffledPasses(len(dataset), start * train.batch_size, train.steps * train.batch_size, train.seed),
        num_workers=train.workers,
        collate_fn=Collate(data.max_objects or dataset.max_objects),
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # of the workers' seeds, unused; without it they cost the model a random number
    )
    yield from loader


def _ignore_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to every process; this one is needed until the main process has taken its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _ShuffledPasses(Sampler[tuple[int, int]]):
    """(position in the run, index) of the positions `start` to `stop`: shuffled passes, one after another."""

    def __init__(self, size: int, start: int, stop: int, seed: int) -> None:
        self.size, self.start, self.stop, self.seed = size, start, stop, seed

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed)
        for first in range(0, self.stop, self.size):
            order = torch.randperm(self.size, generator=generator)  # of passes skipped, too: the next depends on it
            for position in range(max(first, self.start), min(first + self.size, self.stop)):
                yield position, int(order[position - first])


class _Seeded(Dataset):
    """Samples by (position, index), their augmentation drawn from a seed of their own.

    The seeds that a DataLoader gives its workers depend on how many there are and on where the run began; a seed by
    position depends on neither, so that a resumed run augments as the uninterrupted one does.
    """

    def __init__(self, dataset: CocoDataset | ShapesDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, dict]:
        position, index = item
        seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):  # without workers the model draws from the same generator
            # The CPU's alone: torch.manual_seed would also reset the GPU's, which the model samples with.
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]
