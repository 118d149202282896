"""What is measured, as data, and how each of it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .ours import Options, OurStep
from .phases import PhaseClock
from .torchvision_baseline import TorchvisionStep
from .workload import Workload

BASELINE, LADDER, ABLATION, INFERENCE, LOADER, CHECK = "baseline", "ladder", "ablation", "inference", "loader", "check"
GROUPS = (BASELINE, LADDER, ABLATION, INFERENCE, LOADER, CHECK)


@dataclass(frozen=True)
class Provider:
    """One row."""

    name: str  # its own, in the record too
    group: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile has a part in it."""
        return bool(self.options.get("compiled"))

    def matches(self, words: str) -> bool:
        """Whether all of `words` are in its name or group."""
        return set(words.lower().split()) <= set(f"{self.group} {self.name}".lower().replace(",", " ").split())


EAGER = Options(
    ops="torchvision",
    layout="nchw",
    joined=False,
    compiled=False,
    device_update=False,
    graph=False,
)
RUNGS = (  # name, what it changes against the one before, why
    ("1 eager", {}, "the same mathematics as torchvision, batched, with torchvision's ops where it has them"),
    ("2 channels_last", {"layout": "channels_last"}, "tensor cores read channels last; no turning around in between"),
    ("3 Triton ops", {"ops": "auto"}, "each detection op in few launches, nothing materialised, nothing that waits"),
    (
        "4 layers folded and joined",
        {"joined": True},
        "frozen norms ride in the convolutions; predictors of 3, 12, 91 and 364 channels become one of a multiple of 8",
    ),
    ("5 torch.compile", {"compiled": True}, "pointwise work fused, as one graph without a break"),
    (
        "6 device-side update",
        {"device_update": True},
        "schedule and skipped steps on the device: mrcnn.step.TrainingStep, which training uses",
    ),
    ("7 one CUDA graph", {"graph": True}, "the host launches once a step"),
    (
        "8 ReLUs in the convolutions",
        {"fused": True},
        "cuDNN adds bias and residual and applies the ReLU before it writes: train.fused_convs, off by default",
    ),
)
TOP = "7 one CUDA graph"  # what everything else is compared with: of options that are no trial
ABLATED = (  # of kernels.backend.OPS: those of the training step
    *("roi_align", "label_anchors", "rpn_loss", "stable_topk", "decode_proposals", "nms"),
    *("mask_targets", "mask_predictor_loss"),
)


def baselines(on_gpu: bool) -> list[Provider]:
    """torchvision's step: the eager ones first, as they are quick to make."""
    dtypes = ("fp16", "bf16") if on_gpu else ("fp32",)
    found = []
    for compiled in (False, True):
        for layout in ("channels_last", "nchw"):
            for dtype in dtypes:
                name = f"torchvision {layout} {dtype} {'torch.compile' if compiled else 'eager'}"
                options = {"layout": layout, "dtype": dtype, "compiled": compiled}
                why = "GradScaler" if dtype == "fp16" else "autocast" if dtype == "bf16" else "as it is"
                found.append(Provider(name, BASELINE, why, options))
    return found


def ladder() -> list[Provider]:
    """Ours, rung by rung: each changes one thing."""
    options, found = EAGER, []
    for name, changes, why in RUNGS:
        options = replace(options, **changes)
        found.append(Provider(name, LADDER, why, vars(options)))
    return found


def top() -> Provider:
    """The rung that stands for this project."""
    return next(rung for rung in ladder() if rung.name == TOP)


def ablation() -> list[Provider]:
    """Rung 7 with every op, and with one op after the other, replaced by its PyTorch reference."""
    best = Options()
    everything = [("all reference", replace(best, ops="torch"), "no Triton kernel of ours")]
    single = [
        (f"reference {op}", replace(best, reference=(op,)), f"all ops in Triton but {op}: what it is worth")
        for op in ABLATED
    ]
    return [Provider(name, ABLATION, why, vars(options)) for name, options, why in [*everything, *single]]


def inference(on_gpu: bool, sizes: tuple[int, int]) -> list[Provider]:
    """Latency of one image and throughput of some: torchvision's candidates, then ours."""
    found = []
    for images in sizes:
        for layout in ("channels_last", "nchw"):
            for dtype in ("fp16", "bf16") if on_gpu else ("fp32",):
                name = f"torchvision {layout} {dtype} batch {images}"
                options = {"images": images, "layout": layout, "dtype": dtype}
                found.append(Provider(name, INFERENCE, "eager", options))
        for how, why in (
            ("captured", "one CUDA graph, masks pasted in it"),
            ("compiled", "torch.compile"),
            ("eager", "as it is"),
        ):
            found.append(Provider(f"ours {how} batch {images}", INFERENCE, why, {"images": images, "how": how}))
    return found


def loader() -> list[Provider]:
    """With JPEG files."""
    return [
        Provider("loader alone", LOADER, "workers decode, resize, augment, pack; batches copied to the device"),
        Provider("step and loader", LOADER, "rung 7 of the ladder on what the loader brings"),
    ]


def check() -> list[Provider]:
    """Whether the captured step computes what the step without a graph does."""
    return [Provider("captured against not captured", CHECK, "100 steps, losses and weights compared bit for bit")]


def all_providers(on_gpu: bool, sizes: tuple[int, int]) -> Iterator[Provider]:
    """In the order of the report."""
    yield from [*baselines(on_gpu), *ladder(), *ablation(), *inference(on_gpu, sizes), *loader(), *check()]


def in_order_of_value(providers: list[Provider]) -> list[Provider]:
    """What to measure first: the eager baselines, ours at its best, the other baselines, then the rest."""

    def place(provider: Provider) -> int:
        if provider.group == BASELINE:
            return 2 if provider.compiles else 0
        if provider.name == TOP:
            return 1
        return 3 + (LADDER, CHECK, INFERENCE, ABLATION, LOADER).index(provider.group)

    rungs = {rung.name: -number for number, rung in enumerate(ladder())}
    return sorted(providers, key=lambda p: (place(p), rungs.get(p.name, 0)))


def make_step(
    provider: Provider, workload: Workload, clock: PhaseClock, on_note: Callable[[str], None]
) -> TorchvisionStep | OurStep:
    """The training step of a baseline, a rung or an arm of the ablation."""
    if provider.group == BASELINE:
        return TorchvisionStep(workload, clock, **provider.options)
    options = Options(**provider.options)
    if workload.device.type != "cuda" and options.ops == "auto":
        options = replace(options, ops="torch")
    return OurStep(workload, clock, options, on_note)
