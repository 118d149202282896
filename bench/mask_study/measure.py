"""One run: train one arm with one seed, then measure it on held-out pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnn.config import Config
from mrcnn.data.rle import masks_to_rle
from mrcnn.data.shapes import ShapesDataset
from mrcnn.evaluation import detections_to_coco, evaluate_detections
from mrcnn.inference import autocast, detect, evaluation_loader
from mrcnn.loader import training_batches
from mrcnn.modeling import MaskRCNN
from mrcnn.modeling.detections import ImageDetections
from mrcnn.modeling.mask_losses import mask_probabilities
from mrcnn.step import TrainingStep
from mrcnn.structures import Batch

from .arms import JUMP_CAP, JUMP_WINDOW, SHEET_IMAGES, THRESHOLD, THRESHOLDS, held_out_set, training_set
from .merging import Tally, match

DIGITS = 5
LAST_STEPS = 20


def run_pair(config: Config, images: int, device: torch.device, on_step: Callable[[], None] = lambda: None) -> dict:
    """Train and measure: metrics by name, the curves, masks for the sheet, and seconds of wall time."""
    start = time.perf_counter()
    model, curves = train_arm(config, device, on_step)
    trained = time.perf_counter()
    metrics, sheet = measure(model, config, held_out_set(config, images))
    mask = curves["mask"][-LAST_STEPS:]
    metrics |= {
        "jump": largest_jump(curves["total"]),
        "non_finite": sum(value is None for value in curves["total"]),
        "final_mask_loss": None if None in mask else sum(mask) / len(mask),
    }
    return {
        "metrics": {name: None if value is None else round(value, DIGITS) for name, value in metrics.items()},
        "curves": curves,
        "sheet": sheet,
        "train_seconds": round(trained - start, 1),
        "measure_seconds": round(time.perf_counter() - trained, 1),
    }


def train_arm(
    config: Config, device: torch.device, on_step: Callable[[], None]
) -> tuple[MaskRCNN, dict[str, list[float | None]]]:
    """The model, and the total and the mask loss of every step; None where one is not finite.

    Weights, pictures, their order and the random numbers of the samplers come from the seed, so that the arms of a seed
    begin alike.
    """
    train = config.train
    torch.manual_seed(train.seed)
    model = MaskRCNN(config.model).to(device).train()
    step = TrainingStep(model, train)
    totals, masks = [], []
    for batch in training_batches(training_set(config), config):
        losses = step(batch.to(device, non_blocking=True))
        totals.append(sum(losses.values()))
        masks.append(losses["loss_mask"])
        on_step()
    return model, {"total": _numbers(totals), "mask": _numbers(masks)}


def largest_jump(losses: list[float | None], window: int = JUMP_WINDOW) -> float:
    """The largest ratio of a step's loss to the median of the `window` before it, at most JUMP_CAP.

    A loss that is not finite (None) counts as JUMP_CAP.
    """
    if None in losses:
        return JUMP_CAP
    ratios = [losses[i] / max(median(losses[i - window : i]), 1e-12) for i in range(window, len(losses))]
    return min(max(ratios, default=1.0), JUMP_CAP)


@torch.no_grad()
def measure(model: MaskRCNN, config: Config, dataset: ShapesDataset) -> tuple[dict[str, float | None], list[dict]]:
    """Metrics by name; and the masks of the first pictures' objects, boxes given, as RLE."""
    model.eval()
    given, matched = {threshold: Tally() for threshold in THRESHOLDS}, Tally()
    results: list[dict] = []
    sheet: list[dict] = []
    opportunities = 0
    for batch in evaluation_loader(dataset, config):
        for i, by_threshold in enumerate(given_masks(model, batch)):
            labels, boxes, truth = _objects(batch, i)
            for threshold, masks in by_threshold.items():
                for own, mask in enumerate(masks):
                    given[threshold].add(mask, boxes[own], own, labels, truth)
            if len(sheet) < SHEET_IMAGES:
                masks = by_threshold[THRESHOLD]
                sheet.append({"image": len(sheet), "masks": [rle["counts"] for rle in masks_to_rle(masks)]})
        for i, (image_id, found) in enumerate(detect(model, batch)):
            results += detections_to_coco(image_id, found, dataset.category_ids)
            labels, boxes, truth = _objects(batch, i)
            for row, own in match(found["boxes"], found["labels"], boxes, labels):
                before = matched.same
                matched.add(found["masks"][row], found["boxes"][row], own, labels, truth)
                opportunities += matched.same > before
    coco = evaluate_detections(dataset.ground_truth(), results)
    best = max(THRESHOLDS, key=lambda threshold: given[threshold].iou)
    metrics: dict[str, float | None] = {
        "segm_AP": coco["segm"]["AP"],
        "segm_AP50": coco["segm"]["AP50"],
        "segm_AP75": coco["segm"]["AP75"],
        "bbox_AP": coco["bbox"]["AP"],
        "bbox_AP50": coco["bbox"]["AP50"],
        "best_threshold": best,
        "objects": given[best].masks,
        "matched": matched.masks,
        "matched_with_intruder": opportunities,
        "given_intruders": given[best].same,
        "matched_intruders": matched.same,
    }
    for prefix, tally in (("given", given[THRESHOLD]), ("best", given[best]), ("matched", matched)):
        metrics |= {f"{prefix}_{name}": value for name, value in tally.means().items()}
    return metrics, sheet


def given_masks(model: MaskRCNN, batch: Batch) -> list[dict[float, Tensor]]:
    """Of each image, threshold -> bool [n, H, W]: the mask head's masks in the objects' own boxes and classes."""
    device = next(model.parameters()).device
    moved = batch.to(device)
    targets, counts = moved.targets, batch.targets.count.tolist()
    boxes = [targets.boxes[i, :n] for i, n in enumerate(counts)]
    labels = [targets.labels[i, :n] for i, n in enumerate(counts)]
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    with autocast(device):
        features = model.fpn(model.backbone(model.normalize(moved.images, moved.sizes)))
        (pooled,) = model.pooler(features, [rois], [model.config.mask_pool_size])
        features = model.mask_head(pooled)
        masks = mask_probabilities(model.mask_head, features, torch.cat(labels), model.config.mask_loss).split(counts)
    pasted = []
    for i, size in enumerate(batch.sizes.tolist()):
        detections = ImageDetections(boxes[i], labels[i], boxes[i].new_ones(counts[i]), masks[i])
        size = tuple(size)
        pasted.append({t: detections.on_original(size, size, t)["masks"].cpu() for t in THRESHOLDS})
    return pasted


def _objects(batch: Batch, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [n], boxes [n, 4] and bool masks [n, H, W] of one image's objects; nothing was resized."""
    count = int(batch.targets.count[i])
    height, width = batch.sizes[i].tolist()
    truth = batch.targets.masks.dense(i)[:count, :height, :width]
    return batch.targets.labels[i, :count], batch.targets.boxes[i, :count], truth


def _numbers(values: list[Tensor]) -> list[float | None]:
    values = torch.stack(values).float().cpu()
    return [round(v, DIGITS) if ok else None for v, ok in zip(values.tolist(), values.isfinite().tolist(), strict=True)]
