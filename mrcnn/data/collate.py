"""From a list of samples to one padded Batch, with every object's mask in one pool of bits."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from kernels import MaskPool
from kernels.mask_pool import mask_extents

from ..errors import ConfigError
from ..structures import Batch, Targets
from .buckets import DIVISOR, Bucket, kind_of, round_up


class Collate:
    """Collate function of a DataLoader: a list of (image, target) becomes a Batch.

    A class rather than a closure so that worker processes can be started by pickling it.
    """

    def __init__(
        self,
        max_objects: int,
        size_divisor: int = DIVISOR,
        pad_to: tuple[int, int] | None = None,
        buckets: Mapping[str, Bucket] | None = None,
    ) -> None:
        """Fix the shapes of the batches.

        Args:
            max_objects: slots per image, G; objects beyond it are left out, with one warning.
            size_divisor: images are padded to multiples of it; 32 is the stride of the coarsest FPN input.
            pad_to: (height, width) of every batch, for shapes that never change; without it a batch is as
                large as its largest image.
            buckets: the shapes of a batch by the kind of its images, which are then all of one kind: instead of
                pad_to.

        Raises:
            ConfigError: max_objects below 1, or a pad_to that size_divisor does not divide.
        """
        if max_objects < 1:
            raise ConfigError(f"max_objects must be at least 1, got {max_objects}.")
        if pad_to and any(side % size_divisor for side in pad_to):
            raise ConfigError(f"pad_to {tuple(pad_to)} must be divisible by {size_divisor}.")
        self.max_objects, self.size_divisor, self.pad_to, self.buckets = max_objects, size_divisor, pad_to, buckets
        self._warned = False

    def __call__(self, samples: Sequence[tuple[Tensor, dict]]) -> Batch:
        """Pad images (uint8 `[3, h, w]`) at the bottom and right with zeros, and batch their targets.

        Raises:
            ConfigError: an image is larger than `pad_to`.
            TypeError: an image is not uint8.
            ValueError: there are `buckets`, and images of several kinds.
        """
        images, targets = zip(*samples, strict=True)
        bucket = self._bucket(targets)
        images = self._pad(images, bucket.size if bucket else self.pad_to)
        self._warn_if_too_many(targets)
        batched = targets_from_lists(targets, self.max_objects, tuple(images.shape[-2:]))
        if bucket:
            batched.masks = _lengthen(batched.masks, bucket.pool_bytes)
        return Batch(
            images=images,
            sizes=torch.tensor([image.shape[-2:] for image, _ in samples], dtype=torch.int64),
            image_ids=[target["image_id"] for target in targets],
            original_sizes=[tuple(target["original_size"]) for target in targets],
            targets=batched,
            replaced=sum(target.get("replaced", 0) for target in targets),
        )

    def _bucket(self, targets: Sequence[dict]) -> Bucket | None:
        if self.buckets is None:
            return None
        kinds = {kind_of(*target["original_size"]) for target in targets}
        if len(kinds) > 1:
            raise ValueError(f"a batch has images of one kind, got {', '.join(sorted(kinds))}")
        return self.buckets[kinds.pop()]

    def _pad(self, images: Sequence[Tensor], pad_to: tuple[int, int] | None) -> Tensor:
        if any(image.dtype != torch.uint8 for image in images):
            raise TypeError(f"images must be uint8, got {[image.dtype for image in images]}")
        largest = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
        height, width = pad_to or [round_up(side, self.size_divisor) for side in largest]
        if largest[0] > height or largest[1] > width:
            raise ConfigError(f"an image of {largest} pixels (height, width) does not fit pad_to {pad_to}.")
        batch = _shared_zeros((len(images), 3, height, width))
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image
        return batch

    def _warn_if_too_many(self, targets: Sequence[dict]) -> None:
        for target in targets:
            count = len(target["labels"])
            if count > self.max_objects and not self._warned:
                self._warned = True
                warnings.warn(
                    f"image {target['image_id']} has {count} objects: only the first {self.max_objects} are "
                    f"trained on, here and in other images; raise max_objects to train on all.",
                    stacklevel=3,
                )


def _shared_zeros(shape: tuple[int, ...]) -> Tensor:
    """uint8 zeros; in a DataLoader's worker in shared memory, where the batch would else be copied once more."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate does; the system's zeros
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _lengthen(pool: MaskPool, length: int) -> MaskPool:
    """The pool with `length` bytes, or with a multiple of it where it is longer: what is added belongs to no object.

    Longer are only batches in which images took the place of damaged ones.
    """
    held = len(pool.bitmaps)
    missing = max(length, round_up(held, length)) - held
    return dataclasses.replace(pool, bitmaps=torch.cat([pool.bitmaps, pool.bitmaps.new_zeros(missing)]))


def targets_from_lists(
    targets: Sequence[dict], max_objects: int | None = None, padded_size: tuple[int, int] | None = None
) -> Targets:
    """Convert torchvision's list of target dicts to padded Targets.

    Args:
        targets: one dict per image: `boxes` `[n, 4]` xyxy in pixels, `labels` `[n]`, `masks` `[n, h, w]` of
            any dtype, non-zero where the object is. The image's height and width are the masks'.
        max_objects: slots per image, G; by default the most objects of an image, at least 1. Of an image with
            more, the first G are kept.
        padded_size: (H, W) of the batch's images, by default the largest h and w.

    Returns:
        Targets on the device of the input. An object whose mask is empty is left out.

    Raises:
        ValueError: a box is not finite (on the device such a box would be no object, without a word), or an image has
            not as many boxes, labels and masks.
    """
    for number, target in enumerate(targets):
        counts = {key: len(target[key]) for key in ("boxes", "labels", "masks")}
        if len(set(counts.values())) > 1:
            name = int(target.get("image_id", number))
            raise ValueError(f"image {name} must have as many boxes as labels and masks, got {counts}")
        if not target["boxes"].float().isfinite().all():
            name = int(target.get("image_id", number))
            raise ValueError(f"boxes must be finite; image {name} has NaN or inf among them")
    kept = [_keep(target, max_objects) for target in targets]
    slots = max_objects or max(1, *(len(labels) for _, labels, _, _ in kept))
    device = targets[0]["labels"].device
    boxes = torch.zeros((len(kept), slots, 4), dtype=torch.float32, device=device)
    labels = torch.zeros((len(kept), slots), dtype=torch.int64, device=device)
    for b, (image_boxes, image_labels, _, _) in enumerate(kept):
        boxes[b, : len(image_boxes)], labels[b, : len(image_labels)] = image_boxes, image_labels
    _, _, masks, extents = zip(*kept, strict=True)
    return Targets(
        boxes=boxes,
        labels=labels,
        count=torch.tensor([len(item[1]) for item in kept], dtype=torch.int32, device=device),
        masks=MaskPool.of(masks, extents, slots, padded_size),
    )


def _keep(target: dict, max_objects: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, labels, masks and mask extents of the first max_objects objects that have pixels."""
    boxes, labels, masks = (target[key].as_subclass(Tensor) for key in ("boxes", "labels", "masks"))
    extents = mask_extents(masks)
    keep = (extents[:, 2] > extents[:, 0]).nonzero().flatten()[:max_objects]
    if len(keep) == len(labels):  # nothing to drop: spare a copy of the masks, by far the largest tensor
        return boxes, labels, masks, extents
    return boxes[keep], labels[keep], masks[keep], extents[keep]
