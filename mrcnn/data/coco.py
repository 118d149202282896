"""Instance segmentation data sets in COCO's JSON format, checked before the first step of a training run.

The format is described at https://cocodataset.org/#format-data. The JSON is parsed here rather than by a COCO
API so that what is wrong with a file is said in one sentence, with the id of the entry that is wrong.
"""

from __future__ import annotations

import json
import math
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import DataError
from .buckets import kind_of
from .rle import decode_masks, mask_api, run_lengths, segmentation_to_rle

NO_AREA, BAD_BOX = "box without area", "malformed box"
EMPTY, MALFORMED = "empty segmentation", "malformed segmentation"
_PLURALS = {NO_AREA: "boxes without area", BAD_BOX: "malformed boxes"}

# What Pillow's decoders are known to raise on damaged files, beside OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_DECODE_ERRORS += (Image.DecompressionBombError,)


class _UnusableError(Exception):
    """An annotation that cannot be trained on; the message is the reason, one of the constants above."""


@dataclass
class _Record:
    """One image and its usable objects; masks stay compressed until the image is asked for."""

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    counts: list[bytes] = field(default_factory=list)


class CocoDataset(Dataset):
    """Images and objects of a COCO JSON file, as torchvision tv_tensors.

    Annotations without area, or whose segmentation is empty or malformed, are skipped and counted in
    `skipped`; crowd regions (`iscrowd` 1) are no training targets and are counted in `crowds`. Images without
    objects are kept. An image's EXIF orientation is ignored, as COCO's own tools do.

    Attributes:
        class_names: label -> name; label 0 is "__background__", the others follow the order of category ids.
        category_ids: label -> COCO category id (ids may have gaps); 0 for the background.
        image_ids: index -> COCO image id.
        max_objects: usable objects of the fullest image, at least 1.
        skipped: reason -> number of annotations skipped.
        crowds: number of crowd annotations.
        broken: file name -> how often it could not be read, where `skip_broken` (per process: what a
            DataLoader worker counts does not reach the main process, its warning does).
        same_kind: whether only an image of the same kind (see buckets.py) takes a damaged one's place; set it for
            batches that are grouped by kind.
    """

    def __init__(
        self,
        images: Path | str,
        annotations: Path | str,
        transform: Callable | None = None,
        require_files: bool = True,
        skip_broken: bool = False,
    ) -> None:
        """Read and check the annotation file, and that every image file is there.

        Args:
            images: folder that the JSON's `file_name`s are relative to.
            annotations: COCO instances JSON.
            transform: called with (image, target), as torchvision.transforms.v2 transforms are.
            require_files: raise if an image file is missing; False to use the annotations alone.
            skip_broken: a damaged image gives a warning and the next readable image takes its place, so that
                it cannot end a long run. Leave False for evaluation.

        Raises:
            DataError: one sentence that says which file or entry is wrong.
            ImportError: faster-coco-eval is not installed.
        """
        self.images, self.annotations = Path(images), Path(annotations)
        self.transform, self.skip_broken = transform, skip_broken
        self.skipped: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.crowds = 0
        self.same_kind = False
        self._skipped_positions: set[int] = set()

        content = _load_json(self.annotations)
        categories = sorted(_index(content, "categories", "category", self.annotations).items())
        self.category_ids = [0, *(category_id for category_id, _ in categories)]
        self.class_names = ["__background__", *(str(c.get("name", f"category {i}")) for i, c in categories)]
        images_by_id = _index(content, "images", "image", self.annotations)
        records = {i: _record(image, i, self.annotations) for i, image in images_by_id.items()}
        self._records, self.image_ids = list(records.values()), list(records)
        if require_files:
            self._check_files()
        self._add_objects(content["annotations"], records)
        self.max_objects = max(1, *(len(record.labels) for record in self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """Read one image.

        Returns:
            What the transform makes of (image, target). The image is uint8 `[3, h, w]` RGB. The target holds
            `boxes` tv_tensors.BoundingBoxes float32 `[n, 4]` xyxy in pixels, inside the image; `labels` int64
            `[n]`, 1..K-1; `masks` tv_tensors.Mask uint8 `[n, h, w]` in {0, 1}; `image_id` int;
            `original_size` (h, w); `replaced` int, damaged images that this one stands for.

        Raises:
            DataError: the file is damaged or not of the size that the JSON says (unless `skip_broken`).
        """
        replaced = 0
        for record in self._stand_ins(range(len(self))[index]):
            try:
                image = self.read(record)
            except DataError as error:
                if not self.skip_broken:
                    raise
                replaced += 1
                self.broken[record.file_name] += 1
                warnings.warn(f"{error} (the next image takes its place)", stacklevel=2)
                continue
            target = self.target(record) | {"replaced": replaced}
            return self.transform(image, target) if self.transform else (image, target)
        which = f"{kind_of(record.height, record.width)} " if self.same_kind else ""
        raise DataError(f"none of the {replaced} {which}images in {self.images} can be read.")

    def _stand_ins(self, index: int) -> Iterator[_Record]:
        """The record `index` and, in the order in which they take its place, the others."""
        kind = kind_of(self._records[index].height, self._records[index].width)
        for later in range(len(self)):
            record = self._records[(index + later) % len(self)]
            if not self.same_kind or kind_of(record.height, record.width) == kind:
                yield record

    def read(self, record: _Record) -> tv_tensors.Image:
        """Decode a record's file; DataError if it is damaged or not of the size that the JSON says."""
        return _read_sized(self.images / record.file_name, record.height, record.width)

    def target(self, record: _Record) -> dict:
        """Decode a record's objects to the target described at __getitem__."""
        return _target(record)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image before any transform."""
        return [(record.height, record.width) for record in self._records]

    def object_sizes(self) -> Iterator[np.ndarray]:
        """Of every image, float [n, 2]: height and width of the rectangles that its objects' pixels fill."""
        for record in self._records:
            size = [record.height, record.width]
            rles = [{"size": size, "counts": counts} for counts in record.counts]
            yield mask_api().toBbox(rles)[:, :1:-1] if rles else np.zeros((0, 2))

    def ground_truth(self) -> dict:
        """Load the JSON again, for an evaluator, without the annotations that were skipped.

        Crowd annotations stay: COCO's metrics need them. Reading again costs less than holding the parsed
        file in memory, once per DataLoader worker, for a whole training run.
        """
        content = _load_json(self.annotations)
        kept = [a for i, a in enumerate(content["annotations"]) if i not in self._skipped_positions]
        return {**content, "annotations": kept}

    def skipped_summary(self) -> str:
        """Say what was left out, e.g. "skipped 3 annotations: 2 boxes without area, 1 empty segmentation"."""
        total = sum(self.skipped.values())
        text = f"skipped {total or 'no'} {_plural('annotation', total)}"
        if total:
            text += ": " + ", ".join(f"{n} {_plural(reason, n)}" for reason, n in self.skipped.most_common())
        if self.crowds:
            text += f"; {self.crowds} {_plural('crowd annotation', self.crowds)} left out of training"
        return text

    def _check_files(self) -> None:
        if not self.images.is_dir():
            raise DataError(f"image folder {self.images} does not exist: check the path.")
        missing = [r.file_name for r in self._records if not (self.images / r.file_name).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise DataError(
                f"{len(missing)} of {len(self)} images are missing from {self.images} ({shown}): "
                f"check that {self.annotations} belongs to this folder."
            )

    def _add_objects(self, annotations: Sequence[dict], records: dict[int, _Record]) -> None:
        labels = {category_id: label for label, category_id in enumerate(self.category_ids) if label}
        for position, annotation in enumerate(annotations):
            what = f"annotation {annotation.get('id', f'number {position}')} in {self.annotations}"
            image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
            if not _is_integer(image_id) or image_id not in records:
                raise DataError(f"{what} names image id {image_id!r}, which is not among its images.")
            if not _is_integer(category_id) or category_id not in labels:
                raise DataError(f"{what} names category id {category_id!r}, which is not among its categories.")
            record = records[image_id]
            try:
                box, counts = _box_and_counts(annotation, record.height, record.width)
            except _UnusableError as error:
                self.skipped[str(error)] += 1
                self._skipped_positions.add(position)
                continue
            if annotation.get("iscrowd", 0):
                self.crowds += 1
                continue
            record.boxes.append(box)
            record.labels.append(labels[category_id])
            record.counts.append(counts)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else _PLURALS.get(noun, noun + "s")


def _load_json(path: Path) -> dict:
    """Parse a COCO JSON file and check that its three lists are lists of objects."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read annotation file {path} ({error.strerror}): check the path.") from error
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        raise DataError(f"annotation file {path} is not valid JSON ({error}): is it truncated?") from error
    if not isinstance(content, dict):
        raise DataError(f"annotation file {path} is not in COCO format: its top level is not an object.")
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"annotation file {path} is not in COCO format: it has no list of objects {key!r}.")
    return content


def _index(content: dict, key: str, noun: str, path: Path) -> dict[int, dict]:
    """Entries by id, in the file's order; there must be some, and no id twice."""
    entries: dict[int, dict] = {}
    for entry in content[key]:
        entry_id = entry.get("id")
        if not _is_integer(entry_id):
            raise DataError(f"{noun} id {entry_id!r} in {path} is not an integer.")
        if entry_id in entries:
            raise DataError(f"{noun} id {entry_id} is there twice in {path}: make the ids unique.")
        entries[entry_id] = entry
    if not entries:
        raise DataError(f"annotation file {path} has no {key}.")
    return entries


def _record(image: dict, image_id: int, path: Path) -> _Record:
    name, height, width = (image.get(key) for key in ("file_name", "height", "width"))
    what = f"image {image_id} in {path}"
    if not isinstance(name, str) or not name:
        raise DataError(f"{what} has no file_name.")
    # A data set from elsewhere must not be able to read other files; both kinds of path, on every system.
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    if absolute or ".." in PureWindowsPath(name).parts:
        raise DataError(f"{what} has file_name {name!r}, which leaves the image folder.")
    if not (_is_integer(height) and _is_integer(width) and height > 0 and width > 0):
        raise DataError(f"{what} has no valid height and width (found {height!r} and {width!r}).")
    return _Record(image_id, name, height, width)


def _box_and_counts(annotation: dict, height: int, width: int) -> tuple[tuple[float, ...], bytes]:
    """The clipped xyxy box and the compressed mask of an annotation, or _UnusableError with the reason."""
    api = mask_api()
    xywh = annotation.get("bbox")
    if xywh and not (isinstance(xywh, list) and len(xywh) == 4 and all(isinstance(v, (int, float)) for v in xywh)):
        raise _UnusableError(BAD_BOX)
    box = _clip(xywh, height, width) if xywh else None
    if not annotation.get("segmentation"):
        raise _UnusableError(EMPTY)
    try:
        rle = segmentation_to_rle(annotation["segmentation"], height, width)
        area = int(api.area(rle))
        if isinstance(annotation["segmentation"], dict) and run_lengths(rle["counts"]).sum() != height * width:
            raise ValueError("the RLE ends too early")  # only decoding would notice, and it is slow
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise _UnusableError(MALFORMED) from error
    if area == 0:
        raise _UnusableError(EMPTY)
    return box or _clip(api.toBbox(rle).tolist(), height, width), rle["counts"]


def _clip(xywh: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
    """COCO's xywh box as xyxy inside the image."""
    x, y, w, h = xywh
    if not all(math.isfinite(v) for v in xywh):
        raise _UnusableError(NO_AREA)
    box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise _UnusableError(NO_AREA)
    return box


def read_image(path: Path) -> tv_tensors.Image:
    """Decode an image file to uint8 RGB `[3, h, w]`, as it is stored (EXIF orientation is ignored).

    Raises:
        DataError: no such file, or not an image that can be decoded.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip it to white
                array = np.asarray(opened).astype(np.int64) // 256
                opened = Image.fromarray(array.clip(0, 255).astype(np.uint8))
            return F.to_image(opened.convert("RGB"))
    except _DECODE_ERRORS as error:
        raise DataError(f"image {path} cannot be decoded ({error}): replace or remove it.") from error


def _read_sized(path: Path, height: int, width: int) -> tv_tensors.Image:
    """Decode a file that should be `height` x `width` pixels; DataError if it is damaged or of another size."""
    image = read_image(path)
    if image.shape[-2:] != (height, width):
        raise DataError(
            f"image {path} is {image.shape[-2]} x {image.shape[-1]} pixels (height x width) but the annotations say "
            f"{height} x {width}: use the images that were annotated."
        )
    return image


def _target(record: _Record) -> dict:
    """Decode a record's objects to the target described at CocoDataset.__getitem__."""
    size = (record.height, record.width)
    masks = torch.from_numpy(decode_masks(record.counts, *size))
    boxes = torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.tensor(record.labels, dtype=torch.int64),
        "masks": tv_tensors.Mask(masks),
        "image_id": record.image_id,
        "original_size": size,
    }
