"""The batches that a run trains on: a function of the configuration and the step, wherever a run is taken up."""

from __future__ import annotations

import copy
import itertools
import signal
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import Config
from .data.augment import build_transform
from .data.buckets import find_buckets, group_by_kind, kind_of
from .data.coco import CocoDataset
from .data.collate import Collate
from .data.shapes import ShapesDataset
from .graphs import tensors
from .structures import Batch


def training_batches(
    dataset: CocoDataset | ShapesDataset, config: Config, start: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The run's batches after its first `start` steps, all of the configured size.

    A small data set is drawn from again within a batch. The batch of a step is the same for any `start` and any number
    of workers. With `data.group_by_aspect` a batch has images of one kind and every batch of a kind the same shapes
    (see buckets.py); an image waits until there are enough of its kind, if need be those of the next pass.

    Files are read, decoded, augmented and padded and masks packed by the workers. `pin_memory` is for a GPU, which
    copies from pinned memory while the host goes on (`device_batches`).
    """
    train, data = config.train, config.data
    dataset = copy.copy(dataset)  # the caller's may be in use elsewhere, with another transform
    dataset.transform = build_transform(True, data.image_size, data.max_size, data.augment)
    slots = data.max_objects or dataset.max_objects
    order = _RunOrder(dataset, config, start)
    buckets = None
    if data.group_by_aspect:
        dataset.same_kind = True
        buckets = find_buckets(dataset, data, slots, _RunOrder(dataset, config).batches())
    loader = DataLoader(
        _Seeded(dataset, train.seed),
        batch_size=train.batch_size,
        # One epoch of the sampler is the whole run: workers start once, and no epoch ends in a smaller batch.
        sampler=order,
        num_workers=train.workers,  # each a thread, and two batches ahead: enough, as their times differ little
        collate_fn=Collate(slots, buckets=buckets),
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # of the workers' seeds, unused; without it they cost the model a random number
    )
    yield from loader


def device_batches(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """`batches` on `device`; on a GPU the copy of the next one runs while the step that has been launched does.

    For that the batches are pinned, and a step is launched without waiting for it. The host asks for a batch when the
    step before is launched, never earlier: an error of the loader comes after all the steps whose batches it gave. Two
    batches are on the GPU, that of the running step and the next; a host that is further ahead waits.

    Closing the generator, as its end does, closes `batches`, and so ends the loader's workers.
    """
    try:
        if device.type == "cuda":
            yield from _copied_ahead(batches, device)
        else:
            for batch in batches:
                yield batch.to(device)
    finally:
        getattr(batches, "close", lambda: None)()


def _copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    copies = torch.cuda.Stream(device)
    steps: deque[torch.cuda.Event] = deque()  # their ends
    for batch in batches:
        if len(steps) > 1:
            steps.popleft().synchronize()
        with torch.cuda.stream(copies):
            moved = batch.to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(copies)
        for tensor in tensors(moved):
            tensor.record_stream(stream)  # its memory belongs to `copies`, which would use it for the next batch
        yield moved
        steps.append(torch.cuda.Event(blocking=True))  # the host sleeps: workers need its core
        steps[-1].record(torch.cuda.current_stream(device))


def _ignore_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to every process; this one is needed until the main process has taken its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _RunOrder(Sampler[tuple[int, int]]):
    """(position, index) of every sample of a run from step `start` on, batch after batch.

    Positions count the samples in the order in which shuffled passes over the data, one after another, come to them.
    """

    def __init__(self, dataset: CocoDataset | ShapesDataset, config: Config, start: int = 0) -> None:
        self.size, self.start, self.train = len(dataset), start, config.train
        grouped = config.data.group_by_aspect
        self.kinds = [kind_of(*size) for size in dataset.sizes] if grouped else None

    def __len__(self) -> int:
        return (self.train.steps - self.start) * self.train.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self._shuffled_passes()
        if self.kinds is not None:
            order = group_by_kind(order, self.kinds, self.train.batch_size)
        # What is skipped is drawn, too: the rest depends on it.
        return itertools.islice(order, self.start * self.train.batch_size, self.train.steps * self.train.batch_size)

    def batches(self) -> Iterator[list[int]]:
        """The indices of each batch."""
        order = iter(self)
        while batch := [index for _, index in itertools.islice(order, self.train.batch_size)]:
            yield batch

    def _shuffled_passes(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.train.seed)
        for first in itertools.count(step=self.size):
            yield from enumerate(torch.randperm(self.size, generator=generator).tolist(), first)


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
