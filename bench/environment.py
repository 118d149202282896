"""What a result has to carry so that it can be read a year later: hardware, driver, versions, settings."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .timing import CPU_THREADS

NO_GPU = "no GPU: small workloads, CPU providers only; these times say nothing about the Triton kernels"


def describe_environment() -> dict[str, object]:
    """GPU, driver, package versions and TRITON_* settings, as plain JSON values."""
    return {
        "gpu": _gpu(),
        "driver": _nvidia_smi("driver_version"),
        "sm_clock_max": _nvidia_smi("clocks.max.sm"),
        "versions": {"torch": torch.__version__, **{name: _version(name) for name in ("torchvision", "triton")}},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu_name": _cpu_name(),
        "cpu_threads": CPU_THREADS,
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("TRITON_") and "_DIR" not in k},
    }


def sm_clock() -> str | None:
    """What the SMs run at right now, as nvidia-smi prints it; None without a GPU."""
    return _nvidia_smi("clocks.sm")


def describe_commit() -> dict[str, object]:
    """The commit's id and whether the tree differs from it; {"id": "unknown"} outside a checkout."""
    if _git("rev-parse", "HEAD") is None:
        return {"id": "unknown", "dirty": None}
    return {"id": _git("rev-parse", "HEAD"), "dirty": has_uncommitted_files()}


def has_uncommitted_files() -> bool:
    """Whether git knows of changed or new files; False outside a checkout."""
    return bool(_git("status", "--porcelain"))


def same_gpu(one: dict, other: dict) -> bool:
    """Whether two environments are of the same kind of GPU (or both of none): else times are not comparable."""
    return (one.get("gpu") or {}).get("name") == (other.get("gpu") or {}).get("name")


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> dict[str, object] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _nvidia_smi(field: str) -> str | None:
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
