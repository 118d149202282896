"""Invented results, in the form that `bench.measure` gives real ones, with paired samples and a little noise."""

import json
import zlib

import numpy as np

from bench.sources import model_hash, source_hash
from bench.timing import METHOD
from bench.workloads import WORKLOADS

ROUNDS = 21
GPU = {"gpu": {"name": "Invented GPU", "sm_count": 99}, "driver": "1.2", "versions": {"torch": "9.9"}}
CEILINGS = {
    "dram_copy_bytes_per_s": 4e12,
    "dram_read_bytes_per_s": 4e12,
    "dram_write_bytes_per_s": 4e12,
    "l2_bytes_per_s": 1e13,
    "issue_per_s": 1e12,
    "matmul_bf16_flops_per_s": 7e14,
    "l2_bytes": 5e7,
}
ROOF_BYTES = 4e9  # of DRAM: with these ceilings a roof of 1 ms


def samples(milliseconds, name, spread=0.004):
    """Seconds, with noise that the name decides, around exactly the median asked for."""
    noise = 1 + spread * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(ROUNDS)
    return list(milliseconds * 1e-3 * noise / np.median(noise))


def times(milliseconds, name, eager=0.03, device="cuda"):
    found = {"op_eager": samples(milliseconds + eager, f"eager {name}")}
    if device == "cuda":
        found |= {k: samples(milliseconds * f, f"{k} {name}") for k, f in (("kernel_cold", 1), ("kernel_warm", 0.8))}
    return found


def row(provider, milliseconds, dtype="fp32", measured=None, *, op="roi_align", direction="forward", workload="train",
        layout="contiguous", device="cuda", eager=0.03, noise=None, **more):  # fmt: skip
    """A row that is "ok" and fresh; `noise` is its call's."""
    made = next(w for w in WORKLOADS if (w.op, w.name) == (op, workload))
    name = f"{provider} {layout} {measured or dtype}"
    found = {
        "op": op, "direction": direction, "workload": workload, "suite": made.suite, "dtype": dtype,
        "provider": provider, "layout": layout, "measured_dtype": measured or dtype, "device": device,
        "inputs": made.fingerprint, "sources": source_hash(op), "method": METHOD,
        "status": "ok", "reason": "", "error": 1e-6, "tolerance": 1e-4, "shapes": "2x3", "first_call": 1.5,
        "saved_bytes": None, "peak_memory_bytes": 2**20 if device == "cuda" else None, "waits": False,
        "times": times(milliseconds, name, eager, device),
    }  # fmt: skip
    if noise is not None:
        found["noise"] = dict.fromkeys(found["times"], abs(noise))
    if "floor" in more:
        found["model"] = model_hash()
    return {**found, **more}


def without_time(provider, status, reason, **more):
    """A row that has no time, and why."""
    made = row(provider, 1.0, **more)
    return {k: v for k, v in made.items() if k not in ("times", "first_call")} | {"status": status, "reason": reason}


def session(number=1, ceilings=None, **more):
    commit = {"id": "abc123", "dirty": True}
    found = {"session": number, "environment": GPU, "ceilings": ceilings, "commit": commit, "started": "2031-01-01"}
    return {**found, "command": "python -m bench study --out somewhere", **more}


def calls(rows):
    """Rows in the lines of a study, one a call; a row that its call's line holds already begins a new line."""
    lines, newest = [], {}
    for made in rows:
        key = (made.get("session", 1), *(made[name] for name in ("op", "direction", "workload", "dtype")))
        name = (made["provider"], made["layout"], made["measured_dtype"])
        names, line = newest.get(key, (set(), None))
        if line is None or name in names:
            names, line = newest[key] = (set(), {"kind": "call", "session": key[0], "rows": []})
            lines.append(line)
        names.add(name)
        line["rows"].append(made)
    return lines


def save_study(folder, rows, sessions=None, tail=""):
    """A study's folder; `tail` is written behind the last whole line."""
    entries = [{"kind": "session", **s} for s in sessions or [session()]]
    entries += calls(rows)
    folder.mkdir(exist_ok=True)
    (folder / "study.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + tail)
    return folder


def save_pytest(path, rows, **more):
    """The JSON of pytest-benchmark: rows with a time among the benchmarks, the others beside them."""
    timed = [{"extra_info": r, "stats": {"data": r["times"]["op_eager"]}} for r in rows if r["status"] == "ok"]
    rest = [r for r in rows if r["status"] != "ok"]
    path.write_text(json.dumps({"benchmarks": timed, "not_measured": rest, "machine_info": GPU, **more}))
    return path


def mixed():
    """Triton wins fp32 (2x), loses bf16 to torchvision's fp32, and cannot be told from torch in the backward pass."""
    return [
        row("triton", 1.0, layout="channels_last", noise=0.01),
        row("triton", 3.0, layout="nchw"),
        row("torchvision", 2.0, layout="nchw"),
        row("torch", 8.0),
        row("triton", 2.5, "bf16", noise=0.01),
        row("torchvision", 2.0, "bf16", "fp32", layout="nchw"),
        row("torch", 5.0, "bf16"),
        row("triton", 1.0, direction="backward", noise=0.01),
        row("torch", 1.001, direction="backward"),
    ]
