"""From a profiler's trace of some steps: launches, waits, and device time by group of kernels."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from ..step_profile.phases import PREFIX, STEP
from ..step_profile.trace import WAITING_CALLS, read_events

OURS, COPIES, OTHER = "our kernels", "copies and casts", "other"
MATRIX = "convolution and matrix products"
GROUPS = (  # the first that matches a kernel's name, whatever its case
    ("optimizer", r"multi_tensor_apply|fusedsgd|fused_sgd|fusedadam|fused_adam"),
    (MATRIX, r"triton_(mm|bmm|tem|conv)"),
    ("Inductor, reductions", r"triton_(red|per|spl)_"),
    ("Inductor, pointwise", r"triton_(poi|for|unk)"),  # their names tell what was fused, "convolution" among it
    (COPIES, r"memcpy|memset|copy_kernel|direct_copy|catarray|nchwtonhwc|nhwctonchw"),
    (MATRIX, r"conv|gemm|cudnn|cutlass|xmma|wgrad|dgrad|implicit|nvjet|cublas|splitk|winograd|fprop"),
    ("torchvision's kernels", r"vision::|roi_align|nms_kernel"),
    ("sorting and indexing", r"sort|topk|radix|scan|gather|scatter|index|nonzero|unique|deviceselect|compact"),
    ("PyTorch, pointwise and reductions", r"at::|at_cuda|elementwise|reduce|softmax"),
)
_LAUNCHES = re.compile(r"(cuda|cu)Launch(Cooperative)?Kernel|cuLaunchKernelEx|cudaLaunchKernelExC")
_GRAPHS = re.compile(r"cu(da)?GraphLaunch")


def our_kernels() -> frozenset[str]:
    """Names of the Triton kernels under kernels/."""
    root = Path(__file__).resolve().parents[2] / "kernels"
    found = (re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", file.read_text()) for file in root.rglob("*.py"))
    return frozenset(name for names in found for name in names)


def group_of(kernel: str, ours: frozenset[str]) -> str:
    """The group that a kernel of the device belongs to."""
    if kernel in ours:
        return OURS
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def read_steps(events: list[dict], ours: frozenset[str]) -> dict:
    """Means of the traced steps: `launches`, `graph_launches`, `waits` by call, `kernels`, milliseconds by `groups`.

    The device's work is all that the trace holds: the profiler was started and stopped on an idle device. Host calls
    count inside the steps only; the wait at the end of each is not inside. `ours` are milliseconds of ours by name,
    `top` the ten longest others.
    """
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == PREFIX + STEP]
    steps = max(len(ranges), 1)
    inside = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and _inside(e, ranges)]
    calls = Counter(re.sub(r"(_v\d+|_ptsz|_ptds)+$", "", event["name"]) for event in inside)
    groups, named, others, kernels = Counter(), Counter(), Counter(), 0
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        is_kernel = event["cat"] == "kernel"
        group = group_of(event["name"], ours) if is_kernel else COPIES
        groups[group] += event["dur"]
        kernels += is_kernel
        (named if group == OURS else others)[event["name"]] += event["dur"]
    return {
        "launches": sum(n for name, n in calls.items() if _LAUNCHES.match(name)) / steps,
        "graph_launches": sum(n for name, n in calls.items() if _GRAPHS.match(name)) / steps,
        "waits": {name: n / steps for name, n in calls.items() if name in WAITING_CALLS},
        "kernels": kernels / steps,
        "groups": {name: us / steps / 1e3 for name, us in groups.most_common()},
        "ours": {name: us / steps / 1e3 for name, us in named.most_common()},
        "top": {name[:120]: us / steps / 1e3 for name, us in others.most_common(10)},
    }


def read_trace_file(path: Path) -> dict:
    """As `read_steps`, of a file."""
    return read_steps(read_events(path), our_kernels())


def _inside(event: dict, ranges: list[dict]) -> bool:
    return any(r["ts"] <= event["ts"] <= r["ts"] + r["dur"] for r in ranges)
