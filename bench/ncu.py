"""What Nsight Compute counts while a call runs, beside the model of what the call has to move.

The counters say whether the floors are right: DRAM bytes below the model's would mean a wrong model, far more bytes
mean re-reads that the caches did not catch, and a high issue utilisation that bytes are not what binds.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .measure import add_floors
from .providers import Variant, variants
from .sources import source_hash
from .study import StudyError
from .worker import TimeIsUpError
from .workloads import DTYPE_NAMES, Call

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 120.0  # seconds a call
METRICS = {
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_write_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "gpu__time_duration.sum": "seconds",
}
SCALES = {"": 1.0, "%": 1.0, "inst": 1.0, "byte": 1.0, "nsecond": 1e-9, "ns": 1e-9, "second": 1.0, "s": 1.0}


@dataclass(frozen=True)
class KernelCounters:
    """One kernel launch; bytes, warp instructions, per cent of issue slots used while active, seconds."""

    kernel: str
    dram_read_bytes: float
    dram_write_bytes: float
    l2_bytes: float
    instructions: float
    issue_percent: float
    seconds: float


def find_tool(name: str) -> str:
    """Path of `ncu` or `compute-sanitizer`.

    Raises:
        StudyError: it is not installed.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise StudyError(f"{name} is not on the PATH: it comes with the CUDA toolkit, not with PyTorch")
    return found


def count_calls(calls: list[Call], path: Path, budget: float, on_event: Callable[[str], None]) -> None:
    """Profile our kernels in every mode of `calls`, adding to the JSON file at `path` what it has not got yet."""
    from .report import write_whole

    deadline = time.monotonic() + budget
    found = _read(path)
    for call in calls:
        for variant in (v for v in variants(call) if v.provider == "triton"):
            names = {"call": str(call), "variant": str(variant), "sources": source_hash(call.workload.op)}
            left = deadline - time.monotonic()
            if not any(names.items() <= entry.items() for entry in found):
                try:
                    counted = profile_call(call, variant, min(left, LONGEST))
                except TimeIsUpError:
                    if left > LONGEST:
                        on_event(f"{call}, {variant}: ncu took longer than {LONGEST:.0f} s")
                        continue
                    on_event("the time is up: run the same command to go on")
                    return
                found = [e for e in found if (e["call"], e["variant"]) != (str(call), str(variant))]
                found.append(names | counted)
                write_whole(path, json.dumps(found, indent=1).encode())
            on_event(_summary(next(entry for entry in found if names.items() <= entry.items())))


def _read(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise StudyError(f"{path} is not valid JSON ({error}): remove it, or give another --out") from None


def _summary(entry: dict) -> str:
    moved = sum(k["dram_read_bytes"] + k["dram_write_bytes"] for k in entry["kernels"])
    issue = max(k["issue_percent"] for k in entry["kernels"])
    return (
        f"{entry['call']}, {entry['variant']}: {moved / 1e6:.0f} MB through DRAM, "
        f"{moved / entry['floor']['dram_bytes']:.2f} times the model's; issue slots up to {issue:.0f} % used"
    )


def profile_call(call: Call, variant: Variant, seconds: float = LONGEST) -> dict:
    """Counters of every kernel of one call, and the call's floor.

    ncu flushes the caches before each kernel and leaves the clocks alone.

    Raises:
        TimeIsUpError: it took longer than `seconds`.
        StudyError: ncu is missing, may not read the counters, or printed something else.
    """
    command = [
        find_tool("ncu"), "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS),
        "--profile-from-start", "off", "--cache-control", "all", "--clock-control", "none", "--target-processes", "all",
        sys.executable, "-m", "bench.profile_call", str(call), str(variant),
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # ncu and the Python under it, which holds the GPU
            raise TimeIsUpError(f"ncu took longer than {seconds:.0f} s for {call}") from None
    kernels = list(read_counters(output))
    if not kernels:
        tail = output.strip().splitlines()[-3:]
        raise StudyError(f"ncu reported no kernel for {call}: {' '.join(tail)}")
    row = {"measured_dtype": DTYPE_NAMES[variant.dtype]}
    add_floors(call, [row])
    return {"floor": row["floor"], "kernels": [asdict(k) for k in kernels]}


def read_counters(output: str) -> Iterator[KernelCounters]:
    """Parse `ncu --csv --page raw --print-units base`: a header, a line of units, a line a kernel.

    Lines before the header are the program's own and ncu's messages.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"'))))
    units = next(table, None)
    for line in table:
        values = {name: _number(line[metric], units[metric]) for metric, name in METRICS.items()}
        yield KernelCounters(line["Kernel Name"], **values)


def _number(text: str, unit: str) -> float:
    try:
        return float(text.replace(",", "")) * SCALES[unit]
    except (KeyError, ValueError):
        raise StudyError(f"ncu printed {text!r} {unit!r}, which is no number in a known unit") from None
