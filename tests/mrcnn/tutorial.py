"""The five classes of the Mask R-CNN tutorial that the configuration `tutorial` is, written from their description.

With what is wrong with them: see `reports/tutorial/README.md`.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from mrcnn.modeling import MaskRCNN


class Backbone(nn.Module):
    """ResNet-50 up to its last stage."""

    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet50(weights=None)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, x):
        c2 = self.layer1(self.stem(x))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c2, c3, c4, self.layer4(c4)


class FPN(nn.Module):
    """Three smoothing convolutions for four levels: two are used, on P4 and P3."""

    def __init__(self, channels=256):
        super().__init__()
        self.lateral2, self.lateral3, self.lateral4, self.lateral5 = (
            nn.Conv2d(c, channels, 1) for c in (256, 512, 1024, 2048)
        )
        self.smooth1, self.smooth2, self.smooth3 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, c2, c3, c4, c5):
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4) + F.interpolate(p5, scale_factor=2, mode="nearest")
        p3 = self.lateral3(c3) + F.interpolate(p4, scale_factor=2, mode="nearest")
        p2 = self.lateral2(c2) + F.interpolate(p3, scale_factor=2, mode="nearest")
        return p2, self.smooth1(p3), self.smooth2(p4), p5


class RPNHead(nn.Module):
    """Two logits (background, object) and four deltas for each of nine anchors."""

    def __init__(self, channels=256, anchors=9):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls = nn.Conv2d(channels, anchors * 2, 1)
        self.reg = nn.Conv2d(channels, anchors * 4, 1)

    def forward(self, feature):
        x = F.relu(self.conv(feature))
        scores = self.cls(x).permute(0, 2, 3, 1).reshape(len(x), -1, 2).softmax(dim=-1)
        return scores, self.reg(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)


class BoxHead(nn.Module):
    """Two fully connected layers."""

    def __init__(self, channels=256, size=7, classes=81):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels * size * size, 1024), nn.Linear(1024, 1024)
        self.cls, self.reg = nn.Linear(1024, classes), nn.Linear(1024, classes * 4)

    def forward(self, x):
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        return self.cls(x), self.reg(x)


class MaskHead(nn.Module):
    """Four convolutions, a deconvolution, a mask a class."""

    def __init__(self, channels=256, classes=81):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.mask = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.mask(F.relu(self.deconv(x)))


class Tutorial(nn.Module):
    """All five."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fpn, self.rpn, self.box, self.mask = Backbone(), FPN(), RPNHead(), BoxHead(), MaskHead()


@torch.no_grad()
def copy_weights(tutorial: Tutorial, model: MaskRCNN) -> None:
    """Give `model` the tutorial's weights; a level that is not smoothed gets a convolution that changes nothing."""
    model.backbone.stem.load_state_dict(tutorial.backbone.stem.state_dict())
    for i, stage in enumerate(model.backbone.stages, 1):
        stage.load_state_dict(getattr(tutorial.backbone, f"layer{i}").state_dict())
    laterals = [getattr(tutorial.fpn, f"lateral{i}") for i in (2, 3, 4, 5)]
    for ours, theirs in zip(model.fpn.lateral, laterals, strict=True):
        ours[0].load_state_dict(theirs.state_dict())
    for ours, theirs in zip(model.fpn.output, (None, tutorial.fpn.smooth1, tutorial.fpn.smooth2, None), strict=True):
        if theirs is None:
            nn.init.dirac_(ours[0].weight)
            nn.init.zeros_(ours[0].bias)
        else:
            ours[0].load_state_dict(theirs.state_dict())
    pairs = [
        (model.rpn.convs[0][0], tutorial.rpn.conv),
        (model.rpn.objectness, tutorial.rpn.cls),
        (model.rpn.deltas, tutorial.rpn.reg),
        (model.box_head.fcs[0], tutorial.box.fc1),
        (model.box_head.fcs[1], tutorial.box.fc2),
        (model.box_head.classes, tutorial.box.cls),
        (model.box_head.deltas, tutorial.box.reg),
        (model.mask_head.deconv, tutorial.mask.deconv),
        (model.mask_head.logits, tutorial.mask.mask),
        *((ours[0], theirs) for ours, theirs in zip(model.mask_head.convs, tutorial.mask.convs, strict=True)),
    ]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
