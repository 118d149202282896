"""Run lengths from crops: byte for byte those of the whole mask, which is never formed."""

import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")

from mrcnn.data.rle import crops_to_rle, mask_api, masks_to_rle
from mrcnn.modeling import mask_runs
from mrcnn.modeling.detections import ImageDetections


def check(crops, corners, size):
    """Bool crops whose upper left corners lie at (x, y) of an image of `size`, against COCO's own encoder."""
    whole = torch.zeros(len(crops), *size, dtype=torch.bool)
    for mask, crop, (x, y) in zip(whole, crops, corners, strict=True):
        mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    windows = [[x, y, c.shape[1], c.shape[0]] for c, (x, y) in zip(crops, corners, strict=True)]
    pixels = torch.cat([crop.flatten() for crop in crops])
    rles = crops_to_rle(pixels, torch.tensor(windows), size)
    assert rles == masks_to_rle(whole)
    assert [mask_api().area(r) for r in rles] == whole.sum((1, 2)).tolist()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_any_crop_anywhere(density):
    # From one pixel to the whole image, at every edge; long runs, short ones, none.
    for size in ((7, 9), (1, 12), (12, 1), (1, 1), (31, 40)):
        crops, corners = [], []
        for _ in range(40):
            x, y = (int(torch.randint(0, s, ())) for s in size[::-1])
            width, height = int(torch.randint(1, size[1] - x + 1, ())), int(torch.randint(1, size[0] - y + 1, ()))
            crops.append(torch.rand(height, width) < density)
            corners.append((x, y))
        check(crops, corners, size)


def test_runs_go_on_in_the_next_column():
    # Of a crop as high as the image a column's last pixel and the next one's first are neighbours: one run. Not so a
    # crop that is a row lower; and a run that begins at the first pixel, or ends at the last, leaves no empty count.
    full = torch.ones(6, 3, dtype=torch.bool)
    split = full.clone()
    split[0, 1] = split[5, 2] = False
    for corner in ((0, 0), (2, 0), (5, 0)):
        check([full, split, ~split], [corner] * 3, (6, 8))
        check([full[1:], full[:5]], [(corner[0], 1), corner], (6, 8))


def test_empty_windows():
    # No pixel known, none set: counts of a whole image of zeros, with which `json.dump` has no trouble.
    check([torch.zeros(0, 0, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)], [(0, 0), (3, 1)], (5, 6))
    (empty,) = crops_to_rle(torch.zeros(0, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.int64), (5, 6))
    assert empty["size"] == [5, 6] and isinstance(empty["counts"], str) and mask_api().area(empty) == 0
    assert crops_to_rle(torch.zeros(0, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.int64), (5, 6)) == []


def found(number, size, share):
    """Detections of an image of `size`, their sides up to a share of it; the first over all of it, the last outside."""
    extent = torch.tensor([size[1], size[0]])
    corner = torch.rand(number, 2) * extent * 0.9
    boxes = torch.cat([corner, corner + 1 + torch.rand(number, 2) * extent * share], dim=1)
    boxes[0], boxes[-1] = torch.tensor([-5, -5, size[1] + 5, size[0] + 5]), float("nan")
    return ImageDetections(boxes, torch.ones(number).long(), torch.rand(number), torch.rand(number, 28, 28))


@pytest.mark.parametrize("at_once", [1, 60, 1000, 1 << 24])
def test_detections_pack_what_they_paste(at_once, monkeypatch):
    # Masks one column at a time, in strips, some at a time, all at once: those of the dense masks.
    monkeypatch.setattr(mask_runs, "PIXELS_AT_ONCE", at_once)
    ours = found(6, (37, 45), 0.6)
    pasted, packed = (ours.on_original((37, 45), (50, 90), rle=rle)["masks"] for rle in (False, True))
    assert pasted.any() and not pasted[-1].any()
    assert packed == masks_to_rle(pasted)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel() * out.element_size())
        return out


def test_memory_does_not_grow_with_image_or_number(monkeypatch):
    # 300 masks of 24 megapixels are 7.2 GB, one is 24 MB; here a chunk is 1 MiB, and the little that is held for each
    # pixel of it, in PyTorch or NumPy, is all there is.
    monkeypatch.setattr(mask_runs, "PIXELS_AT_ONCE", 1 << 20)
    size = (4000, 6000)
    ours = found(300, size, 0.02)
    tracemalloc.start()
    try:
        with LargestTensor() as largest:
            packed = ours.on_original((2000, 3000), (4000, 6000), rle=True)["masks"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(packed) == 300 and packed[0]["size"] == [4000, 6000]
    assert mask_api().area(packed[0]) > 1e6 and mask_api().area(packed[-1]) == 0
    assert 0 < largest.size <= 4 << 20 and peak < 16 << 20


def test_crops_that_are_none():
    # Values instead of bits, height and width swapped, pixels of other windows: a wrong mask, or a message of C++'s.
    windows = torch.tensor([[2, 1, 5, 3]])
    with pytest.raises(TypeError, match=r"bool or uint8 \(paste with a threshold\), got torch.float32"):
        crops_to_rle(torch.rand(15), windows, (4, 8))
    with pytest.raises(ValueError, match="must lie in the image of 8 x 4 pixels"):
        crops_to_rle(torch.ones(15, dtype=torch.bool), windows, (8, 4))
    with pytest.raises(ValueError, match="14 pixels are not those of the windows"):
        crops_to_rle(torch.ones(14, dtype=torch.bool), windows, (4, 8))
