"""The same weights in torchvision's Mask R-CNN, v1 and v2, and in ours: same detections, losses and gradients.

The weights are random but scaled so that nothing is vacuous: many detections of many classes, masks that are neither
empty nor full, every loss at work. Each of these is asserted.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.config import CONFIGS
from mrcnn.modeling import rpn
from mrcnn.modeling.backbone import FrozenBatchNorm
from mrcnn.modeling.torchvision_model import TorchvisionMaskRCNN, from_torchvision

MIN_SIZE, MAX_SIZE = 224, 320  # small enough for a CPU; everything else is torchvision's default
CLASSES = 91


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Both models compute their convolutions in fp32 on a GPU too."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def scaled(model: MaskRCNN) -> MaskRCNN:
    """Random weights whose outputs are of the size that trained ones have."""
    with torch.no_grad():
        for name, value in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith("bn3.weight"):
                value.fill_(0.3)  # or activations double with every residual block
        model.rpn.head.cls_logits.weight.mul_(10)
        model.rpn.head.bbox_pred.weight.mul_(5)
        model.roi_heads.box_predictor.cls_score.weight.mul_(24)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(2)
    return model


def theirs_v1() -> tuple[MaskRCNN, dict]:
    """maskrcnn_resnet50_fpn with frozen batch norm, and what our configuration changes for it."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    return MaskRCNN(backbone, CLASSES, min_size=MIN_SIZE, max_size=MAX_SIZE), {}


def theirs_v2() -> tuple[MaskRCNN, dict]:
    """maskrcnn_resnet50_fpn_v2 with fewer RoIs: four convolutions for each take a CPU long."""
    few = {"rpn_post_nms_top_n_train": 300, "rpn_post_nms_top_n_test": 200, "box_batch_size_per_image": 128}
    model = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=MIN_SIZE, max_size=MAX_SIZE, **few
    )
    return model, {"post_nms_top_n": (300, 200), "roi_samples": 128}


@pytest.fixture(scope="module", params=["torchvision", "torchvision_v2"])
def models(request):
    torch.manual_seed(3)
    theirs, changes = theirs_v1() if request.param == "torchvision" else theirs_v2()
    config = CONFIGS[request.param]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=CLASSES, **changes),
        data=dataclasses.replace(config.data, image_size=MIN_SIZE, max_size=MAX_SIZE),
    )
    ours = TorchvisionMaskRCNN(config)
    ours.model.load_state_dict(from_torchvision(scaled(theirs).state_dict()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return theirs.to(device), ours.to(device)


def in_training_mode(model):
    """With batch norm's running statistics: the batch's own would be over other rows, as ours pads its RoIs."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


@pytest.fixture(scope="module")
def images():
    """Two images of different sizes and orientations, smooth enough to have structure."""
    generator = torch.Generator().manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    coarse = [torch.rand(1, 3, *size, generator=generator) for size in ((12, 16), (18, 11))]
    return [
        torch.nn.functional.interpolate(c, scale_factor=17, mode="bicubic")[0].clamp(0, 1).to(device) for c in coarse
    ]


def objects(images) -> list[dict]:
    """Twelve boxes an image, elliptic masks, of many classes."""
    generator = torch.Generator().manual_seed(2)
    targets = []
    for image in images:
        height, width = image.shape[-2:]
        size = torch.exp(torch.rand(12, 2, generator=generator) * 1.8 + 2.8)
        corner = torch.rand(12, 2, generator=generator) * (torch.tensor([width, height]) - size).clamp(min=0)
        boxes = torch.cat([corner, corner + size], dim=1)
        y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        dx, dy = (
            ((x - center[:, None, None, 0]) / half[:, None, None, 0]),
            ((y - center[:, None, None, 1]) / half[:, None, None, 1]),
        )
        masks = (dx**2 + dy**2 <= 1).to(torch.uint8)
        labels = torch.randint(1, CLASSES, (12,), generator=generator)
        targets.append({k: v.to(image.device) for k, v in (("boxes", boxes), ("labels", labels), ("masks", masks))})
    return targets


def test_same_detections(models, images):
    theirs, ours = (m.eval() for m in models)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    labels = torch.cat([e["labels"] for e in expected])
    boxes = torch.cat([e["boxes"] for e in expected])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    print(len(labels), "detections,", len(labels.unique()), "classes, median area", areas.median().item())  # pytest -s
    assert len(labels) >= 50 and len(labels.unique()) >= 5 and areas.median() > 100
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e["labels"], f["labels"])
        torch.testing.assert_close(f["scores"], e["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(f["boxes"], e["boxes"], rtol=1e-4, atol=1e-2)
        assert ((e["masks"] > 0.5) == (f["masks"] > 0.5)).float().mean() > 0.9999
        inside = torch.cat(
            [
                m[0, int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].flatten()
                for m, (x1, y1, x2, y2) in zip(e["masks"], e["boxes"].tolist(), strict=True)
            ]
        )
        assert 0.05 < (inside > 0.5).float().mean() < 0.95


def test_same_losses_and_gradients(models, images, monkeypatch):
    theirs, ours = map(in_training_mode, models)
    # In fp32 the last bit decides on which side of a ReLU's kink a value lies: torchvision's order of operations here.
    # (That folding changes nothing is shown in double, in test_backbone.py.)
    for module in ours.modules():
        if isinstance(module, FrozenBatchNorm):
            monkeypatch.setattr(module, "folded", False)
    targets = objects(images)
    drawn = {}

    def record(name, function):
        def wrapper(*args):
            drawn[name] = function(*args)
            return drawn[name]

        return wrapper

    monkeypatch.setattr(rpn, "sample", record("anchors", rpn.sample))
    monkeypatch.setattr(ours.model.roi_sampler, "forward", record("rois", ours.model.roi_sampler.forward))
    found = ours(images, targets)
    sum(found.values()).backward()

    index, taken, positive = drawn["anchors"]
    rois = drawn["rois"]
    assert (rois.labels > 0).sum() >= 20

    def same_anchors(labels):
        masks = torch.zeros(2, len(index), len(labels[0]), dtype=torch.bool, device=index.device)
        for i, label in enumerate(labels):
            masks[0, i, index[i, positive[i]]] = True
            masks[1, i, index[i, taken[i] & ~positive[i]]] = True
            assert (label[masks[0, i]] == 1).all() and (label[masks[1, i]] == 0).all()  # torchvision labels them so too
        return list(masks[0]), list(masks[1])

    def same_rois(proposals, targets):
        boxes = [rois.boxes[i, rois.labels[i] >= 0] for i in range(2)]
        gt_boxes, gt_labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        matched, labels = theirs.roi_heads.assign_targets_to_proposals(boxes, gt_boxes, gt_labels)
        for i in range(2):  # torchvision's own matching of our RoIs
            assert torch.equal(labels[i], rois.labels[i, rois.labels[i] >= 0])
        wanted = theirs.roi_heads.box_coder.encode([g[m] for g, m in zip(gt_boxes, matched, strict=True)], boxes)
        return boxes, matched, labels, wanted

    monkeypatch.setattr(theirs.rpn, "fg_bg_sampler", same_anchors)
    monkeypatch.setattr(theirs.roi_heads, "select_training_samples", same_rois)
    expected = theirs(images, targets)
    sum(expected.values()).backward()

    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert loss > 0.01, name
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=0)
    tolerance = 1e-4 if index.is_cuda else 1e-5  # cuDNN may choose algorithms that sum in another order
    theirs_grads = from_torchvision({n: p.grad for n, p in theirs.named_parameters()})
    trained = {n: p for n, p in ours.model.named_parameters() if p.grad is not None}
    assert trained.keys() == {n for n, grad in theirs_grads.items() if grad is not None}  # the same stages are frozen
    errors = {n: (p.grad - theirs_grads[n]).norm() / theirs_grads[n].norm() for n, p in trained.items()}
    losses = {n: (abs(found[n] - loss) / loss).item() for n, loss in expected.items()}
    print("losses", {n: round(v.item(), 4) for n, v in expected.items()}, "differ by", losses)  # shown by pytest -s
    print("positive RoIs", (rois.labels > 0).sum().item(), "gradients differ by at most", max(errors.values()).item())
    for name, error in errors.items():
        assert theirs_grads[name].norm() > 0, name
        assert error <= tolerance, name


def test_names_that_torchvisions_models_do_not_have():
    # Files of old releases have other names; torchvision's own model knows them.
    with pytest.raises(ValueError, match=r"mask_fcn1.weight is not a name .* load it into torchvision's model first"):
        from_torchvision({"roi_heads.mask_head.mask_fcn1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "targets must be given"),
        ([], "1 images, but 0 targets"),
        (
            [{"boxes": torch.tensor([[10.0, 20, 30, 20]])}],
            r"positive width and height; image 0 has \[10.0, 20.0, 30.0, 20",
        ),
        ([{"boxes": torch.tensor([[30.0, 5, 20, 40]])}], "positive width and height"),  # x, y, width, height, say
        ([{"boxes": torch.tensor([[1.0, 5, float("nan"), 40]])}], "positive width and height"),
    ],
)
def test_targets_that_torchvision_refuses(targets, message):
    # Every anchor of such an image would be positive, without a word.
    model = TorchvisionMaskRCNN(CONFIGS["tiny"]).train()
    with pytest.raises(ValueError, match=message):
        model([torch.zeros(3, 64, 64)], targets)


def test_the_readmes_fused_mask_loss_is_torchvisions(monkeypatch):
    # The recipe of the README, run as it stands there, inside torchvision's own model: losses and gradients as without
    # it, given the same random numbers; detection is left alone.
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (recipe,) = [part for part in text.split("```python\n")[1:] if "def fused_loss" in part.partition("```")[0]]
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96).train()
    targets = []
    for height, width, n in ((64, 80, 2), (72, 64, 3)):
        masks = torch.zeros(n, height, width, dtype=torch.uint8)
        corners = torch.tensor([[4 + 12 * i, 6 + 10 * i, 24 + 12 * i, 30 + 10 * i] for i in range(n)])
        for mask, (x0, y0, x1, y1) in zip(masks, corners.tolist(), strict=True):
            mask[y0:y1, x0:x1] = torch.rand(y1 - y0, x1 - x0) > 0.3
        targets.append({"boxes": corners.float(), "labels": torch.arange(n) + 1, "masks": masks})
    images = [torch.rand(3, *target["masks"].shape[1:]) for target in targets]

    def step():
        torch.manual_seed(7)
        losses = model(images, targets)
        return losses, torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad])

    losses, grads = step()
    from torchvision.models.detection import roi_heads

    monkeypatch.setattr(roi_heads, "maskrcnn_loss", roi_heads.maskrcnn_loss)  # put back afterwards
    names = {"model": model, "torch": torch}
    exec("from kernels import MaskPool, mask_predictor_loss, mask_targets\n" + recipe.partition("```")[0], names)
    fused, fused_grads = step()
    assert roi_heads.maskrcnn_loss is names["fused_loss"]
    for name, loss in losses.items():
        torch.testing.assert_close(fused[name], loss, rtol=1e-5, atol=1e-6, msg=name)
    for ours, theirs in zip(fused_grads, grads, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
    assert "masks" in model.eval()(images)[0]
