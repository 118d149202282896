"""Anchors and deltas, against torchvision's and by counting."""

import dataclasses

import pytest
import torch
from model_inputs import random_boxes
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from kernels import boxes
from mrcnn.config import CONFIGS
from mrcnn.modeling.anchors import Anchors, cell_anchors

MODEL = CONFIGS["torchvision"].model


def pyramid(image: tuple[int, int], levels: int) -> list[torch.Tensor]:
    """Feature maps of strides 4, 8, ... as convolutions of stride 2 with padding leave them."""
    return [torch.zeros(1, 1, *(-(-side // 2**level) for side in image)) for level in range(2, 2 + levels)]


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("image", [(64, 96), (96, 32)])
def test_they_are_torchvisions(scales, image):
    # Values and order, three and nine a cell: checkpoints of the RPN depend on both. On the short sides P6 has one
    # cell, and its stride is not a power of two.
    config = dataclasses.replace(MODEL, anchor_scales=scales)
    sizes = tuple(tuple(int(size * scale) for scale in scales) for size in config.anchor_sizes)
    features = pyramid(image, 5)
    generator = AnchorGenerator(sizes, (config.aspect_ratios,) * 5)
    expected = generator(ImageList(torch.zeros(1, 3, *image), [image]), features)[0]
    assert torch.equal(Anchors(config)(features, image).anchors(), expected)


@pytest.mark.parametrize(
    ("sizes", "scales", "ratios", "per_cell"),
    [
        ((32, 64, 128, 256, 512), (1.0,), (0.5, 1.0, 2.0), 3),  # FPN's: P2..P6, one size a level
        ((32, 64, 128, 256), (0.5, 1.0, 2.0), (0.5, 1.0, 2.0), 9),  # the tutorial's: P2..P5, three
        ((8, 16, 32, 64), (1.0, 1.5), (0.3, 1.0, 1.7, 3.0), 8),  # any other
    ],
)
@pytest.mark.parametrize("image", [(800, 1344), (96, 160)])
def test_their_number_is_the_sum_over_levels(sizes, scales, ratios, per_cell, image):
    # A = sum of H * W * k.
    config = dataclasses.replace(MODEL, anchor_sizes=sizes, anchor_scales=scales, aspect_ratios=ratios)
    features = pyramid(image, len(sizes))
    anchors = Anchors(config)(features, image)
    assert anchors.level_sizes == [f.shape[2] * f.shape[3] * per_cell for f in features]
    assert len(anchors) == len(anchors.anchors()) == sum(anchors.level_sizes)
    if image == (800, 1344) and len(sizes) == 5:
        assert len(anchors) == 268_569  # the figure that the study's workloads are made of


def test_areas_ratios_and_centres():
    # Unrounded, as detectron2's: width * height is the size's square, height / width the ratio, centred on the cell.
    sizes, ratios = [32.0, 50.0], [0.5, 1.0, 2.0]
    anchors = cell_anchors(sizes, ratios, rounded=False)
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.tensor([32.0, 50] * 3) ** 2)
    torch.testing.assert_close(height / width, torch.tensor([0.5, 0.5, 1, 1, 2, 2]))
    assert torch.equal(anchors[:, :2], -anchors[:, 2:])
    assert (cell_anchors(sizes, ratios) == cell_anchors(sizes, ratios).round()).all()
    assert not torch.equal(cell_anchors(sizes, ratios), anchors)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (10.0, 5.0)])
def test_deltas_are_torchvisions_and_invert(weights):
    # The RPN's and the box head's weights; decoding what was encoded gives the box back.
    wanted, references = random_boxes(50), random_boxes(50)
    deltas = boxes.encode(wanted, references, weights)
    torch.testing.assert_close(
        deltas, BoxCoder((weights[0], weights[0], weights[1], weights[1])).encode([wanted], [references])[0]
    )
    torch.testing.assert_close(boxes.decode(deltas, references, weights), wanted)
    huge = torch.tensor([[0.0, 0.0, 100.0, 100.0]])  # dw and dh beyond the limit: 62.5-fold, not infinite
    assert boxes.decode(huge, references[:1]).isfinite().all()
    torch.testing.assert_close(
        boxes.decode(huge, references[:1]), BoxCoder((1, 1, 1, 1)).decode(huge, [references[:1]])[0]
    )


def test_encoding_an_empty_slot_is_zero():
    # Zero-padded boxes would give log(0) or 0/0, whose gradient poisons the batch.
    assert torch.equal(boxes.encode(torch.zeros(1, 4), random_boxes(1)), torch.zeros(1, 4))
    assert torch.equal(boxes.encode(random_boxes(1), torch.zeros(1, 4)), torch.zeros(1, 4))


def test_clip_uses_each_images_own_size():
    clipped = boxes.clip(torch.tensor([[[-5.0, -5, 50, 50]], [[-5, -5, 50, 50]]]), torch.tensor([[10, 20], [30, 40]]))
    assert clipped.tolist() == [[[0, 0, 20, 10]], [[0, 0, 40, 30]]]
