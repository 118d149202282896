"""Our inference: uint8 images on the device to boxes, labels, scores and bool masks at the images' original size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import paste_masks
from mrcnn.graphs import GraphedCalls
from mrcnn.inference import autocast
from mrcnn.structures import Batch

from .ours import build_ours
from .workload import Workload


class OurInference:
    """`how` is eager, compiled or captured; the host waits for the numbers of detections, once a call."""

    def __init__(self, workload: Workload, images: int, how: str, on_note: Callable[[str], None]) -> None:
        batch = workload.batch
        self.batch = Batch(
            batch.images[:images], batch.sizes[:images], batch.image_ids[:images], [workload.setting.size] * images
        )
        on_gpu = workload.device.type == "cuda"
        self.model = build_ours(workload, "channels_last" if on_gpu else "nchw", detecting=True).eval()
        self.how, self.forward = how, self.model
        if how != "eager":
            backend = "inductor" if on_gpu else "aot_eager"
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False, backend=backend)
        self.graphs = GraphedCalls(self.paste, on_note=on_note) if how == "captured" else None
        self.run = self.graphs or self.paste

    @property
    def mode(self) -> str:
        """eager, compiled or captured: what it came to."""
        if self.graphs is not None and self.graphs.captured:
            return "captured"
        return "eager" if self.how == "eager" else "compiled"

    @torch.no_grad()
    def paste(self, batch: Batch) -> tuple:
        """Detections of all slots with their masks at the original size: fixed shapes, so that a graph can hold it.

        The images were not resized: boxes are at the original size already.
        """
        with autocast(batch.images.device):
            found = self.forward(batch.images, batch.sizes)
        sizes = batch.original_sizes
        masks = [paste_masks(m, b, size, 0.5) for m, b, size in zip(found.masks, found.boxes, sizes, strict=True)]
        return found.boxes, found.labels, found.scores, found.count, masks

    @torch.no_grad()
    def __call__(self) -> list[dict[str, Tensor]]:
        """boxes, labels, scores and masks of each image."""
        boxes, labels, scores, count, masks = self.run(self.batch)
        fields = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}
        return [{name: field[i][:n] for name, field in fields.items()} for i, n in enumerate(count.tolist())]
