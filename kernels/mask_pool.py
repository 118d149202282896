"""The bitmaps of a batch's objects, each cropped to its own extent, one after another in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .checks import check_same_device

_DTYPES = {"bitmaps": torch.uint8, "offset": torch.int64, "extent": torch.int32, "sizes": torch.int64}


@dataclass(frozen=True, eq=False)
class MaskPool:
    """Masks of B images with G slots each, of which only the objects' own rectangles are held.

    Object g of image b fills the rectangle `(x0, y0, x1, y1) = extent[b, g]` of its image, row after row from
    `bitmaps[offset[b, g]]` on; what lies outside is background. A row is x1 - x0 bytes of 0 or 1, or, `packed`,
    ceil((x1 - x0) / 8) bytes of eight pixels each, the first pixel in the lowest bit. The extent of an empty slot is
    (0, 0, 0, 0).

    Args:
        bitmaps: [P] uint8.
        offset: [B, G] int64, of the first byte of each object.
        extent: [B, G, 4] int32 xyxy in pixels, ends exclusive, inside the image.
        sizes: [B, 2] int64, height and width of each image.
        padded_size: (H, W) of the images' batch; no image is larger.
        packed: whether a byte holds eight pixels.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """

    bitmaps: Tensor
    offset: Tensor
    extent: Tensor
    sizes: Tensor
    padded_size: tuple[int, int]
    packed: bool = True

    def __post_init__(self) -> None:
        tensors = {name: getattr(self, name) for name in _DTYPES}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != _DTYPES[name]:
                found = getattr(tensor, "dtype", type(tensor).__name__)
                raise TypeError(f"{name} of a mask pool must be a tensor of {_DTYPES[name]}, got {found}")
        if self.bitmaps.ndim != 1 or self.offset.ndim != 2:
            raise ValueError(
                "bitmaps must have 1 dimension and offset 2, got shapes "
                f"{tuple(self.bitmaps.shape)} and {tuple(self.offset.shape)}"
            )
        for name, shape in (("extent", (*self.offset.shape, 4)), ("sizes", (len(self.offset), 2))):
            if tensors[name].shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(tensors[name].shape)}")
        if not isinstance(self.padded_size, Sequence) or len(self.padded_size) != 2:
            raise ValueError(f"padded_size must be a height and a width, got {self.padded_size!r}")
        check_same_device(**tensors)

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], bool]:
        """As torch.library ops take it."""
        return self.bitmaps, self.offset, self.extent, self.sizes, list(self.padded_size), self.packed

    def map(self, function: Callable[[Tensor], Tensor]) -> MaskPool:
        """Copy with `function` applied to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskPool:
        """Copy with every tensor on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskPool:
        """Copy in page-locked memory, from which a GPU copies while the host goes on."""
        return self.map(Tensor.pin_memory)

    @classmethod
    def of(
        cls,
        masks: Sequence[Tensor],
        extents: Sequence[Tensor] | None = None,
        slots: int | None = None,
        padded_size: tuple[int, int] | None = None,
        packed: bool = True,
    ) -> MaskPool:
        """Crop and join masks of B images, on their device, which the host waits for: for a loader's workers.

        Args:
            masks: [n, h, w] of each image, not 0 where the object is (soft ones: pass `masks > 0.5`); h and w are the
                image's, also for no object.
            extents: [n, 4] integers of each image, xyxy with exclusive ends, outside of which its masks are zero; by
                default the smallest, `mask_extents`.
            slots: G, by default the most objects of an image, at least 1.
            padded_size: (H, W) of the images' batch, by default the largest h and w.
            packed: whether to hold eight pixels a byte.

        Raises:
            TypeError, ValueError: no image, masks that are not [n, h, w], an image without pixels or larger than
                `padded_size`, more objects than `slots`, an extent that is not inside its image.
        """
        if not isinstance(masks, Sequence) or not masks or not all(isinstance(m, Tensor) for m in masks):
            raise TypeError("masks must be a list with a tensor [n, h, w] for each image, of at least one")
        if any(m.ndim != 3 or 0 in m.shape[1:] for m in masks):
            raise ValueError(f"masks must be [n, h, w], h and w at least 1, got {[tuple(m.shape) for m in masks]}")
        extents = [mask_extents(of_image) for of_image in masks] if extents is None else extents
        most = max(map(len, masks))
        slots = max(1, most) if slots is None else slots
        if most > slots:
            raise ValueError(f"an image has {most} objects, and there are {slots} slots: raise slots or leave some out")
        device = masks[0].device
        sizes = torch.tensor([of_image.shape[-2:] for of_image in masks], dtype=torch.int64)
        for number, (of_image, found) in enumerate(zip(masks, extents, strict=True)):
            _check_extents(found, of_image, number)
        padded_size = tuple(padded_size or sizes.amax(0).tolist())
        if (sizes > torch.tensor(padded_size)).any():
            raise ValueError(f"padded_size {padded_size} is smaller than an image: sizes are {sizes.tolist()}")
        extent = torch.zeros((len(masks), slots, 4), dtype=torch.int32, device=device)
        crops: list[Tensor] = []
        for slot_extents, of_image, found in zip(extent, masks, extents, strict=True):
            slot_extents[: len(found)] = found
            for mask, (x0, y0, x1, y1) in zip(of_image, found.tolist(), strict=True):
                crop = mask[y0:y1, x0:x1].ne(0)
                crops.append((_pack(crop) if packed else crop.to(torch.uint8)).flatten())
        width, height = (extent[..., 2:] - extent[..., :2]).long().unbind(-1)
        lengths = height * ((width + 7) // 8 if packed else width)
        offset = (lengths.flatten().cumsum(0).view_as(lengths) - lengths) * (lengths > 0)
        bitmaps = torch.cat(crops) if crops else extent.new_zeros(0, dtype=torch.uint8)
        return cls(bitmaps, offset, extent, sizes.to(device), padded_size, packed)

    def masks(self, offset: Tensor, extent: Tensor) -> Tensor:
        """Bool [n, H, W] of the padded size: the objects at `offset` [n] with `extent` [n, 4]; nothing waits."""
        height, width = self.padded_size
        if len(self.bitmaps) == 0:
            return offset.new_zeros(len(offset), height, width, dtype=torch.bool)
        x0, y0, x1, y1 = (e[:, None] for e in extent.long().unbind(1))
        y = torch.arange(height, device=offset.device) - y0  # [n, H] in the object's rectangle, [n, W] likewise
        x = torch.arange(width, device=offset.device) - x0
        inside_y, inside_x = (y >= 0) & (y < y1 - y0), (x >= 0) & (x < x1 - x0)
        pitch = (x1 - x0 + 7) // 8 if self.packed else x1 - x0
        row = torch.where(inside_y, offset[:, None] + y * pitch, 0)
        column = torch.where(inside_x, x // 8 if self.packed else x, 0)
        # Any byte will do outside, where the sum of a row and a column may lie beyond the pool.
        byte = self.bitmaps[(row[:, :, None] + column[:, None]).clamp_(max=len(self.bitmaps) - 1)]
        bit = torch.where(inside_x, 1 << (x % 8 if self.packed else 0 * x), 0).to(torch.uint8)
        return ((byte & bit[:, None]) != 0) & inside_y[:, :, None]

    def dense(self, b: int) -> Tensor:
        """Bool [G, H, W]: every mask of image `b` at the padded size; empty slots are all background."""
        return self.masks(self.offset[b], self.extent[b])


def _pack(mask: Tensor) -> Tensor:
    """Bool [h, w] -> uint8 [h, ceil(w / 8)], the first pixel in the lowest bit."""
    height, width = mask.shape
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -width % 8)).view(height, (width + 7) // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def _check_extents(extents: Tensor, masks: Tensor, image: int) -> None:
    if extents.shape != (len(masks), 4) or extents.is_floating_point():
        raise ValueError(
            f"extents of image {image} must be whole numbers of shape [{len(masks)}, 4], got {tuple(extents.shape)} of "
            f"{extents.dtype}"
        )
    low, high = extents[:, :2], extents[:, 2:]
    if (low < 0).any() or (high < low).any() or (high > extents.new_tensor(masks.shape[:0:-1])).any():
        raise ValueError(f"extents of image {image} must lie inside its {masks.shape[1]} x {masks.shape[2]} pixels")


def mask_extents(masks: Tensor) -> Tensor:
    """Tight int32 [n, 4] xyxy extents, ends exclusive, of masks [n, H, W]; zeros for an empty mask."""
    if masks.shape[0] == 0:
        return torch.zeros((0, 4), dtype=torch.int32, device=masks.device)
    spans = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):  # [n, W] columns, [n, H] rows
        occupied = occupied.to(torch.int32)
        first, last = occupied.argmax(1), occupied.shape[1] - occupied.flip(1).argmax(1)
        spans.append(torch.stack([first, last]) * occupied.any(1))
    (x0, x1), (y0, y1) = spans
    return torch.stack([x0, y0, x1, y1], dim=1).to(torch.int32)
