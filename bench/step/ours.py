"""This project's training step, from a plain one to `mrcnn.step.TrainingStep`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from kernels import use_backend
from mrcnn.inference import autocast
from mrcnn.modeling import MaskRCNN
from mrcnn.modeling.backbone import FrozenBatchNorm
from mrcnn.modeling.fused_conv import can_fuse, fuse_relus
from mrcnn.modeling.torchvision_model import from_torchvision
from mrcnn.optim import build_optimizer
from mrcnn.structures import Batch

from .torchvision_baseline import Phase
from .workload import Workload, keep_computed


@dataclasses.dataclass(frozen=True)
class Options:
    """What distinguishes the rungs of the ladder, and the arms of the ablation."""

    ops: str = "auto"  # backend of the detection ops
    reference: tuple[str, ...] = ()  # ops, of kernels.backend.OPS, that take the PyTorch reference instead
    layout: str = "channels_last"
    joined: bool = True  # frozen norms folded into the convolutions, predictors' layers joined and padded
    compiled: bool = True
    device_update: bool = True  # TrainingStep's; else as a training loop is usually written
    graph: bool = True
    fused: bool = False  # bias, residual and ReLU in the convolutions' own pass: cuDNN's, where it can


class GivenProposals(nn.Module):
    """In the place of the model's proposals: computes them, and gives others in training; see `keep_computed`."""

    def __init__(self, computed: nn.Module, boxes: Tensor, use_computed: Tensor) -> None:
        super().__init__()
        self.computed = computed
        self.register_buffer("boxes", boxes, persistent=False)
        self.register_buffer("valid", torch.ones_like(boxes[..., 0], dtype=torch.bool), persistent=False)
        self.register_buffer("use_computed", use_computed, persistent=False)

    def forward(self, *arguments: object, training: bool, **named: object) -> tuple[Tensor, Tensor]:
        """Boxes [B, N, 4] and valid [B, N]."""
        boxes, valid = self.computed(*arguments, training=training, **named)
        if not training:
            return boxes, valid
        return keep_computed(self.boxes, boxes, self.use_computed), self.valid | (self.use_computed & valid.all())


class Apart(nn.Module):
    """In the place of `Joined`: each layer by itself, as torchvision runs them."""

    def forward(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """What each layer makes of x."""
        return [layer(x) for layer in layers]


def take_apart(model: MaskRCNN) -> None:
    """Undo what the model does for speed in its layers: frozen norms by themselves, every predictor by itself."""
    for module in list(model.modules()):
        if isinstance(module, FrozenBatchNorm):
            module.folded = False
        if hasattr(module, "joined"):
            module.joined = Apart()


def build_ours(workload: Workload, layout: str, joined: bool = True, detecting: bool = False) -> MaskRCNN:
    """The model with the workload's weights."""
    model = MaskRCNN(workload.config.model)
    model.load_state_dict(from_torchvision(workload.state | (workload.detecting if detecting else {})))
    model = model.to(workload.device)
    if not joined:
        take_apart(model)
    return model.to(memory_format=torch.channels_last) if layout == "channels_last" else model


@contextlib.contextmanager
def chosen_ops(options: Options) -> Iterator[None]:
    """The backends that the options name."""
    with contextlib.ExitStack() as stack:
        if options.ops != "auto":
            stack.enter_context(use_backend(options.ops))
        if options.reference:
            stack.enter_context(use_backend("torch", only=options.reference))
        yield


class OurStep:
    """One optimizer step a call, as the options say."""

    def __init__(
        self,
        workload: Workload,
        phase: Phase,
        options: Options,
        on_note: Callable[[str], None] = lambda note: None,
        given: bool = True,
    ) -> None:
        self.workload, self.phase, self.options = workload, phase, options
        self.model = build_ours(workload, options.layout, options.joined).train()
        if options.fused:
            reason = can_fuse(workload.device)
            on_note(f"not fused: {reason}" if reason else f"{fuse_relus(self.model)} convolutions with their ReLU")
        if given:  # the workload's proposals, which fit its batch alone
            self.model.proposals = GivenProposals(self.model.proposals, workload.proposals, workload.use_computed)
        self.step = self._device_step(on_note) if options.device_update else self._plain_step()

    @property
    def mode(self) -> str:
        """eager, compiled or captured: what it came to, which may be less than what was asked for."""
        return getattr(self.step, "mode", "compiled" if self.options.compiled else "eager")

    def __call__(self) -> dict[str, Tensor]:
        """On the workload's batch: the losses, detached, on the device."""
        return self.on(self.workload.batch)

    def on(self, batch: Batch) -> dict[str, Tensor]:
        """On a batch."""
        with chosen_ops(self.options):
            return self.step(batch)

    def _device_step(self, on_note: Callable[[str], None]) -> Callable:
        from mrcnn.step import TrainingStep

        on_gpu = self.workload.device.type == "cuda"  # on a CPU compilation takes minutes, and there are no graphs
        options = {"compile": self.options.compiled and on_gpu, "cuda_graphs": self.options.graph and on_gpu}
        train = dataclasses.replace(self.workload.config.train, **options)
        return TrainingStep(self.model, train, on_note=on_note, phase=self.phase)

    def _plain_step(self) -> Callable:
        """As a training loop is usually written."""
        forward, train = self.model, self.workload.config.train
        optimizer = build_optimizer(self.model, train)
        if self.options.compiled:
            backend = "inductor" if self.workload.device.type == "cuda" else "aot_eager"
            forward = torch.compile(self.model, fullgraph=True, dynamic=False, backend=backend)

        def step(batch: Batch) -> dict[str, Tensor]:
            with self.phase("forward"), autocast(self.workload.device):
                losses = forward(batch.images, batch.sizes, batch.targets)
                total = sum(losses.values())
            with self.phase("backward"):
                optimizer.zero_grad(set_to_none=True)
                total.backward()
            with self.phase("update"):
                optimizer.step()
            return {name: loss.detach() for name, loss in losses.items()}

        return step

    @torch.no_grad()
    def counts(self) -> dict[str, int]:
        """What a forward works on; not compiled."""
        batch = self.workload.batch
        with chosen_ops(self.options), autocast(self.workload.device):
            return count_rows(self.model, lambda: self.model(batch.images, batch.sizes, batch.targets))


def count_rows(model: MaskRCNN, run: Callable[[], object]) -> dict[str, int]:
    """As `torchvision_baseline.count_rows`; the mask head also works on empty slots, which are counted with it."""
    counts: Counter[str] = Counter()
    sample = model.rpn_loss.sample

    def watched(*arguments: object, **named: object) -> tuple[Tensor, Tensor, Tensor]:
        index, drawn, positive = sample(*arguments, **named)
        counts.update(anchors=int(drawn.sum()), anchors_positive=int((positive & drawn).sum()))
        return index, drawn, positive

    def count_rois(module: nn.Module, inputs: tuple, rois: object) -> None:
        counts.update(rois=int((rois.labels >= 0).sum()), rois_positive=int((rois.labels > 0).sum()))

    hooks = [
        model.roi_sampler.register_forward_hook(count_rois),
        model.mask_head.register_forward_hook(lambda module, inputs, out: counts.update(mask_rois=len(out))),
    ]
    model.rpn_loss.sample = watched
    try:
        run()
    finally:
        del model.rpn_loss.sample
        for hook in hooks:
            hook.remove()
    return dict(counts)
