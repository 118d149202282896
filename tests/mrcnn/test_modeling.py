"""The model's stages, each against torchvision's counterpart, and the promise of fixed shapes."""

import dataclasses
import importlib

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from kernels import launch_counts, use_backend
from mrcnn.config import CONFIGS
from mrcnn.data.collate import Collate, targets_from_lists
from mrcnn.data.shapes import ShapesDataset
from mrcnn.modeling import MaskRCNN, boxes, rpn
from mrcnn.modeling.mask_targets import mask_targets
from mrcnn.modeling.nms import nms_mask
from mrcnn.modeling.sampling import sample
from mrcnn.structures import Targets

TINY = dataclasses.replace(CONFIGS["tiny"].model, num_classes=4)


def random_boxes(*shape: int, side: float = 100) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * side
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * side / 2], dim=-1)


def shapes_batch(number: int = 2):
    dataset = ShapesDataset(number, 64, seed=5)
    return Collate(dataset.max_objects)([dataset[i] for i in range(number)])


def test_anchors_are_torchvisions():
    # Values and order: checkpoints of the RPN depend on both. The second level's stride is not a power of two.
    sizes, ratios, grids, image = ((32,), (64,)), ((0.5, 1.0, 2.0),) * 2, [(8, 12), (2, 3)], (64, 96)
    generator = AnchorGenerator(sizes, ratios)
    expected = generator(ImageList(torch.zeros(1, 3, *image), [image]), [torch.zeros(1, 1, *g) for g in grids])[0]
    cells = [boxes.cell_anchors(s[0], r) for s, r in zip(sizes, ratios, strict=True)]
    assert torch.equal(boxes.grid_anchors(grids, image, cells), expected)


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


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_is_torchvisions_on_every_group(threshold):
    # Crowded boxes (long chains of suppression), a duplicate, ragged groups and an empty one, all at once.
    grouped = random_boxes(4, 60, side=40)
    grouped[:, 7] = grouped[:, 3]
    valid = torch.rand(4, 60) < torch.tensor([1.0, 0.8, 0.3, 0.0])[:, None]
    keep = nms_mask(grouped, valid, threshold)
    for group, real, kept in zip(grouped, valid, keep, strict=True):
        index = real.nonzero()[:, 0]
        scores = torch.linspace(1, 0, len(index))
        expected = index[torchvision.ops.nms(group[index], scores, threshold)]
        assert torch.equal(kept.nonzero()[:, 0], expected.sort().values)
    assert 0 < keep.sum() < valid.sum()


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_nms_at_the_threshold(threshold):
    # An IoU that is the threshold as fp32, which is above or below the threshold as a double: as torchvision on a CPU.
    pair = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10 * threshold]]])
    assert torchvision.ops.box_iou(*pair[0][:, None]).item() == torch.tensor(threshold).item()
    expected = torchvision.ops.nms(pair[0], torch.tensor([0.9, 0.8]), threshold)
    assert nms_mask(pair, torch.ones(1, 2, dtype=torch.bool), threshold).sum() == len(expected)


def test_sampling_draws_what_torchvision_draws():
    # The balanced sampler's numbers: at most half positive, negatives fill up, never one index twice.
    labels = torch.full((3, 1000), -1)
    labels[0, :400] = 1  # many of both
    labels[0, 400:900] = 0
    labels[1, 5:8] = 1  # few positives
    labels[1, 100:] = 0
    labels[2, :2], labels[2, 2:12] = 1, 0  # too few of both
    index, drawn, positive = sample(labels, 64, 0.5)
    assert index.shape == drawn.shape == positive.shape == (3, 64)
    assert positive.sum(1).tolist() == [32, 3, 2]
    assert drawn.sum(1).tolist() == [64, 64, 12]
    for i in range(3):
        chosen = index[i, drawn[i]]
        assert len(chosen.unique()) == len(chosen)
        assert torch.equal(labels[i, chosen] == 1, positive[i, drawn[i]])
        assert (labels[i, chosen] >= 0).all()
        assert positive[i].sum() == positive[i, : positive[i].sum()].sum()  # positives first


def test_sampling_with_fewer_candidates_than_slots():
    # The limit is a fraction of the slots, not of the candidates: torchvision draws all 40 positives here.
    labels = torch.cat([torch.ones(1, 40), torch.zeros(1, 20)], dim=1)
    index, drawn, positive = sample(labels, 512, 0.25)
    assert index.shape == (1, 60) and drawn.sum() == 60 and positive.sum() == 40


def test_sampling_is_uniform_and_seeded():
    # Every positive must have the same chance; the same seed gives the same draw.
    labels = torch.ones(2000, 10)
    index, _, positive = sample(labels, 4, 0.5)
    counts = torch.bincount(index[positive], minlength=10)
    assert counts.sum() == 4000 and (counts - 400).abs().max() < 100
    torch.manual_seed(1)
    first = sample(labels, 4, 0.5)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(labels, 4, 0.5), strict=True))


def test_mask_targets_are_torchvisions():
    # Boxes that reach the image's border, cross other objects, are thin, or equal the object; images padded.
    sizes, padded = [(40, 64), (50, 33)], (64, 64)
    lists, expected, rows = [], [], []
    for height, width in sizes:
        masks = torch.zeros(3, height, width, dtype=torch.uint8)
        masks[0, 5:30, 3:20] = 1
        masks[1] = torch.rand(height, width) > 0.5
        masks[2, height - 4 :, width - 9 :] = 1
        proposals = random_boxes(12, side=60)
        proposals[0] = torch.tensor([3.0, 5, 20, 30])
        proposals[1] = torch.tensor([0.0, 0, width, height])
        proposals[2] = torch.tensor([width - 6.5, height - 3.2, width, height])
        proposals[3] = torch.tensor([4.0, 4.0, 4.2, 30.0])
        proposals = boxes.clip(proposals[None], torch.tensor([[height, width]]))[0]
        matched = torch.arange(12) % 3
        lists.append({"boxes": random_boxes(3), "labels": torch.ones(3, dtype=torch.int64), "masks": masks})
        expected.append(project_masks_on_boxes(masks, proposals, matched, 28))
        rows.append((proposals, matched))
    proposals, matched = (torch.stack(part) for part in zip(*rows, strict=True))
    with torch.autocast("cpu", torch.bfloat16):  # as in training on a GPU: the targets must stay fp32
        found = mask_targets(targets_from_lists(lists), proposals, matched, 28, torch.tensor(sizes), padded)
    assert (found - torch.stack(expected)).abs().max() <= 2e-7 * 3  # sums of up to 9 samples, in another order
    assert 0.1 < found.mean() < 0.9


def test_a_batch_without_objects_trains():
    # Background is learnt from; nothing divides by zero, no box or mask loss, every parameter gets a finite gradient.
    batch = shapes_batch()
    empty = Targets(
        boxes=torch.zeros(2, 3, 4), labels=torch.zeros(2, 3, dtype=torch.int64), count=torch.zeros(2).int(),
        mask_pool=torch.zeros(0, dtype=torch.uint8), mask_offset=torch.zeros(2, 3, dtype=torch.int64),
        mask_extent=torch.zeros(2, 3, 4, dtype=torch.int32),
    )  # fmt: skip
    model = MaskRCNN(TINY).train()
    losses = model(batch.images, batch.sizes, empty)
    assert losses["loss_rpn_box"] == losses["loss_box"] == losses["loss_mask"] == 0
    assert losses["loss_objectness"] > 0 and losses["loss_class"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_empty_slots_change_nothing(monkeypatch):
    # Twice the capacity, the extra slots full of NaN: the same losses, given the same draw of the same candidates.
    keys = torch.rand(2, 5000)
    monkeypatch.setattr("mrcnn.modeling.sampling.random_keys", lambda like: keys[:, : like.shape[1]].to(like.device))
    batch = shapes_batch()
    torch.manual_seed(0)
    model = MaskRCNN(TINY).train()
    few = model(batch.images, batch.sizes, batch.targets)
    t = batch.targets
    pad = lambda x, value: torch.cat([x, torch.full_like(x, value)], dim=1)
    more = Targets(
        pad(t.boxes, float("nan")), pad(t.labels, 0), t.count, t.mask_pool, pad(t.mask_offset, 0), pad(t.mask_extent, 0)
    )
    many = model(batch.images, batch.sizes, more)
    for name, loss in few.items():
        torch.testing.assert_close(many[name], loss, msg=name)


def test_training_has_no_data_dependent_shape(monkeypatch):
    # Images to losses and gradients with tensors that have shapes but no values: a nonzero(), an item() or a boolean
    # index anywhere would raise. NMS looks at values to know when it is done (its result has a fixed shape), and is
    # left out.
    monkeypatch.setattr(rpn, "nms_mask", lambda boxes, valid, threshold: valid)
    for name in ("roi_align", "box_iou", "label_anchors", "mask_bce_loss"):
        op = importlib.import_module(f"kernels.{name}.op")
        monkeypatch.setattr(op, "choose_backend", lambda *args, **kwargs: "triton")  # as on a GPU
        monkeypatch.setattr(op, "check_indices", lambda *args, **kwargs: None, raising=False)  # for CPU tensors only
    batch = shapes_batch()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = MaskRCNN(TINY).train()
        fake = [mode.from_tensor(x) for x in (batch.images, batch.sizes)]
        targets = Targets(
            **{f.name: mode.from_tensor(getattr(batch.targets, f.name)) for f in dataclasses.fields(Targets)}
        )
        losses = model(*fake, targets)
        sum(losses.values()).backward()
    assert all(loss.shape == () for loss in losses.values())


def test_proposals_have_one_shape_whatever_they_are():
    # Fewer candidates than slots, and all of them overlapping: padded, marked, best first.
    anchors = torch.tensor([[0.0, 0, 10, 10]]).repeat(30, 1)
    logits = torch.linspace(1, -1, 30)[None].repeat(2, 1)
    logits[1, 20:] = 3.0
    proposals, valid = rpn.propose(
        logits, torch.zeros(2, 30, 4), anchors, [20, 10], torch.tensor([[50, 50], [50, 5]]), TINY, training=True
    )
    assert proposals.shape == (2, 40, 4) and valid.shape == (
        2,
        40,
    )  # as many slots a level as the larger one has anchors
    assert valid.sum(1).tolist() == [2, 2]  # one a level survives: NMS is within levels
    assert proposals[1, 0].tolist() == [0, 0, 5, 10]


def test_bf16_autocast_with_the_triton_ops(device):
    # How a GPU trains: channels_last weights, bf16 features into the kernels, fp32 boxes and losses.
    config = dataclasses.replace(TINY, roi_samples=8, post_nms_top_n=(16, 16))
    model = MaskRCNN(config).to(device, memory_format=torch.channels_last).train()
    batch = shapes_batch().to(device)
    launch_counts.clear()
    with torch.autocast(device.type, torch.bfloat16), use_backend("triton"):
        losses = model(batch.images, batch.sizes, batch.targets)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert launch_counts["roi_align_backward_kernel"] == 2 and launch_counts["mask_bce_backward_kernel"] == 1


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "gn"])
def test_it_learns(norm):
    # A few steps on one batch bring the loss down, with each kind of normalisation, and the mask loss with it.
    torch.manual_seed(0)
    batch = shapes_batch()
    model = MaskRCNN(dataclasses.replace(TINY, norm=norm)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    totals, masks = [], []
    for _ in range(12):
        losses = model(batch.images, batch.sizes, batch.targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
        masks.append(losses["loss_mask"].item())
    assert totals[-1] < 0.7 * totals[0] and masks[-1] < 0.7 * masks[0]


def test_detections_lie_in_the_image_and_are_limited():
    # Shapes, ranges and order of what evaluation relies on; random weights detect plenty above a zero threshold.
    torch.manual_seed(0)
    batch = shapes_batch()
    model = MaskRCNN(dataclasses.replace(TINY, score_threshold=0.0, max_detections=7)).eval()
    with torch.no_grad():
        results = model(batch.images, batch.sizes)
    for detections in results:
        assert detections.boxes.shape == (7, 4) and detections.masks.shape == (7, 28, 28)
        assert (detections.boxes >= 0).all() and (detections.boxes <= 64).all()
        assert (detections.scores.diff() <= 0).all() and (detections.labels >= 1).all()
        original = detections.on_original((64, 64), (128, 32))
        assert original["masks"].shape == (7, 128, 32) and original["masks"].dtype == torch.bool
        torch.testing.assert_close(original["boxes"], detections.boxes * torch.tensor([0.5, 2, 0.5, 2]))


def test_unknown_backbone_and_norm():
    with pytest.raises(ValueError, match="unknown backbone 'vgg'; choose one of resnet18, resnet50"):
        MaskRCNN(dataclasses.replace(TINY, backbone="vgg"))
    with pytest.raises(ValueError, match="unknown norm 'ln'; choose one of bn, frozen_bn, gn"):
        MaskRCNN(dataclasses.replace(TINY, norm="ln"))
