"""What a training step, or a detection, should take on an H200: predicted layer by layer from counts, never measured.

The model runs on tensors without values, as `mrcnn summary` runs it; `roofline_trace` takes down every operator,
`roofline_fusion` joins them to kernels in three ways, and a kernel takes

    max(FLOPs / (rate x efficiency), bytes / bandwidth) + overhead.

What is assumed stands in `ASSUMPTIONS`, and so in every report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import HAS_TRITON, use_backend
from kernels.runtime import record_launches
from mrcnn.config import Config, TrainConfig
from mrcnn.errors import ConfigError
from mrcnn.modeling import MaskRCNN
from mrcnn.summary.trace import _targets as empty_targets

from .predict import DRAM_BYTES_PER_S
from .roofline_fusion import FUSIONS, Kernel, make_kernels
from .roofline_ops import OwnTime
from .roofline_trace import OWN, PRODUCT, Trace, trace_ops

FEW = 4  # kernels over lists of tensors, which take some hundreds each
STRIDE = 32  # batches are padded to multiples of it
COMPUTE, BYTES, OVERHEAD, COUNTED = "compute", "bytes", "overhead", "machine code"
INPUT, STEM, FPN, RPN, BOX, MASK, REST, OURS, UPDATE = (
    "input", "stem", "FPN", "RPN", "box head", "mask head", "sampling, losses", "our ops", "optimizer"
)  # fmt: skip
STAGES = (INPUT, STEM, "C2", "C3", "C4", "C5", FPN, RPN, BOX, MASK, REST, OURS, UPDATE)
_STAGE_OF = {
    "normalize": INPUT, "backbone.stem": STEM, **{f"backbone.stages.{i}": f"C{i + 2}" for i in range(4)},
    "fpn": FPN, "rpn": RPN, "box_head": BOX, "mask_head": MASK,
}  # fmt: skip

ASSUMPTIONS = (
    "Products in bf16 run at {matrix:.0f} TFLOP/s, taken as the rate of large ones on an H200, times an "
    "efficiency. "
    "What convolutions reach of it is not known: every total is given for several, and all products have the same. "
    "Products in fp32 get {fp32_matrix:.0f} TFLOP/s at any efficiency.",
    "Bytes move at {dram:.1f} TB/s, taken as the rate of a copy (a study measures both rates). A kernel moves each of "
    "its tensors once, which is optimistic, and finds nothing in L2 of the kernel before it, which is pessimistic.",
    "A kernel costs {kernel:.1f} us in a CUDA graph beside its own time. Nothing runs beside anything else.",
    "Activations, and the weights that products read, are bf16, chosen as autocast's lists for a CPU choose. Weights "
    "are kept in fp32 and cast once a step; their gradients leave the products in bf16 and are cast to fp32, in a pass "
    "of their own unless fused.",
    "Maps are channels_last. A frozen layer has no backward, and none goes where nothing before it is trained.",
    "SGD reads parameter, gradient and momentum and writes parameter and momentum, all in fp32; AdamW has two moments. "
    "The norm of the gradients reads them all, and clipping, if on, writes them again.",
    "Batches come over PCIe at {pcie:.0f} GB/s while the step before runs, which is in no total; the copy on the GPU, "
    "to where the graph reads them, is. How many bytes the objects' bitmaps have is not known: not counted.",
    "180 images/s are what NVIDIA's hand-written MLPerf v3.0 code reached on an H100, in fp16 and with real data: "
    "context, not a baseline. The efficiencies below 1 are the 550 and 450 TFLOP/s that a step on paper took.",
    "Every positive slot holds an object. Sums, top-k, pooling and the like take as long as their bytes.",
    "Bytes kept for the backward are those that autograd keeps; a compiler may compute some of them again instead. "
    "Weights, gradients, moments and scratch memory are not among them.",
)


@dataclass(frozen=True)
class Rates:
    """What is assumed of the machine."""

    matrix: float = 790e12  # FLOP/s of bf16 products
    efficiencies: tuple[float, ...] = (1.0, 0.7, 0.57)  # of them that convolutions reach: each gives a total
    fp32_matrix: float = 60e12  # FLOP/s of products in fp32, at any efficiency
    dram: float = DRAM_BYTES_PER_S
    kernel_s: float = 2e-6
    pcie: float = 55e9  # bytes/s from the host
    target: float = 180.0  # images/s that a step is held against

    @property
    def assumptions(self) -> list[str]:
        """`ASSUMPTIONS` with these numbers."""
        numbers = {"matrix": self.matrix / 1e12, "fp32_matrix": self.fp32_matrix / 1e12, "dram": self.dram / 1e12,
                   "kernel": self.kernel_s * 1e6, "pcie": self.pcie / 1e9}  # fmt: skip
        return [text.format(**numbers) for text in ASSUMPTIONS]


@dataclass
class Row:
    """The kernels of one layer, pass and kind."""

    layer: str
    stage: str
    part: str  # forward, backward, backward-data, backward-weight
    kind: str
    kernels: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # one an efficiency
    bounds: list[dict[str, float]] = field(default_factory=list)  # seconds by what bounds them
    odd_channels: list[int] = field(default_factory=list)  # no multiple of 8
    operators: list[str] = field(default_factory=list)


@dataclass
class Way:
    """A step with its pointwise operators run in one of the three ways."""

    rows: list[Row]

    @property
    def kernels(self) -> int:
        """Launched in a step."""
        return sum(row.kernels for row in self.rows)

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all kernels."""
        return sum(row.bytes for row in self.rows)

    def seconds(self, place: int, stage: str | None = None) -> float:
        """Of the step, or a stage, at the efficiency at that place."""
        return sum(row.seconds[place] for row in self.rows if stage in (None, row.stage))

    def bounds(self, place: int) -> dict[str, float]:
        """Seconds by what bounds the kernels that take them."""
        total: dict[str, float] = {}
        for row in self.rows:
            for bound, seconds in row.bounds[place].items():
                total[bound] = total.get(bound, 0.0) + seconds
        return total


@dataclass
class Prediction:
    """A step of one model, in all ways."""

    ways: dict[str, Way]
    saved_bytes: int
    saved: dict[str, int]  # stage -> bytes
    break_even: dict[str, float | None]  # way -> the least efficiency that reaches the target; None: not even 1


@dataclass
class StepPrediction:
    """Ours, and what can be counted of torchvision's."""

    config: str
    size: tuple[int, int]
    batch: int
    objects: int
    training: bool
    rates: Rates
    ours: Prediction
    theirs: Prediction | None
    own_times: dict[str, list[OwnTime]]
    own_note: str  # where they come from
    batch_bytes: int  # over PCIe

    def rate(self, seconds: float) -> float:
        """Images a second."""
        return self.batch / seconds

    @property
    def copy_s(self) -> float:
        """Of a batch over PCIe."""
        return self.batch_bytes / self.rates.pcie


def predict_step(
    config: Config,
    size: tuple[int, int],
    batch: int = 12,
    training: bool = True,
    objects: int = 16,
    rates: Rates | None = None,
    own: tuple[Mapping[str, Sequence[OwnTime]], str] = ({}, ""),
    torchvision: bool = True,
) -> StepPrediction:
    """Predict a step on `batch` images.

    Args:
        config: of the model, the optimizer and clipping.
        size: (height, width) of the images, padded here to multiples of 32.
        batch: images.
        training: else detection.
        objects: ground-truth slots an image.
        rates: of the machine.
        own: seconds of our ops, by name and in the order of their calls, and where they come from; what is missing
            takes as long as its bytes.
        torchvision: count torchvision's model beside it; only for a training step of its architecture.

    Raises:
        ConfigError: the model cannot be traced with this configuration, or Triton is not installed.
    """
    rates, (times, note) = rates or Rates(), own
    size = tuple(-(-side // STRIDE) * STRIDE for side in size)
    trace, trainable, batch_bytes = _trace_ours(config, size, batch, training, objects)
    extra = [_copy_row(batch_bytes, rates)] + (_update_rows(trainable, config.train, rates) if training else [])
    ours = predict(trace, stage_of, rates, times, extra, batch)
    theirs = None
    if torchvision and training:
        from .roofline_theirs import predict_theirs

        theirs = predict_theirs(config, size, batch, rates, extra)
    return StepPrediction(config.name, size, batch, objects, training, rates, ours, theirs,
                          {k: list(v) for k, v in times.items()}, note, batch_bytes)  # fmt: skip


def predict(
    trace: Trace,
    stage_of: Callable[[str], str],
    rates: Rates,
    own: Mapping[str, Sequence[OwnTime]],
    extra: Sequence[Row],
    batch: int,
) -> Prediction:
    """Times of a traced step, and of the rows that no trace holds."""
    ways, break_even = {}, {}
    for fusion in FUSIONS:
        kernels = make_kernels(trace, fusion)
        ways[fusion] = Way([*_rows(kernels, stage_of, rates, own), *extra])
        break_even[fusion] = _break_even(ways[fusion], kernels, rates, batch)
    saved: dict[str, int] = {}
    for layer, size in trace.saved.values():
        saved[stage_of(layer)] = saved.get(stage_of(layer), 0) + size
    return Prediction(ways, trace.saved_bytes, saved, break_even)


def stage_of(layer: str) -> str:
    """Of a module of our model, by the names that all configurations share."""
    return next((stage for name, stage in _STAGE_OF.items() if f"{layer}.".startswith(f"{name}.")), REST)


def kernel_seconds(kernel: Kernel, rates: Rates, efficiency: float, own: OwnTime | None = None) -> tuple[float, str]:
    """(seconds, what bounds them) of one kernel, or of those of one of our ops."""
    single = kernel.anchor.dtype in (torch.float32, torch.float64)
    compute = kernel.flops / (rates.fp32_matrix if single else rates.matrix * efficiency)
    times = {COMPUTE: compute, BYTES: kernel.bytes / rates.dram}
    if own is not None:
        times = {COUNTED: own.seconds}
    overhead = rates.kernel_s * (own.kernels if own else 1)
    bound = max(times, key=times.__getitem__)
    return times[bound] + overhead, bound if times[bound] >= overhead else OVERHEAD


def _rows(
    kernels: Sequence[Kernel], stage_of: Callable[[str], str], rates: Rates, own: Mapping[str, Sequence[OwnTime]]
) -> list[Row]:
    """Kernels of one layer and pass together, in the order of the step."""
    rows: dict[tuple[str, str, str], Row] = {}
    calls: dict[str, int] = {}
    for kernel in kernels:
        op = kernel.anchor
        known = None
        if op.kind == OWN:
            place = calls[op.name] = calls.get(op.name, -1) + 1
            known = own[op.name][place] if place < len(own.get(op.name, ())) else None
        layer, stage = (op.name, OURS) if op.kind == OWN else (op.layer, stage_of(op.layer))
        row = rows.setdefault((layer, op.part, op.kind), Row(layer, stage, op.part, op.kind))
        _add(row, kernel, known, rates)
    return list(rows.values())


def _add(row: Row, kernel: Kernel, own: OwnTime | None, rates: Rates) -> None:
    row.kernels += own.kernels if own else 1
    row.flops += kernel.flops
    row.bytes += kernel.bytes
    row.odd_channels = sorted({*row.odd_channels, *kernel.anchor.odd_channels})
    row.operators = list(dict.fromkeys([*row.operators, *(op.name for op in kernel.ops)]))
    if not row.seconds:
        row.seconds, row.bounds = [0.0] * len(rates.efficiencies), [{} for _ in rates.efficiencies]
    for place, efficiency in enumerate(rates.efficiencies):
        seconds, bound = kernel_seconds(kernel, rates, efficiency, own)
        row.seconds[place] += seconds
        row.bounds[place][bound] = row.bounds[place].get(bound, 0.0) + seconds


def _break_even(way: Way, kernels: Sequence[Kernel], rates: Rates, batch: int) -> float | None:
    """The least efficiency, to 1e-4, at which a step meets the target; None where it does not with all of the rate."""
    products = [kernel for kernel in kernels if kernel.anchor.kind == PRODUCT]
    rest = way.seconds(0) - sum(kernel_seconds(k, rates, rates.efficiencies[0])[0] for k in products)

    def meets(efficiency: float) -> bool:
        return rest + sum(kernel_seconds(k, rates, efficiency)[0] for k in products) <= batch / rates.target

    low, high = 0.0, 1.0
    if not meets(high):
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


# What is run


def _trace_ours(
    config: Config, size: tuple[int, int], batch: int, training: bool, objects: int
) -> tuple[Trace, int, int]:
    """(trace, trainable parameters, bytes of the batch)."""
    if not HAS_TRITON:
        raise ConfigError("the prediction traces the Triton ops: it needs the package triton, though no GPU")
    with FakeTensorMode(), use_backend("triton"), record_launches():
        model = channels_last(MaskRCNN(config.model).train(training))
        images = torch.zeros(batch, 3, *size, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        sizes, targets = (
            torch.zeros(batch, 2, dtype=torch.int64),
            empty_targets(batch, objects, size) if training else None,
        )
        with trace_ops(model) as trace, torch.set_grad_enabled(training):
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    result = model(images, sizes, targets)
            except ValueError as error:  # a limit of an op
                raise ConfigError(f"the model cannot be traced with this configuration: {error}") from None
            if training:
                sum(result.values()).backward()
    truth = (
        [targets.boxes, targets.labels, targets.count, targets.masks.offset, targets.masks.extent] if targets else []
    )
    batch_bytes = sum(t.numel() * t.element_size() for t in (images, sizes, *truth))
    return trace, sum(p.numel() for p in model.parameters() if p.requires_grad), batch_bytes


def channels_last(model: nn.Module) -> nn.Module:
    """As `.to(memory_format=...)`, which tensors without values refuse."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 4:
                last = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(last, parameter.requires_grad)
    return model


# What no trace holds


def _copy_row(size: int, rates: Rates) -> Row:
    """The batch to where the graph reads it."""
    return _plain_row("the batch's copy into the graph", INPUT, "forward", 2 * size, rates)


def _update_rows(trainable: int, config: TrainConfig, rates: Rates) -> list[Row]:
    """The norm, whether clipped by or not, and the optimizer; both are a few launches."""
    moments, clips = 1 if config.optimizer == "sgd" else 2, config.clip_norm > 0
    norm = _plain_row("norm of the gradients", UPDATE, "update", 4 * trainable, rates, FEW)
    size = (3 + 2 * moments + clips) * 4 * trainable
    return [norm, _plain_row(config.optimizer, UPDATE, "update", size, rates, FEW)]


def _plain_row(layer: str, stage: str, part: str, size: int, rates: Rates, kernels: int = 1) -> Row:
    """Of bytes alone."""
    moving, overhead = size / rates.dram, kernels * rates.kernel_s
    bound = BYTES if moving >= overhead else OVERHEAD
    number = len(rates.efficiencies)
    return Row(layer, stage, part, "other", kernels, 0, size, [moving + overhead] * number,
               [{bound: moving + overhead}] * number)  # fmt: skip


def as_dict(result: StepPrediction) -> dict:
    """Plain values for JSON, the totals among them."""
    plain = dataclasses.asdict(result)
    for name, prediction in (("ours", result.ours), ("theirs", result.theirs)):
        for fusion, way in prediction.ways.items() if prediction else ():
            places = range(len(result.rates.efficiencies))
            for row in plain[name]["ways"][fusion]["rows"]:  # long, and the totals have them
                del row["bounds"], row["operators"]
            plain[name]["ways"][fusion] |= {
                "kernels": way.kernels,
                "flops": way.flops,
                "bytes": way.bytes,
                "seconds": [way.seconds(place) for place in places],
                "images_per_s": [result.rate(way.seconds(place)) for place in places],
                "stages": {stage: [way.seconds(place, stage) for place in places] for stage in STAGES},
                "bounds": [way.bounds(place) for place in places],
            }
    kind = {"kind": "PREDICTION from counts; nothing is measured", "assumptions": result.rates.assumptions}
    return kind | plain | {"copy_s": result.copy_s}
