"""The one table of named workloads that every suite, study and report uses.

| suite | what it stands for |
| --- | --- |
| train | a training step of Mask R-CNN: 16 images of 800 x 1344, 512 box and 128 mask RoIs an image, 256 channels |
| inference | one image, forward only |
| small | too little work to fill a GPU: what a call costs at least |
| adversarial | what breaks implementations: everything on one spot, RoIs as large as the map, 1000 objects |
| sweep | `train` with one size changed, for scaling curves; half precision only |
| cpu | milliseconds on two cores, so that the harness itself can be run, and tested, anywhere |
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from . import mask_inputs, rpn_inputs
from .inputs import BUILDERS, Draw, Inputs, Sizes

__all__ = [
    "DIRECTIONS",
    "MASK_OPS",
    "OPS",
    "ROI_OPS",
    "RPN_OPS",
    "SUITES",
    "WORKLOADS",
    "Call",
    "Inputs",
    "Sizes",
    "Workload",
    "calls",
]

OPS = (
    "multiscale_roi_align",
    "joint_multiscale_roi_align",
    "roi_align",
    "label_grid_anchors",
    "label_anchors",
    "box_iou",
    "rpn_loss",
    "stable_topk",
    "decode_proposals",
    "nms_mask",
    "mask_predictor_loss",
    "mask_targets",
    "paste_masks",
    "mask_bce_loss",
)
ROI_OPS, RPN_OPS, MASK_OPS = OPS[:3], OPS[3:-4], OPS[-4:]
DIFFERENTIABLE = (*ROI_OPS, "box_iou", "rpn_loss", "mask_predictor_loss", "mask_bce_loss")
FP32_OPS = (  # of boxes alone, or of masks that a model has as float32
    "label_grid_anchors", "label_anchors", "box_iou", "nms_mask", "mask_targets", "paste_masks"
)  # fmt: skip
DETERMINISTIC = "one-image"  # the workload that torchvision's deterministic RoIAlign has memory for
DIRECTIONS = {op: ("forward", "backward") if op in DIFFERENTIABLE else ("forward",) for op in OPS}
SUITES = ("train", "inference", "small", "adversarial", "sweep", "cpu")  # most valuable first
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FAMILIES = {"roi_align": ROI_OPS, "rpn": RPN_OPS, "mask": MASK_OPS}  # word -> the ops that it selects
_BUILDERS = BUILDERS | rpn_inputs.BUILDERS | mask_inputs.BUILDERS


@dataclass(frozen=True)
class Workload:
    """A name for one set of sizes of one op."""

    op: str
    name: str
    suite: str
    sizes: Sizes
    sweep: str = ""  # the field of `sizes` that differs from the `train` workload, or else from the `inference` one

    @property
    def directions(self) -> tuple[str, ...]:
        """The passes that are measured: inference has no backward pass."""
        return ("forward",) if self.suite == "inference" else DIRECTIONS[self.op]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Boxes are always float32; features and logits come in bf16 too, on a GPU."""
        if self.suite == "cpu" or self.op in FP32_OPS or self.name == DETERMINISTIC:
            return (torch.float32,)
        return (torch.bfloat16, torch.float32) if self.suite in ("train", "small") else (torch.bfloat16,)

    @property
    def seed(self) -> int:
        """From the name: every workload has its own random numbers."""
        return zlib.crc32(f"{self.op}/{self.name}".encode())

    def build(
        self, device: str, dtype: torch.dtype, layout: str = "nchw", grad: bool = False, fresh: int = 0
    ) -> Inputs:
        """Draw the inputs: the same values for the same workload and device, in any dtype and layout.

        Another `fresh` draws other values of the same shapes (and the same number of objects in each image).
        """
        inputs = _BUILDERS[self.op](self.sizes, Draw.seeded(self.seed, fresh, device), dtype, layout)
        for leaf in inputs.leaves:
            leaf.requires_grad_(grad)
        return inputs

    def boxes_only(self, dtype: torch.dtype) -> Inputs:
        """The inputs on the CPU, with features and logits as shapes only (`meta` tensors)."""
        return _BUILDERS[self.op](self.sizes, Draw.boxes_only(self.seed), dtype, "nchw")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the sizes, boxes, counts and labels: results of different inputs are not to be compared."""
        inputs = self.boxes_only(torch.float32)
        digest = hashlib.sha256(repr((inputs.shapes(), inputs.numbers())).encode())
        if self.op in mask_inputs.OPTIONS:
            digest.update(repr(mask_inputs.OPTIONS[self.op]).encode())
        for tensor in inputs.tensors():
            if not tensor.is_meta:
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Call:
    """One line of the study: a workload, a direction and the dtype asked for, to be measured with every provider."""

    workload: Workload
    direction: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """`fp32`, `bf16`."""
        return DTYPE_NAMES[self.dtype]

    @property
    def words(self) -> set[str]:
        """What selects it: the words of its name, its suite, and those of `FAMILIES`."""
        families = [word for word, ops in FAMILIES.items() if self.workload.op in ops]
        return {*self.key, self.workload.suite, *families}

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names it in results: op, direction, workload, dtype."""
        return self.workload.op, self.direction, self.workload.name, self.dtype_name

    def __str__(self) -> str:
        return f"{self.workload.op} {self.direction} {self.workload.name} {self.dtype_name}"


def calls(device: str) -> Iterator[Call]:
    """Every call for this kind of device, the most valuable ones first."""
    for suite in SUITES:
        if (suite == "cpu") != (device == "cpu"):
            continue
        chosen = [w for w in WORKLOADS if w.suite == suite]
        for half in (True, False):  # what trains comes first
            for workload in chosen:
                dtypes = [d for d in workload.dtypes if (d == workload.dtypes[0]) == half]
                yield from (Call(workload, d, dtype) for dtype in dtypes for d in workload.directions)


_FULL, _SMALL = (800, 1344), (512, 672)
_BOX = Sizes(16, _FULL, rois=512)
_MASK = Sizes(16, _FULL, rois=128, output_size=14)
_JOINT = replace(_BOX, mask_rois=128)  # what a training step pools, box head and mask head together
_ANCHORS = Sizes(16, _FULL, ragged=True)  # 268,569 anchors
_TOP = Sizes(16, _FULL, rois=2000)  # of each level of an image
_LOSS = Sizes(0, _FULL, masks=2048)  # 128 of each of 16 images
_TARGETS = Sizes(16, _FULL, rois=128, ragged=True)
_PASTED = Sizes(1, (800, 1333), masks=100)


def _multiscale_roi_align() -> Iterator[Workload]:
    workload = functools.partial(Workload, "multiscale_roi_align")
    yield workload("train-box", "train", _BOX)
    yield workload("train-mask", "train", _MASK)
    yield workload("inference-box", "inference", replace(_BOX, images=1, rois=1000))
    yield workload("inference-mask", "inference", replace(_MASK, images=1, rois=100))
    yield workload("small", "small", replace(_BOX, images=1, rois=8))
    yield workload("one-spot", "adversarial", replace(_BOX, boxes="one_spot"))
    yield workload("whole-map", "adversarial", replace(_BOX, boxes="whole_map"))
    yield workload("adaptive", "adversarial", replace(_BOX, sampling_ratio=0))
    for rois in (8, 32, 128, 2048):
        yield workload(f"rois-{rois}", "sweep", replace(_BOX, rois=rois), "rois")
    for channels in (64, 128, 512):
        yield workload(f"channels-{channels}", "sweep", replace(_BOX, channels=channels), "channels")
    for height, width in ((400, 672), (600, 1008), (1200, 2016)):
        sizes = replace(_BOX, image_size=(height, width))
        yield workload(f"image-{height}x{width}", "sweep", sizes, "image_size")
    for side in (32, 64, 128, 256, 512):  # pixels
        yield workload(f"roi-size-{side}", "sweep", replace(_BOX, boxes="uniform", roi_size=side), "roi_size")


def _labels() -> Iterator[Workload]:
    for op in ("label_grid_anchors", "label_anchors"):
        yield Workload(op, "train", "train", _ANCHORS)
        yield Workload(op, "small", "small", replace(_ANCHORS, images=1, objects=8, ragged=False))
    for objects in (1, 10, 100, 300):
        sizes = replace(_ANCHORS, objects=objects)
        yield Workload("label_grid_anchors", f"objects-{objects}", "sweep", sizes, "objects")
    for height, width in ((400, 672), (600, 1008), (1200, 2016)):  # anchors grow with the image
        sizes = replace(_ANCHORS, image_size=(height, width))
        yield Workload("label_grid_anchors", f"image-{height}x{width}", "sweep", sizes, "image_size")
    crowded = replace(_ANCHORS, objects=1000, ragged=False)
    yield Workload("label_grid_anchors", "objects-1000", "adversarial", crowded, "objects")
    yield Workload("label_anchors", "objects-1000", "adversarial", crowded)


def _boxes() -> Iterator[Workload]:
    yield Workload("box_iou", "train", "train", replace(_BOX, rois=2000))  # proposals x objects, a batch
    anchors = Sizes(1, _FULL, rois=268_569, objects=100)  # as many boxes as there are anchors
    yield Workload("box_iou", "anchors", "train", anchors)
    yield Workload("box_iou", "small", "small", Sizes(1, _FULL, rois=8, objects=8))
    yield Workload("box_iou", "objects-1000", "adversarial", replace(_BOX, rois=2000, objects=1000))
    for objects in (10, 100, 300):
        sizes = replace(_BOX, rois=2000, objects=objects)
        yield Workload("box_iou", f"objects-{objects}", "sweep", sizes, "objects")


def _proposals() -> Iterator[Workload]:
    yield Workload("rpn_loss", "train", "train", _ANCHORS)
    yield Workload("rpn_loss", "small", "small", replace(_ANCHORS, images=1, objects=8, ragged=False))
    for op in ("stable_topk", "decode_proposals", "nms_mask"):
        yield Workload(op, "train", "train", _TOP)
        yield Workload(op, "inference", "inference", replace(_TOP, images=1, rois=1000))
        yield Workload(op, "small", "small", replace(_TOP, images=1, rois=100))
    yield Workload("nms_mask", "one-group", "adversarial", replace(_TOP, images=1, levels=1, rois=8000))
    for boxes in (250, 1000, 4000):  # of each group
        yield Workload("nms_mask", f"boxes-{boxes}", "sweep", replace(_TOP, rois=boxes), "rois")


def _mask_losses() -> Iterator[Workload]:
    for op in ("mask_predictor_loss", "mask_bce_loss"):
        yield Workload(op, "train", "train", _LOSS)
        yield Workload(op, "small", "small", replace(_LOSS, masks=8))
        for masks in (16, 128, 512):
            yield Workload(op, f"positives-{masks}", "sweep", replace(_LOSS, masks=masks), "masks")
    for classes in (2, 21, 366, 1204):  # one class: all RoIs add to the same gradient
        sizes = replace(_LOSS, classes=classes)
        yield Workload("mask_predictor_loss", f"classes-{classes}", "sweep", sizes, "classes")


def _masks() -> Iterator[Workload]:
    yield Workload("mask_targets", "train", "train", _TARGETS)
    yield Workload("mask_targets", "small", "small", replace(_TARGETS, images=1, rois=8, objects=8, ragged=False))
    for objects in (10, 100, 300):
        yield Workload("mask_targets", f"objects-{objects}", "sweep", replace(_TARGETS, objects=objects), "objects")
    yield Workload("paste_masks", "inference", "inference", _PASTED)
    yield Workload("paste_masks", "small", "small", Sizes(1, _SMALL, masks=8))
    for masks in (10, 300):
        yield Workload("paste_masks", f"masks-{masks}", "sweep", replace(_PASTED, masks=masks), "masks")
    for height, width in ((400, 667), (1200, 2000)):
        sizes = replace(_PASTED, image_size=(height, width))
        yield Workload("paste_masks", f"image-{height}x{width}", "sweep", sizes, "image_size")


def _cpu() -> Iterator[Workload]:
    for op in ("multiscale_roi_align", "roi_align"):
        yield Workload(op, "cpu", "cpu", Sizes(2, _SMALL, rois=24, channels=8))
        yield Workload(op, "cpu-uniform", "cpu", Sizes(2, _SMALL, rois=24, channels=8, boxes="uniform"))
    joint = Sizes(2, _SMALL, rois=24, mask_rois=8, channels=8)
    yield Workload("joint_multiscale_roi_align", "cpu", "cpu", joint)
    few = Sizes(2, (256, 320), objects=8, ragged=True, rois=200, slots=64)
    for op in ("label_grid_anchors", "label_anchors", "rpn_loss", "stable_topk", "decode_proposals", "nms_mask"):
        yield Workload(op, "cpu", "cpu", few)
    yield Workload("box_iou", "cpu", "cpu", Sizes(2, _SMALL, rois=500, objects=20))
    yield Workload("mask_bce_loss", "cpu", "cpu", Sizes(0, _SMALL, masks=32))
    yield Workload("mask_predictor_loss", "cpu", "cpu", Sizes(0, _SMALL, masks=32, channels=64))
    yield Workload("mask_targets", "cpu", "cpu", replace(few, rois=32))
    yield Workload("paste_masks", "cpu", "cpu", Sizes(1, (256, 320), masks=10))


WORKLOADS = (
    *_multiscale_roi_align(),
    Workload("joint_multiscale_roi_align", "train", "train", _JOINT),
    Workload("joint_multiscale_roi_align", "small", "small", replace(_JOINT, images=1, rois=8, mask_rois=2)),
    *_labels(),
    *_boxes(),
    *_proposals(),
    *_mask_losses(),
    *_masks(),
    Workload("roi_align", "train", "train", _BOX),  # the drop-in: one map, at stride 16
    Workload("multiscale_roi_align", "train-box-uniform", "train", replace(_BOX, boxes="uniform")),
    Workload("multiscale_roi_align", "train-mask-uniform", "train", replace(_MASK, boxes="uniform")),
    Workload("joint_multiscale_roi_align", "train-uniform", "train", replace(_JOINT, boxes="uniform")),
    Workload("roi_align", "small", "small", replace(_BOX, images=1, rois=8)),
    Workload("roi_align", "adaptive", "adversarial", replace(_BOX, sampling_ratio=0)),  # torchvision's default
    Workload("roi_align", DETERMINISTIC, "adversarial", replace(_BOX, images=1, rois=64)),
    *_cpu(),
)
