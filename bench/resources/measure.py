"""Starts the processes that compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .occupancy import PROCESSORS
from .row import Row

TARGETS = tuple(PROCESSORS)


def measure_resources(targets: Sequence[str] = TARGETS, calls: str | None = None) -> list[Row]:
    """Compile every kernel for every target and read its assembly; about half a second a kernel and core.

    Args:
        targets: some of `TARGETS`.
        calls: "module:NAME" of a list of `Call` to compile besides the ops' own.

    Raises:
        RuntimeError: a kernel does not compile; the message ends with the compiler's.
    """
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return [row for rows in pool.map(lambda target: _measure(target, calls), targets) for row in rows]


def _measure(target: str, calls: str | None) -> list[Row]:
    command = [sys.executable, "-m", "bench.resources.worker", target, *(["--calls", calls] if calls else [])]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(command, env=_environment(cache), capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr[-4000:]}")
    return [Row.from_dict(json.loads(line)) for line in done.stdout.splitlines()]


def _environment(cache: str) -> dict[str, str]:
    """The caller's, without what decides how Triton compiles; an own cache, so that everything is compiled."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(path)}
