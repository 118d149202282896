"""Labels of anchors that the kernels make up from cells: those of the same anchors, given, and torchvision's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from kernels import AnchorGrid, label_anchors, label_grid_anchors
from kernels.label_anchors import op
from kernels.runtime import record_launches

# Three levels of unequal extents, cells that are no squares, strides that differ by axis, as where 100 / 8 is rounded.
CELLS = torch.tensor([[-6.0, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6]])
GRID = AnchorGrid(torch.stack([CELLS, CELLS * 2, CELLS * 4]), ((7, 9), (4, 5), (2, 3)), ((4, 4), (8, 8), (16, 14)))


def objects(*shape: int, extent: float = 32, largest: float = 30) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * extent
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * largest], dim=-1)


def on(device: torch.device, grid: AnchorGrid) -> AnchorGrid:
    return AnchorGrid(grid.cells.to(device), grid.extents, grid.strides)


def check(grid, gt_boxes, gt_count, device, **options):
    """Labels and matches, after comparing with torchvision's way and the reference, and GT maxima with box_iou's."""
    count = torch.tensor(gt_count, dtype=torch.int32)
    arguments = gt_boxes.to(device), count.to(device)
    labels, matched = (t.cpu() for t in label_grid_anchors(on(device, grid), *arguments, **options, backend="triton"))
    for backend in ("torchvision", "torch"):
        others = label_grid_anchors(grid, gt_boxes, count, **options, backend=backend)
        assert torch.equal(labels, others[0]) and torch.equal(matched, others[1]), backend
    given = label_anchors(grid.anchors().to(device), *arguments, **options, backend="triton")
    assert torch.equal(labels, given[0].cpu()) and torch.equal(matched, given[1].cpu())
    return labels, matched


@pytest.fixture(params=["whole levels", "small tiles"])
def tiles(request, monkeypatch):
    """Tiles as large as the interpreter's, and small ones: a search ends, and a tile is passed over, inside a level."""
    if request.param == "small tiles":
        small_tiles(monkeypatch)


def small_tiles(monkeypatch):
    monkeypatch.setattr(op, "_tile_shape", lambda extents, per_cell: (2, 4))
    monkeypatch.setattr(op, "_blocks", lambda num_gt: 2)


def best_ious(grid, gt_boxes, gt_count, device):
    """[B, G] as both forms of the op find them, and as the matrix has them: 0/0 counts as infinite, no object as 0."""
    count = torch.tensor(gt_count, dtype=torch.int32)
    flags = (0.7, 0.3, True, False, False)
    by_grid = op._label_grid(*on(device, grid).flat(), gt_boxes.to(device), count.to(device), *flags)[2]
    by_anchors = op._label(grid.anchors().to(device), gt_boxes.to(device), count.to(device), *flags)[2]
    wanted = torch.zeros(gt_boxes.shape[:2])
    for row, boxes, n in zip(wanted, gt_boxes, gt_count, strict=True):
        row[:n] = box_iou(boxes[:n], grid.anchors()).nan_to_num(nan=torch.inf).amax(dim=1)
        row[: len(boxes)][~boxes.isfinite().all(dim=1)] = 0
    return by_grid.cpu(), by_anchors.cpu(), wanted


def test_in_place_of_torchvisions_in_its_own_rpn(device):
    # The recipe of the README: a grid of its AnchorGenerator's cells, ground truth padded; 61 x 90 pixels, so that
    # strides are no powers of two. What its RPN would assign, an image at a time.
    generator = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    rpn = RegionProposalNetwork(
        generator, RPNHead(4, 3), 0.7, 0.3, 256, 0.5, {"training": 9, "testing": 9}, {"training": 9, "testing": 9}, 0.7
    )
    features = [torch.zeros(2, 4, -(-61 // side), -(-90 // side)) for side in (8, 16, 32)]
    anchors = generator(ImageList(torch.zeros(2, 3, 61, 90), [(61, 90)] * 2), features)
    boxes = [objects(5, extent=60), objects(2, extent=60, largest=60)]
    sizes = [feature.shape[-2:] for feature in features]
    strides = [(61 // h, 90 // w) for h, w in sizes]
    grid = AnchorGrid(torch.stack(generator.cell_anchors).to(device), sizes, strides)
    gt = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    labels, matched = (
        t.cpu() for t in label_grid_anchors(grid, gt.to(device), torch.tensor([5, 2], device=device), backend="triton")
    )
    wanted, assigned = rpn.assign_targets_to_anchors(anchors, [{"boxes": b} for b in boxes])
    for ours, theirs, match, of_image, box in zip(labels, wanted, matched, assigned, boxes, strict=True):
        assert torch.equal(ours.float(), theirs)
        assert torch.equal(box[match[ours == 1].long()], of_image[ours == 1]) and (ours == 1).any()


@pytest.mark.parametrize("tile", [None, (4, 8)])
def test_is_the_given_anchors_labels(tile, device, monkeypatch):
    # Whole levels in one tile, and tiles of 4 cells by 8 anchors, which end inside rows and cells and have objects
    # apart from them: what is passed over must not matter. All three labels occur.
    if tile:
        monkeypatch.setattr(op, "_tile_shape", lambda extents, per_cell: tile)
    labels, _ = check(GRID, objects(2, 3), [3, 2], device)
    assert set(labels.unique().tolist()) == {-1, 0, 1}


def test_best_ious_are_the_matrixs_maxima(tiles, device):
    # Every size and place: inside, across borders, outside the image, larger than all of it, smaller than a pixel.
    sizes = torch.tensor([0.4, 3, 9, 20, 45, 300])
    gt = objects(1, 24, extent=40) - 4
    gt[..., 2:] = gt[..., :2] + sizes.repeat(4)[:, None] * torch.tensor([1.0, 0.8])
    gt[0, 20:, :] += torch.tensor([60.0, 200, -90, 0])[:, None]
    by_grid, by_anchors, wanted = best_ious(GRID, gt, [24], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted)
    assert (wanted == 0).any() and (wanted > 0.5).any()


def test_search_ends_only_where_nothing_better_can_be(tiles, device):
    # Objects that fit a coarse level's anchors by size but lie at its border, where a finer level has the better one.
    # The last one lies between four of the anchors that fit it best, and around a smaller one.
    gt = torch.tensor([[[0.0, 0, 5, 5], [26, 18, 33, 27], [-40, -40, 3, 3], [0, 0, 31, 2], [-2.1, -2.1, 10.1, 10.1]]])
    by_grid, by_anchors, wanted = best_ious(GRID, gt, [5], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted)


def test_anchors_that_rounding_moves(tiles, device):
    # Far from 0 an anchor of a few hundredths of a pixel is rounded to a grid of its own size: its area is not its
    # cell's, and the bound by areas must allow for that, or a level whose cells seem too small is left out.
    cells = torch.tensor([[[-0.02, -0.02, 0.02, 0.02]], [[-0.0234, -0.0234, 0.0234, 0.0234]]])
    grid = AnchorGrid(cells, ((1, 32), (1, 32)), ((4096, 4096),) * 2)
    anchors = grid.anchors()
    assert len((anchors[:, 2:] - anchors[:, :2]).prod(1).unique()) > 4
    gt = anchors[[3, 17, 22, 31, 40, 63]][None]
    by_grid, by_anchors, wanted = best_ious(grid, gt, [gt.shape[1]], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted)


def test_an_anchor_that_rounding_flattens(device, monkeypatch):
    # The cell has an area, the anchor far from 0 has none: 0/0 with an object without one, wherever both lie.
    small_tiles(monkeypatch)
    grid = AnchorGrid(torch.tensor([[[-1e-5, -1e-5, 1e-5, 1e-5]]]), ((1, 900),), ((1, 1),))
    by_grid, by_anchors, wanted = best_ious(grid, torch.tensor([[[1.0, 1, 1, 9]]]), [1], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted) and wanted.isinf().all()


def test_areas_too_small_to_divide_by(device):
    # Areas whose product with anything underflows still have IoUs of 1/2.
    grid = AnchorGrid(torch.tensor([[[0.0, 0, 1e-16, 1e-16], [0, 0, 2e-16, 1e-16]]]), ((1, 1),), ((0, 0),))
    labels, _ = check(grid, grid.cells[:, :1], [1], device)
    assert labels.tolist() == [[1, -1]]
    labels, _ = check(
        grid, grid.cells[:, :1], [1], device, high_threshold=0.5, low_threshold=0.5, allow_low_quality_matches=False
    )
    assert labels.tolist() == [[1, 1]]


@pytest.mark.parametrize("extent", [(0, 5), (5, 0), (0, 0)])
def test_level_without_cells(extent, device):
    # Its anchors would fit this object best: they must not be made up.
    cells = torch.tensor([[[-4.0, -4, 4, 4]], [[-8, -8, 8, 8]]])
    grid = AnchorGrid(cells, ((4, 4), extent), ((4, 4), (8, 8)))
    gt = torch.tensor([[[-4.0, -14, 12, 2]]])
    labels, _ = check(grid, gt, [1], device)
    by_grid, by_anchors, wanted = best_ious(grid, gt, [1], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted) and (labels == 1).any()


def test_cells_and_objects_without_area(device):
    # 0/0 with an object anywhere: nothing may be passed over for lying apart. Also inverted ones, and areas that
    # overflow.
    cells = torch.cat([CELLS[:1], torch.tensor([[1.0, 1, 1, 5], [3, 3, -3, -3]])])[None]
    grid = AnchorGrid(cells, ((3, 4),), ((8, 8),))
    gt = torch.tensor([[[2.0, 2, 9, 7], [90, 90, 90, 95], [20, 20, 5, 4], [9, 1, 3, 8], [-2e38, -2e38, 2e38, 2e38]]])
    for n in range(1, 6):
        check(grid, gt[:, n - 1 : n], [1], device)
    check(grid, gt, [5], device)
    by_grid, by_anchors, wanted = best_ious(grid, gt, [5], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted)
    assert wanted.isinf().any()


def test_negative_area_that_cancels_an_anchors(tiles, device):
    # A box with its edges swapped, far from everything, whose area is minus an anchor's: 0/0 all the same.
    gt = torch.tensor([[[100.0, 100, 112, 94], [3, 3, 9, 8]]])
    labels, matched = check(GRID, gt, [2], device)
    sizes = (GRID.anchors()[:, 2:] - GRID.anchors()[:, :2]).prod(1)
    assert (labels[0][sizes == 72] == 1).all() and (matched[0][sizes == 72] == 0).all() and (labels[0] == 0).any()
    by_grid, by_anchors, wanted = best_ious(GRID, gt, [2], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted)


def test_object_that_is_not_finite_is_none(device):
    # Not even by its index; nor what lies behind the count.
    gt = objects(2, 4)
    gt[0, 0, 1], gt[0, 2, 3], gt[1, 2:] = torch.nan, torch.inf, torch.nan
    labels, matched = check(GRID, gt, [4, 2], device)
    assert set(matched[0][labels[0] == 1].unique().tolist()) <= {1, 3} and (matched[1] < 2).all()
    by_grid, by_anchors, wanted = best_ious(GRID, gt, [4, 2], device)
    assert torch.equal(by_grid, wanted) and torch.equal(by_anchors, wanted)


def test_more_objects_than_a_tile_looks_at_together(device, monkeypatch):
    # On a GPU 128 at a time: the first object, the claims and the order of ties go across those groups.
    monkeypatch.setattr(op, "_blocks", lambda num_gt: 2)
    gt = objects(1, 7)
    gt[0, 3] = gt[0, 5] = gt[0, 6]
    gt[0, 0] = torch.nan
    check(GRID, gt, [7], device)
    gt[0, 4] = torch.tensor([500.0, 500, 510, 510])  # overlaps nothing: everything positive
    assert (check(GRID, gt, [7], device)[0] == 1).all()
    assert (check(GRID, gt, [7], device, require_overlap=True)[0] != 1).any()


@pytest.mark.parametrize("low_quality", [True, False])
def test_options(low_quality, device):
    check(
        GRID, objects(2, 3).round(), [3, 2], device, high_threshold=0.5, low_threshold=0.25, low_inclusive=True,
        require_overlap=True, allow_low_quality_matches=low_quality,
    )  # fmt: skip


def test_thresholds_that_every_iou_reaches(device):
    # A high threshold of 0 makes every anchor of an image with objects positive, and none of one without.
    labels, _ = check(GRID, objects(2, 2, extent=10), [2, 0], device, high_threshold=0.0, low_threshold=0.0)
    assert (labels[0] == 1).all() and (labels[1] == 0).all()


def test_empty_grids_and_batches(device):
    # A level without cells, no level with any, no objects' slots, no image.
    grid = AnchorGrid(GRID.cells, ((7, 9), (0, 5), (2, 3)), GRID.strides)
    check(grid, objects(1, 2), [2], device)
    nothing = AnchorGrid(GRID.cells[:1], ((0, 0),), ((4, 4),))
    labels, matched = label_grid_anchors(
        on(device, nothing), objects(2, 2).to(device), torch.tensor([2, 0], device=device), backend="triton"
    )
    assert labels.shape == matched.shape == (2, 0)
    labels, _ = check(GRID, torch.zeros(2, 0, 4), [0, 0], device)
    assert (labels == 0).all()
    labels, _ = check(GRID, torch.zeros(0, 3, 4), [], device)
    assert labels.shape == (0, len(GRID))


def test_every_images_own_anchors(device):
    # Proposals against objects, as the box head's are matched: one threshold, no low-quality rule; IoUs with its own
    # image's boxes only.
    proposals, gt = objects(3, 40), objects(3, 4)
    count = torch.tensor([4, 1, 0], dtype=torch.int32)
    options = {"high_threshold": 0.5, "low_threshold": 0.5, "allow_low_quality_matches": False}
    arguments = (proposals.to(device), gt.to(device), count.to(device))
    labels, matched = (t.cpu() for t in label_anchors(*arguments, **options, backend="triton"))
    for backend in ("torchvision", "torch"):
        others = label_anchors(proposals, gt, count, **options, backend=backend)
        assert torch.equal(labels, others[0]) and torch.equal(matched, others[1]), backend
    matches = Matcher(0.5, 0.5)(box_iou(gt[0], proposals[0]))
    assert torch.equal(labels[0] == 1, matches >= 0) and (labels[0] == 1).any()
    assert torch.equal(matched[0][labels[0] == 1].long(), matches[matches >= 0])
    low_quality = label_anchors(*arguments, backend="triton")
    others = label_anchors(proposals, gt, count, backend="torch")
    assert torch.equal(low_quality[0].cpu(), others[0]) and torch.equal(low_quality[1].cpu(), others[1])


def test_memory_at_training_size():
    # 268,569 anchors, 1000 objects: nothing is allocated but the results and a number an object. torchvision's matrix
    # alone is a gigabyte, an image. (Launches are recorded: nothing runs.)
    class Allocated(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if not any(out is a for a in args):
                self.bytes += sum(
                    t.numel() * t.element_size() for t in (out if isinstance(out, (list, tuple)) else [out])
                )
            return out

    extents = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))
    grid = AnchorGrid(torch.zeros(5, 3, 4), extents, [(4 << level, 4 << level) for level in range(5)])
    gt, count = torch.zeros(2, 1000, 4), torch.zeros(2, dtype=torch.int32)
    with record_launches(), Allocated() as allocated:
        op._label_grid._init_fn(*grid.flat(), gt, count, 0.7, 0.3, True, False, False)
    results = 2 * 268_569 * (1 + 4)
    assert results <= allocated.bytes <= results + 2**20


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AnchorGrid(CELLS, GRID.extents, GRID.strides), ValueError, "cells must have 3 dimensions"),
        (lambda: AnchorGrid(GRID.cells[:0], (), ()), ValueError, "at least one level"),
        (lambda: AnchorGrid(GRID.cells.half(), GRID.extents, GRID.strides), TypeError, "cells must be float32"),
        (lambda: AnchorGrid(GRID.cells, GRID.extents[:2], GRID.strides), ValueError, "a level, got 3, 2 and 3"),
        (lambda: AnchorGrid(GRID.cells, ((7, -9), (4, 5), (2, 3)), GRID.strides), ValueError, "must not be negative"),
        (lambda: AnchorGrid(GRID.cells, ((7.5, 9), (4, 5), (2, 3)), GRID.strides), TypeError, "whole numbers"),
        (lambda: AnchorGrid(GRID.cells, GRID.extents, [4, 8, 16]), ValueError, "strides must be pairs"),
        (lambda: label_anchors(GRID, objects(1, 2), torch.tensor([2])), TypeError, "use label_grid_anchors"),
        (lambda: label_grid_anchors(GRID, objects(1, 2), torch.tensor([2]), "0.7"), TypeError, "must be a number"),
        (lambda: AnchorGrid(GRID.cells, GRID.extents, ((4,), (8, 8), (16, 16))), ValueError, "pairs"),
        (lambda: label_grid_anchors(CELLS, objects(1, 2), torch.tensor([2])), TypeError, "grid must be an AnchorGrid"),
        (lambda: label_grid_anchors(GRID, objects(2), torch.tensor([2])), ValueError, "gt_boxes must have 3 dim"),
        (
            lambda: label_grid_anchors(
                AnchorGrid(GRID.cells[:1], ((4096, 4096),), ((4, 4),)), objects(1, 2), torch.tensor([2])
            ),
            ValueError,
            "at most 16777216 anchors an image, got 50331648",
        ),
        (lambda: label_anchors(objects(2, 5), objects(1, 2), torch.tensor([2])), ValueError, "batch sizes differ"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
