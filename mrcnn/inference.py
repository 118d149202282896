"""Running a model over a data set: detections on the original images, COCO metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import Config
from .data.augment import build_transform
from .data.coco import CocoDataset
from .data.collate import Collate
from .data.shapes import ShapesDataset
from .evaluation import detections_to_coco, evaluate_detections
from .modeling import MaskRCNN
from .structures import Batch


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU; on a CPU nothing changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def detect(model: MaskRCNN, batch: Batch, rle: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(image id, boxes, labels, scores and masks on the original image, on the CPU) of each image.

    Masks are bool [n, H, W], or with `rle` n COCO RLE dictionaries: then none is formed at the image's size.
    """
    device = next(model.parameters()).device
    batch = batch.to(device, non_blocking=True)
    with autocast(device):
        found = model(batch.images, batch.sizes)
    for i, detections in enumerate(found):
        size = tuple(batch.sizes[i].tolist())
        result = detections.on_original(size, batch.original_sizes[i], rle=rle)
        yield batch.image_ids[i], {k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()}


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
    was_training = model.training
    results: list[dict] = []
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # so that evaluating does not change the training that follows
            for batch in evaluation_loader(dataset, config):
                for image_id, detections in detect(model, batch, rle=True):
                    results += detections_to_coco(image_id, detections, dataset.category_ids)
                on_batch(len(batch.image_ids))
    finally:
        model.train(was_training)
    return evaluate_detections(dataset.ground_truth(), results, max_dets)
