"""What the kernels should take on the training workloads of an H200: predicted from counts, never measured.

Each kernel is compiled as the op launches it, without a GPU, and the instructions of its loops are counted in the
machine code (`sass`). How often they run follows from the workload's boxes (`predict_roi`, `predict_rpn`,
`predict_mask`). All times the warps of a program.

The issue time is as if every scheduler issued an instruction every cycle, and no less than the longest program takes at
an instruction a cycle and warp: latency, bank conflicts and tensor cores can only add to it, and so do the small
kernels that are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from rich.table import Table

from . import predict_mask, predict_roi, predict_rpn
from .floors import floor
from .sass import TARGET, PredictionError, machine_code
from .workloads import DTYPE_NAMES, MASK_OPS, ROI_OPS, WORKLOADS, Workload

# An H200: 132 multiprocessors of 4 schedulers, each an instruction a cycle. The clock is an assumption, what is left
# of the highest (1.98 GHz) under load; so is the bandwidth of a copy, of 4.8e12 bytes/s in the data sheet.
SCHEDULERS, HERTZ = 132 * 4, 1.75e9
DRAM_BYTES_PER_S = 4.3e12

NAMES = {
    "multiscale_roi_align": ("train-box", "train-mask", "train-box-uniform", "train-mask-uniform"),
    "label_grid_anchors": ("train",),
    "box_iou": ("anchors",),
    "nms_mask": ("train",),
    "rpn_loss": ("train",),
    "mask_predictor_loss": ("train",),
    "mask_targets": ("train",),
    "paste_masks": ("inference",),
    "mask_bce_loss": ("train",),
}


@dataclass(frozen=True)
class Prediction:
    """One kernel on one workload."""

    workload: str
    dtype: str
    direction: str
    kernel: str
    instructions: int  # of warps
    dram_bytes: int  # the floor: what no implementation can do without; 0 for the lesser kernels of an op
    longest: int = 0  # instructions of the longest program's warp

    @property
    def issue_s(self) -> float:
        """Seconds to issue the instructions."""
        return max(self.instructions / (SCHEDULERS * HERTZ), self.longest / HERTZ)

    @property
    def dram_s(self) -> float:
        """Seconds to move the floor's bytes."""
        return self.dram_bytes / DRAM_BYTES_PER_S


def predict(workloads: Iterable[Workload]) -> Iterator[Prediction]:
    """Predict the kernels of each workload in each of its dtypes, forward and backward; maps and logits channels_last.

    Raises:
        PredictionError: a kernel without a model is launched, or its code is not as the model has it.
    """
    for workload in workloads:
        family = predict_roi if workload.op in ROI_OPS else predict_mask if workload.op in MASK_OPS else predict_rpn
        for dtype in workload.dtypes:
            inputs = workload.boxes_only(dtype)
            for launch in family.launches(inputs) if family is predict_roi else family.launches(workload.op, inputs):
                name = launch.kernel.__name__
                if name in family.LEFT_OUT:
                    continue
                if name not in family.MODELS:
                    raise PredictionError(f"there is no model of {name}")
                direction = "backward" if name in family.BACKWARD else "forward"
                code, warps = machine_code(launch)
                instructions, longest = family.count(code, launch, inputs)
                least = floor(workload.op, direction, inputs, dtype).dram_bytes
                dram_bytes = 0 if name in (*predict_rpn.LESSER, *predict_mask.LESSER) else least
                yield Prediction(
                    workload.name, DTYPE_NAMES[dtype], direction, name, warps * instructions, dram_bytes, longest
                )


def training_workloads() -> list[Workload]:
    """The canonical ones, in the order of `NAMES`."""
    found = {(w.op, w.name): w for w in WORKLOADS}
    return [found[op, name] for op, names in NAMES.items() for name in names]


def prediction_table(predictions: Iterable[Prediction]) -> Table:
    """A line a prediction, and how to read it."""
    title = f"PREDICTED from counts for an H200 ({TARGET}, Triton {version('triton')}), NOT measured"
    how = (
        f"Instructions of warps at {SCHEDULERS * HERTZ / 1e12:.3f}e12/s, those of the longest program at "
        f"{HERTZ / 1e9:.2f}e9/s, the bytes of the DRAM floor at {DRAM_BYTES_PER_S / 1e12:.1f}e12/s. The slowest bounds "
        "the kernel: the floor's share of it is the most that % of roof can become; an op's lesser kernels have no "
        "floor of their own. Left out: latency, bytes read again, tensor cores, clearing gradients, the kernels of "
        "stable_topk and decode_proposals, and RoIAlign's "
        "kernels for geometry and lists (about 0.02 ms of a backward by the same count)."
    )
    table = Table(title=title, caption=how)
    for column in ("workload", "type", "pass", "kernel"):
        table.add_column(column, no_wrap=True)
    for column in ("M instr.", "issue ms", "floor MB", "DRAM ms", "bound", "most %"):
        table.add_column(column, justify="right", no_wrap=True)
    for p in predictions:
        table.add_row(
            p.workload,
            p.dtype,
            p.direction,
            p.kernel.removeprefix("roi_align_").removesuffix("_kernel"),
            f"{p.instructions / 1e6:.{0 if p.instructions >= 1e7 else 2}f}",
            f"{p.issue_s * 1e3:.4f}",
            f"{p.dram_bytes / 1e6:.0f}" if p.dram_bytes else "–",
            f"{p.dram_s * 1e3:.4f}" if p.dram_bytes else "–",
            _bound(p),
            f"{100 * p.dram_s / max(p.issue_s, p.dram_s):.0f}" if p.dram_bytes else "–",
        )
    return table


def _bound(prediction: Prediction) -> str:
    if prediction.issue_s <= prediction.dram_s:
        return "DRAM"
    return "chain" if prediction.longest / HERTZ == prediction.issue_s else "issue"
