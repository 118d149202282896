"""The whole model: what training and detection rely on."""

import dataclasses

import pytest
import torch
from model_inputs import TINY, shapes_batch

from kernels import MaskPool, launch_counts, use_backend
from mrcnn.data.rle import mask_api
from mrcnn.modeling import MaskRCNN
from mrcnn.modeling.detections import ImageDetections
from mrcnn.structures import Targets


def test_a_batch_without_objects_trains():
    # Background is learnt from; nothing divides by zero, no box or mask loss, every parameter gets a finite gradient.
    batch = shapes_batch()
    empty = Targets(
        boxes=torch.zeros(2, 3, 4), labels=torch.zeros(2, 3, dtype=torch.int64), count=torch.zeros(2).int(),
        masks=MaskPool(
            torch.zeros(0, dtype=torch.uint8), torch.zeros(2, 3).long(), torch.zeros(2, 3, 4).int(), batch.sizes,
            (64, 64),
        ),
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
    masks = dataclasses.replace(t.masks, offset=pad(t.masks.offset, 0), extent=pad(t.masks.extent, 0))
    more = Targets(pad(t.boxes, float("nan")), pad(t.labels, 0), t.count, masks)
    many = model(batch.images, batch.sizes, more)
    for name, loss in few.items():
        torch.testing.assert_close(many[name], loss, msg=name)


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
    assert launch_counts["roi_align_gather_kernel"] == 1 and launch_counts["mask_predictor_features_kernel"] == 1


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "gn"])
def test_it_learns(norm):
    # A few steps on one batch bring the loss down, with each kind of normalisation, and the mask loss with it.
    torch.manual_seed(0)
    batch = shapes_batch()
    model = MaskRCNN(dataclasses.replace(TINY, norm=norm)).train()
    for name, buffer in model.named_buffers():
        if name.endswith("bn2.weight"):  # frozen: nothing else keeps activations from doubling in every random block
            buffer.fill_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    totals, masks = [], []
    for _ in range(16):
        losses = model(batch.images, batch.sizes, batch.targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
        masks.append(losses["loss_mask"].item())
    assert totals[-1] < 0.6 * totals[0] and masks[-1] < 0.6 * masks[0]


def test_detections_lie_in_the_image_and_are_limited():
    # Shapes, ranges and order of what evaluation relies on; random weights detect plenty above a zero threshold.
    torch.manual_seed(0)
    batch = shapes_batch()
    model = MaskRCNN(dataclasses.replace(TINY, score_threshold=0.0, max_detections=7)).eval()
    with torch.no_grad():
        results = model(batch.images, batch.sizes)
    for detections in results.by_image():
        assert detections.boxes.shape == (7, 4) and detections.masks.shape == (7, 28, 28)
        assert (detections.boxes >= 0).all() and (detections.boxes <= 64).all()
        assert (detections.scores.diff() <= 0).all() and (detections.labels >= 1).all()
        original = detections.on_original((64, 64), (128, 32))
        assert original["masks"].shape == (7, 128, 32) and original["masks"].dtype == torch.bool
        torch.testing.assert_close(original["boxes"], detections.boxes * torch.tensor([0.5, 2, 0.5, 2]))


def test_masks_as_rle_are_the_pasted_ones():
    # From crops instead of whole images, on an original of another size; with no detection there is no mask.
    torch.manual_seed(0)
    batch = shapes_batch(1)
    model = MaskRCNN(dataclasses.replace(TINY, score_threshold=0.0, max_detections=5)).eval()
    with torch.no_grad():
        (found,) = model(batch.images, batch.sizes).by_image()
    pasted = found.on_original((64, 64), (50, 90))["masks"]
    packed = found.on_original((64, 64), (50, 90), rle=True)["masks"]
    assert pasted.any() and [rle["size"] for rle in packed] == [[50, 90]] * 5
    decoded = torch.from_numpy(mask_api().decode(packed)).permute(2, 0, 1)
    assert torch.equal(decoded.bool(), pasted)
    nothing = ImageDetections(found.boxes[:0], found.labels[:0], found.scores[:0], found.masks[:0])
    assert nothing.on_original((64, 64), (50, 90), rle=True)["masks"] == []


def test_configure_reaches_every_stage():
    # Thresholds and numbers of a model that is there already, as evaluation and the demo change them.
    model = MaskRCNN(TINY)
    model.configure(max_detections=3, roi_samples=7)
    configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    with pytest.raises(ValueError, match="anchor_sizes, mask_pool_size cannot change once the model is built"):
        model.configure(anchor_sizes=(9,) * 5, mask_pool_size=7)
    assert len(configs) == 1 and model.config.max_detections == 3 and model.roi_sampler.config.roi_samples == 7
