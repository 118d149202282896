"""Running a model: detections of a batch, on the original images, COCO metrics of a data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .config import Config
from .data.augment import build_transform
from .data.coco import CocoDataset
from .data.collate import Collate
from .data.shapes import ShapesDataset
from .evaluation import detections_to_coco, evaluate_detections
from .graphs import GraphedCalls, first_line, is_compiler_error
from .modeling import MaskRCNN
from .modeling.detections import Detections
from .structures import Batch


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU; on a CPU nothing changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class Detector:
    """A model as a function from batches to detections, in evaluation mode: fixed shapes, and nothing that waits.

    Compiled or captured it is for images of one size (`Collate(pad_to=...)`), or of a few: each shape of batches is
    compiled and captured for itself. The weights may change where they are; the model's configuration may not.
    """

    def __init__(
        self,
        model: MaskRCNN,
        *,
        compile: bool = False,
        cuda_graphs: bool = False,
        on_note: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Prepare; compiling and capturing begin with the first calls.

        Args:
            model: on its device; put into evaluation mode.
            compile: with torch.compile, as one graph for each of at most eight shapes.
            cuda_graphs: see `GraphedCalls`.
            on_note: gets a sentence about what cannot be had, as graphs on a CPU, and is then left out.
        """
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self._model = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        self._on_note = on_note
        self._call = GraphedCalls(self._detect, on_note=on_note) if cuda_graphs else self._detect

    def __call__(self, batch: Batch) -> Detections:
        """What is found, on the model's device; targets are not looked at.

        With `cuda_graphs` the next call writes into the same tensors: copy what is to be kept.
        """
        bare = Batch(batch.images, batch.sizes, image_ids=[], original_sizes=[])  # no more than is copied to the device
        return self._call(bare.to(self.device, non_blocking=True))

    def _detect(self, batch: Batch) -> Detections:
        with torch.no_grad(), autocast(self.device):
            try:
                return self._model(batch.images, batch.sizes)
            except Exception as error:
                if self._model is self.model or not is_compiler_error(error):
                    raise
                self._on_note(f"not compiled: {first_line(error)}")
                self._model = self.model
                return self.model(batch.images, batch.sizes)


@torch.no_grad()
def detect(model: MaskRCNN | Detector, batch: Batch, rle: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(image id, boxes, labels, scores and masks on the original image, on the CPU) of each image.

    Masks are bool [n, H, W], or with `rle` n COCO RLE dictionaries: then none is formed at the image's size. The host
    waits for the device once for the boxes, labels and scores of all images, and for the masks of each. A `model` is
    put into evaluation mode.
    """
    found = (model if isinstance(model, Detector) else Detector(model))(batch)
    results = found.on_originals(batch.sizes.tolist(), batch.original_sizes, rle=rle)
    yield from zip(batch.image_ids, results, strict=True)


def evaluation_loader(dataset: Dataset, config: Config) -> DataLoader:
    """Batches of a data set in order, resized only."""
    dataset = copy.copy(dataset)  # the caller's may be in use elsewhere, with another transform
    dataset.transform = build_transform(False, config.data.image_size, config.data.max_size)
    return DataLoader(
        dataset,
        batch_size=config.train.batch_size,
        num_workers=config.train.workers,
        collate_fn=Collate(dataset.max_objects),
        pin_memory=torch.cuda.is_available(),
    )


def evaluate(
    model: MaskRCNN,
    dataset: CocoDataset | ShapesDataset,
    config: Config,
    max_dets: int = 100,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, dict[str, float]]:
    """COCO box and mask AP of `model` on `dataset`; the model is left in the mode that it was in.

    At most `max_dets` detections an image are taken from the model and counted. `on_batch` is called with the number of
    images done.
    """
    was_training, benchmark = model.training, torch.backends.cudnn.benchmark
    results: list[dict] = []
    model.eval()
    torch.backends.cudnn.benchmark = False  # batches have many shapes here, and each would be tried out
    try:
        with torch.random.fork_rng(devices=[]):  # so that evaluating does not change the training that follows
            for batch in evaluation_loader(dataset, config):
                for image_id, detections in detect(model, batch, rle=True):
                    results += detections_to_coco(image_id, detections, dataset.category_ids)
                on_batch(len(batch.image_ids))
    finally:
        model.train(was_training)
        torch.backends.cudnn.benchmark = benchmark
    return evaluate_detections(dataset.ground_truth(), results, max_dets)
