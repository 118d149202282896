"""Pasting in plain PyTorch: of each mask only where its box lies, and of that a band at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FARTHEST = 2.0**30
"""Pixels from the origin: boxes that reach so far are taken for broken ones, and their sides fit into 32 bits."""

BAND = 1 << 18
"""Pixels interpolated at a time, so that the floats before the threshold stay few whatever the image's size."""


def integer_boxes(boxes: Tensor, columns: int) -> Tensor:
    """Where masks with so many columns and a border of zeros lie: int64 [n, 4], first and last pixels, x y x y.

    torchvision's `expand_boxes` and its truncation, step by step in fp32. Of boxes with NaN or inf, or too far away,
    the last pixel is before the first.
    """
    x1, y1, x2, y2 = boxes.float().unbind(1)
    expand = (columns + 2) / columns
    half_width, half_height = (x2 - x1) * 0.5 * expand, (y2 - y1) * 0.5 * expand
    x, y = (x2 + x1) * 0.5, (y2 + y1) * 0.5
    expanded = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=1)
    proper = (expanded.abs() < FARTHEST).all(1, keepdim=True)  # false for NaN
    first, last = torch.where(proper, expanded, 0.0).to(torch.int64).split(2, dim=1)
    return torch.cat([first, torch.where(proper, last, -1)], dim=1)


def windows(boxes: Tensor, columns: int, size: tuple[int, int]) -> Tensor:
    """The parts of the image that `integer_boxes` cover: int64 [n, 4] as x, y, width, height; zeros for none."""
    x1, y1, x2, y2 = integer_boxes(boxes, columns).unbind(1)
    x1, y1 = x1.clamp(min=0), y1.clamp(min=0)
    width, height = x2.clamp(max=size[1] - 1) - x1 + 1, y2.clamp(max=size[0] - 1) - y1 + 1
    window = torch.stack([x1, y1, width, height], dim=1)
    return torch.where(((width > 0) & (height > 0))[:, None], window, 0)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float | None) -> Tensor:
    """[n, M, M'] in their boxes [n, 4] -> [n, H, W]: fp32, or bool with a threshold."""
    out = masks.new_zeros(len(masks), height, width, dtype=torch.float32 if threshold is None else torch.bool)
    for image, mask, box in zip(out, masks, integer_boxes(boxes, masks.shape[2]).tolist(), strict=True):
        _paste(image, mask, box, 0, 0, threshold)
    return out


def paste_mask_crops(
    masks: Tensor, boxes: Tensor, windows: Tensor, offsets: Tensor, total: int, threshold: float | None
) -> Tensor:
    """The same of each mask's window [n, 4] of the image, row by row, one after the other: [total]."""
    out = masks.new_zeros(total, dtype=torch.float32 if threshold is None else torch.bool)
    boxes = integer_boxes(boxes, masks.shape[2])
    for mask, box, window, at in zip(masks, boxes.tolist(), windows.tolist(), offsets.tolist(), strict=True):
        x, y, width, height = window
        _paste(out[at : at + width * height].view(height, width), mask, box, x, y, threshold)
    return out


def _paste(out: Tensor, mask: Tensor, box: list[int], x: int, y: int, threshold: float | None) -> None:
    """Fill what the box covers of `out` [h, w], the window of the image that begins at (x, y)."""
    x1, y1, x2, y2 = box
    left, top = max(x1 - x, 0), max(y1 - y, 0)
    right, bottom = min(x2 + 1 - x, out.shape[1]), min(y2 + 1 - y, out.shape[0])
    if left >= right or top >= bottom:
        return
    # A border of zeros; twice at the end, where the second of two cells may lie one beyond.
    padded = F.pad(mask.float(), (1, 2, 1, 2))
    cell, weight = _sources(torch.arange(left, right, device=out.device) + (x - x1), x2 - x1 + 1, mask.shape[1])
    rows = padded[:, cell] * (1 - weight) + padded[:, cell + 1] * weight
    step = max(BAND // (right - left), 1)
    for first in range(top, bottom, step):
        last = min(first + step, bottom)
        position = torch.arange(first, last, device=out.device) + (y - y1)
        cell, weight = _sources(position, y2 - y1 + 1, mask.shape[0])
        values = (rows[cell] * (1 - weight)[:, None]).add_(rows[cell + 1].mul_(weight[:, None]))
        out[first:last, left:right] = values if threshold is None else values > threshold


def _sources(position: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """The first of the two cells of the padded mask between which each pixel lies, and the weight of the second.

    upsample_bilinear2d's for `align_corners=False`, from `cells` and a border to `size` pixels, in fp32.
    """
    scale = torch.tensor(float(cells + 2), dtype=torch.float32) / float(size)
    at = (scale * (position.float() + 0.5) - 0.5).clamp(0, cells + 1)
    cell = at.to(torch.int64)
    return cell, at - cell
