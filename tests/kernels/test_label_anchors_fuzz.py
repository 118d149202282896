"""Random images of every awkward kind: labels, matches and GT maxima are box_iou's and Matcher's, bit for bit.

On a GPU 16,384 images; in Triton's interpreter 192, or as many as the environment variable LABEL_CASES says. Two thirds
of them have boxes of a detector's sizes, whose kinds are counted and printed (`pytest -s`), the others of any size.
"""

import os
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from kernels import AnchorGrid, label_anchors
from kernels.label_anchors import op

BATCH, MOST, HIGH, LOW = 32, 24, 0.7, 0.3
KINDS = ("ties", "duplicates", "on a threshold", "unmatched", "no object", "crowded", "0/0", "ignored", "low quality")
# Whole-pixel cells of 10 x 10: objects that share two sides with one have IoUs of n / 10.
CELL = torch.tensor([[0.0, 0, 10, 10], [-2, 3, 12, 8], [2, -3, 8, 13]])


def random_grid(flat: bool, generator: torch.Generator) -> AnchorGrid:
    """Two or three levels of a few cells; with a cell without area, if `flat`."""
    levels = int(torch.randint(1, 3, (), generator=generator)) + 1
    cells = torch.stack([CELL * 2**level for level in range(levels)])
    if flat:
        cells[0, 2] = torch.tensor([3.0, 3, 3, 9])
    extents = [tuple(torch.randint(1, 6 - level, (2,), generator=generator).tolist()) for level in range(levels)]
    return AnchorGrid(cells, extents, [(5 << level, 5 << level) for level in range(levels)])


def random_objects(kind: str, grid: AnchorGrid, generator: torch.Generator) -> tuple[Tensor, int]:
    """[MOST, 4] boxes and how many of them are objects, by the recipe of a kind."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    corner = (draw(MOST, 2) * 40).round()
    boxes = torch.cat([corner, corner + 1 + (draw(MOST, 2) * 24).round()], dim=1)
    anchors = grid.anchors()
    count = int(torch.randint(1, 5, (), generator=generator))
    near = anchors[torch.randint(len(anchors), (MOST,), generator=generator)]
    if kind == "ties":  # halfway between two anchors, or an anchor cut in half
        boxes[:2] = near[:2]
        boxes[0, 3], boxes[1, 1] = ((near[0, 1] + near[0, 3]) / 2).repeat(2)
        boxes[1, [0, 2, 3]] = near[0, [0, 2, 3]]
        count = max(count, 2)
    elif kind == "duplicates":
        count = max(count, 3)
        boxes[1] = boxes[int(torch.randint(2, count, (), generator=generator))]
    elif kind == "on a threshold":  # an anchor's lower 7 or 3 tenths
        boxes[0] = near[0]
        boxes[0, 3] = near[0, 1] + (near[0, 3] - near[0, 1]) * (0.7 if draw(()) < 0.5 else 0.3)
    elif kind == "unmatched":
        boxes[int(torch.randint(count, (), generator=generator))] += 300
    elif kind == "no object":
        count = 0
    elif kind == "crowded":  # anchors moved a little
        count = int(torch.randint(12, MOST + 1, (), generator=generator))
        boxes = near + (draw(MOST, 4) * 4 - 2)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.5)
    elif kind == "0/0":
        boxes[0, 2:] = boxes[0, :2]
    else:
        boxes += draw(MOST, 4)
    boxes[count:] = torch.nan  # what lies there must not matter
    return boxes, count


def torchvision_says(grid: AnchorGrid, boxes: Tensor, kinds: Counter) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, matches where positive, GT maxima; and what kind of image it is, as seen in its IoUs."""
    anchors = grid.anchors()
    if len(boxes) == 0:
        kinds["no object"] += 1
        nothing = torch.zeros(len(anchors), dtype=torch.int32)
        return nothing.to(torch.int8), nothing, torch.zeros(0)
    iou = box_iou(boxes, anchors)
    match = Matcher(HIGH, LOW, allow_low_quality_matches=True)(iou.clone())
    labels = torch.where(match >= 0, 1, torch.where(match == Matcher.BETWEEN_THRESHOLDS, -1, 0))
    best = iou.amax(dim=0)
    distinct = (boxes[:, None] != boxes).any(-1)
    tied = ((iou[:, None] == iou) & (iou == best) & (iou > 0) & distinct[..., None]).any()
    thresholds = torch.tensor([HIGH, LOW])
    for kind, found in (
        ("ties", tied),
        ("duplicates", (~distinct).sum() > len(boxes)),
        ("on a threshold", torch.isin(iou, thresholds).any()),
        ("unmatched", (iou.nan_to_num(nan=1.0).amax(dim=1) == 0).any()),
        ("crowded", len(boxes) >= 12),
        ("0/0", iou.isnan().any()),
        ("ignored", (labels == -1).any()),
        ("low quality", ((labels == 1) & (best < HIGH)).any()),
    ):
        kinds[kind] += bool(found)
    return labels.to(torch.int8), match.clamp(min=0).to(torch.int32), iou.nan_to_num(nan=torch.inf).amax(dim=1)


def number_of_cases(device: torch.device, share: int) -> int:
    default = 16_384 if device.type == "cuda" else 192
    return max(BATCH, int(os.environ.get("LABEL_CASES", default)) // share // BATCH * BATCH)


def sometimes_small_tiles(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a tile is a whole level, on a GPU these levels are one tile: so as to have ends inside."""
    if seed % 4 == 1:
        monkeypatch.setattr(op, "_tile_shape", lambda extents, per_cell: (2, 8))
        monkeypatch.setattr(op, "_blocks", lambda num_gt: 4)


def run_both_forms(grid: AnchorGrid, gt: Tensor, count: Tensor, options: tuple, device: torch.device) -> list[tuple]:
    moved = AnchorGrid(grid.cells.to(device), grid.extents, grid.strides)
    arguments = (gt.to(device), count.to(device), *options)
    forms = op._label_grid(*moved.flat(), *arguments), op._label(moved.anchors(), *arguments)
    return [tuple(t.cpu() for t in form) for form in forms]


def test_fuzz(device, monkeypatch):
    cases = number_of_cases(device, 3) * 2
    kinds: Counter[str] = Counter()
    differing = 0
    for seed in range(cases // BATCH):
        generator = torch.Generator().manual_seed(seed)
        grid = random_grid(seed % 2 == 0, generator)
        images = (random_objects(KINDS[(seed + i) % len(KINDS)], grid, generator) for i in range(BATCH))
        boxes, counts = zip(*images, strict=True)
        with monkeypatch.context() as patch:
            sometimes_small_tiles(seed, patch)
            gt, count = torch.stack(boxes), torch.tensor(counts, dtype=torch.int32)
            forms = run_both_forms(grid, gt, count, (HIGH, LOW, True, False, False), device)
        for image, (of_image, n) in enumerate(zip(boxes, counts, strict=True)):
            labels, matches, best = torchvision_says(grid, of_image[:n], kinds)
            for ours in forms:
                same = torch.equal(ours[0][image], labels) and torch.equal(ours[1][image], matches)
                differing += not (same and torch.equal(ours[2][image, :n], best))
    print(f"\n{cases} images, {differing} differ:", ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS))
    assert differing == 0
    assert min(kinds[kind] for kind in KINDS) >= 0.05 * cases, "a kind is too rare to be tested"


def wild_grid(generator: torch.Generator) -> AnchorGrid:
    """Cells of any size from 2**-70 to 2**60, long, inverted or flat ones among them; strides of 0, or far beyond."""

    def choose(values: Sequence[float]) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    levels, per_cell = choose((1, 2, 3)), choose((1, 3, 9))
    shape = (levels, per_cell, 2)
    scale = 2.0 ** choose((-70, -30, -5, 0, 0, 0, 3, 20, 60))
    half = (torch.rand(shape, generator=generator) + 0.3) * 4 * scale
    half *= torch.exp2(torch.randn(shape, generator=generator) * choose((0, 1, 4)))
    center = torch.randn(shape, generator=generator) * scale * choose((0, 1, 1000))
    cells = torch.cat([center - half, center + half], dim=-1)
    if choose((0, 0, 1)):
        odd = torch.rand(levels, per_cell, generator=generator) < 0.3
        cells[odd] = cells[odd][:, choose(([2, 1, 0, 3], [2, 3, 0, 1], [0, 1, 0, 3]))]
    extents = [tuple(torch.randint(1, 4, (2,), generator=generator).tolist()) for _ in range(levels)]
    strides = [(choose((0, 1, 4, 8, 4097, 10**8)), choose((0, 1, 4, 8, 4097, 10**8))) for _ in range(levels)]
    return AnchorGrid(cells, extents, strides)


def wild_objects(grid: AnchorGrid, number: int, generator: torch.Generator) -> Tensor:
    """[number, 4]: anchors moved, stretched, flattened, touched, repeated; and anything."""
    anchors = grid.anchors()
    near = anchors[torch.randint(len(anchors), (number,), generator=generator)]
    sides = (near[:, 2:] - near[:, :2]).abs().repeat(1, 2)
    how = int(torch.randint(7, (), generator=generator))
    noise = torch.randn(number, 4, generator=generator)
    if how < 2:
        boxes = near + noise * sides * (0.01, 0.3)[how]
    elif how == 2:
        boxes = near + torch.tensor([0.25, 0.25, -0.25, -0.25]) * sides
    elif how == 3:  # beside the anchor, edge on edge
        boxes = near + torch.tensor([1.0, 0, 1, 0]) * sides
    elif how == 4:
        boxes = near[:, [0, 1, 0, 3]]
    elif how == 5:
        boxes = noise * torch.exp2(torch.randint(-74, 63, (), generator=generator))
    else:
        boxes = near
    return torch.where(boxes.isfinite(), boxes, 0.0)


def test_fuzz_of_any_size(device, monkeypatch):
    # Where areas underflow or overflow, where rounding moves anchors by their own size, where nothing lies near
    # anything; every option and thresholds at, and beyond, the ends.
    cases = number_of_cases(device, 3)
    for seed in range(cases // BATCH * 4):  # many grids of few images
        generator = torch.Generator().manual_seed(seed)
        grid = wild_grid(generator)
        gt = torch.stack([wild_objects(grid, 4, generator) for _ in range(BATCH // 4)])
        count = torch.randint(0, 5, (len(gt),), generator=generator, dtype=torch.int32)
        thresholds = [(0.7, 0.3), (0.7, 0.3), (0.5, 0.5), (1.0, 1.0), (1.5, 0.2), (0.0, 0.0), (1e-30, 1e-40)]
        high, low = thresholds[int(torch.randint(len(thresholds), (), generator=generator))]
        low_quality, low_inclusive, require_overlap = (torch.rand(3, generator=generator) < 0.6).tolist()
        with monkeypatch.context() as patch:
            sometimes_small_tiles(seed, patch)
            forms = run_both_forms(grid, gt, count, (high, low, low_quality, low_inclusive, require_overlap), device)
        flags = {"low_inclusive": low_inclusive, "require_overlap": require_overlap}
        wanted = label_anchors(grid.anchors(), gt, count, high, low, low_quality, **flags, backend="torchvision")
        best = torch.zeros(gt.shape[:2])
        for row, boxes, n in zip(best, gt, count, strict=True):
            row[:n] = box_iou(boxes[:n], grid.anchors()).nan_to_num(nan=torch.inf).amax(dim=1)
        for labels, matches, best_of_gt in forms:
            assert torch.equal(labels, wanted[0]) and torch.equal(matches, wanted[1]), seed
            assert not low_quality or torch.equal(best_of_gt, best), seed
