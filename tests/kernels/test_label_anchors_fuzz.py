"""Random images of every awkward kind: labels, matches and GT maxima are box_iou's and Matcher's, bit for bit.

On a GPU 12,288 images; in Triton's interpreter 128, or as many as the environment variable LABEL_CASES says. The counts of
each kind are printed: `pytest -s tests/kernels/test_label_anchors_fuzz.py`.
"""

import os
from collections import Counter

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from kernels import AnchorGrid
from kernels.label_anchors import op

BATCH, MOST, HIGH, LOW = 64, 24, 0.7, 0.3
KINDS = ("ties", "duplicates", "on a threshold", "unmatched", "no object", "crowded", "0/0", "ignored", "low quality")
# Whole-pixel cells of 10 x 10: objects that share two sides with one have IoUs of n / 10.
CELL = torch.tensor([[0.0, 0, 10, 10], [-2, 3, 12, 8], [2, -3, 8, 13]])


def random_grid(generator: torch.Generator) -> AnchorGrid:
    """Two or three levels of a few cells; now and then a cell without area."""
    levels = int(torch.randint(1, 3, (), generator=generator)) + 1
    cells = torch.stack([CELL * 2**level for level in range(levels)])
    if torch.rand((), generator=generator) < 0.3:
        cells[0, 2] = torch.tensor([3.0, 3, 3, 9])
    extents = [tuple(torch.randint(1, 6 - level, (2,), generator=generator).tolist()) for level in range(levels)]
    return AnchorGrid(cells, extents, [(5 << level, 5 << level) for level in range(levels)])


def random_objects(grid: AnchorGrid, generator: torch.Generator) -> tuple[Tensor, int]:
    """[MOST, 4] boxes and how many of them are objects: the recipe of a kind, drawn at random."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    corner = (draw(MOST, 2) * 40).round()
    boxes = torch.cat([corner, corner + 1 + (draw(MOST, 2) * 24).round()], dim=1)
    anchors = grid.anchors()
    count = int(torch.randint(1, 5, (), generator=generator))
    kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
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


def test_fuzz(device):
    default = 12_288 if device.type == "cuda" else 128
    cases = max(BATCH, int(os.environ.get("LABEL_CASES", default)) // BATCH * BATCH)
    kinds: Counter[str] = Counter()
    differing = 0
    for seed in range(cases // BATCH):
        generator = torch.Generator().manual_seed(seed)
        grid = random_grid(generator)
        boxes, counts = zip(*(random_objects(grid, generator) for _ in range(BATCH)), strict=True)
        gt, count = torch.stack(boxes).to(device), torch.tensor(counts, dtype=torch.int32, device=device)
        moved = AnchorGrid(grid.cells.to(device), grid.extents, grid.strides)
        options = (HIGH, LOW, True, False, False)
        # Every image in both forms, in the interpreter every other one: it takes them one by one.
        forms = [op._label_grid(*moved.flat(), gt, count, *options)]
        if device.type == "cuda" or seed % 2:
            forms.append(op._label(moved.anchors(), gt, count, *options))
        for image, (of_image, n) in enumerate(zip(boxes, counts, strict=True)):
            labels, matches, best = torchvision_says(grid, of_image[:n], kinds)
            for form in forms:
                ours = [t[image].cpu() for t in form]
                same = torch.equal(ours[0], labels) and torch.equal(ours[1], matches) and torch.equal(ours[2][:n], best)
                differing += not same
    print(f"\n{cases} images, {differing} differ:", ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS))
    assert differing == 0
    assert min(kinds[kind] for kind in KINDS) >= 0.05 * cases, "a kind is too rare to be tested"
