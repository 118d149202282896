"""COCO's detection metrics, computed by faster-coco-eval: pycocotools in C++, with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchvision.ops import box_convert

from .data.rle import mask_api, masks_to_rle, segmentation_to_rle
from .errors import DataError

if TYPE_CHECKING:
    from rich.table import Table


def evaluate_detections(
    ground_truth: dict,
    detections: Sequence[dict],
    max_dets: int = 100,
    iou_types: Sequence[str] = ("bbox", "segm"),
) -> dict[str, dict[str, float]]:
    """Compute COCO's twelve numbers for boxes and for masks.

    Args:
        ground_truth: COCO dict with images, annotations and categories. Missing `area`, `bbox` and `iscrowd`
            are filled in, and annotations renumbered (an id of 0 would read as "unmatched"), in a copy.
        detections: COCO results: dicts with image_id, category_id, score, and bbox (xywh, pixels) and/or
            segmentation (RLE at the size of the image). Not modified.
        max_dets: best-scored detections used per image and class. COCO uses 100; where images have more
            objects than that, recall is capped by it.
        iou_types: "bbox", "segm" or both.

    Returns:
        iou type -> name -> value: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, where the
        last count is max_dets, and counts above it are left out (max_dets 5: AR1, AR5). -1 where there is no
        ground truth to measure on, as COCO defines. Small is below 32^2 pixels and large above 96^2, by the
        annotation's area; a detection's is that of its box for "bbox" and of its mask for "segm".

    Raises:
        DataError: a detection names an unknown image, or lacks what an iou type needs.
        ValueError: max_dets below 1.
        ImportError: faster-coco-eval is not installed.
    """
    mask_api()  # says which package is missing
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    if max_dets < 1:
        raise ValueError(f"max_dets must be at least 1, got {max_dets}")
    _check_image_ids(ground_truth, detections)
    counts = sorted({min(count, max_dets) for count in (1, 10, max_dets)})
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AR{n}" for n in counts), "ARs", "ARm", "ARl"]
    results = {}
    for iou_type in iou_types:
        truth = COCO(_prepared_truth(ground_truth, iou_type))
        found = truth.loadRes(_prepared_detections(detections, iou_type))
        evaluator = COCOeval_faster(truth, found, iou_type)
        evaluator.params.maxDets = counts
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        results[iou_type] = dict(zip(names, map(float, evaluator.stats), strict=True))
    return results


def detections_to_coco(image_id: int, detections: dict, category_ids: Sequence[int]) -> list[dict]:
    """Convert one image's detections to COCO results entries.

    Args:
        image_id: COCO image id.
        detections: `boxes` `[n, 4]` xyxy in pixels of the original image, `labels` `[n]`, `scores` `[n]` and,
            optionally, `masks` at the size of the original image: bool `[n, H, W]` or n RLE dictionaries; tensors on
            any device.
        category_ids: label -> COCO category id.

    Returns:
        n dicts that `json.dump` accepts, with bbox as xywh and segmentation as compressed RLE.
    """
    boxes = box_convert(detections["boxes"].detach().float().cpu(), "xyxy", "xywh")
    labels, scores = detections["labels"].tolist(), detections["scores"].detach().float().cpu().tolist()
    entries = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes.tolist(), scores, strict=True)
    ]
    masks = detections.get("masks")
    if entries and masks is not None:
        for entry, rle in zip(entries, masks if isinstance(masks, list) else masks_to_rle(masks), strict=True):
            entry["segmentation"] = rle
    return entries


def format_table(results: dict[str, dict[str, float]]) -> Table:
    """Lay the result of `evaluate_detections` out: a row per metric, a column per iou type."""
    from rich.table import Table

    table = Table(title="COCO metrics")
    table.add_column("metric")
    for iou_type in results:
        table.add_column(iou_type, justify="right")
    for name in next(iter(results.values()), {}):
        values = [numbers[name] for numbers in results.values()]
        table.add_row(name, *("n/a" if value < 0 else f"{value:.3f}" for value in values))
    return table


def _check_image_ids(ground_truth: dict, detections: Sequence[dict]) -> None:
    unknown = {d["image_id"] for d in detections} - {image["id"] for image in ground_truth["images"]}
    if unknown:
        raise DataError(
            f"detections name {len(unknown)} image ids that the ground truth does not have, such as "
            f"{min(unknown)}: evaluate against the annotations of the same images."
        )


def _prepared_truth(ground_truth: dict, iou_type: str) -> dict:
    """A copy, as the evaluator adds entries to the annotations, with the fields that it takes for granted."""
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in ground_truth["images"]}
    annotations = []
    for number, annotation in enumerate(ground_truth["annotations"], 1):
        entry = {**annotation, "id": number, "iscrowd": int(annotation.get("iscrowd", 0))}
        if entry.get("segmentation") and (iou_type == "segm" or not entry.get("bbox") or "area" not in entry):
            entry["segmentation"] = rle = segmentation_to_rle(entry["segmentation"], *sizes[entry["image_id"]])
            entry.setdefault("area", float(mask_api().area(rle)))
            entry["bbox"] = entry.get("bbox") or mask_api().toBbox(rle).tolist()
        elif iou_type == "segm":
            raise DataError(f"annotation {annotation.get('id')} has no segmentation: evaluate boxes only.")
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
        annotations.append(entry)
    images = [dict(image) for image in ground_truth["images"]]
    categories = [dict(category) for category in ground_truth["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def _prepared_detections(detections: Sequence[dict], iou_type: str) -> list[dict]:
    """A copy with the geometry of one iou type alone.

    The evaluator takes a detection's area from its bbox wherever there is one, so that masks would be sorted
    into small, medium and large by their boxes.
    """
    wanted, unwanted = ("bbox", "segmentation") if iou_type == "bbox" else ("segmentation", "bbox")
    entries = []
    for detection in detections:
        entry = {key: value for key, value in detection.items() if key != unwanted}
        if not entry.get(wanted):
            if iou_type == "segm" or not detection.get("segmentation"):
                raise DataError(f"a detection in image {detection['image_id']} has no {wanted}.")
            entry["bbox"] = mask_api().toBbox(detection["segmentation"]).tolist()
        entries.append(entry)
    return entries
