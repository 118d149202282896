"""Compiles the calls for one target and prints a row of JSON a kernel: `python -m bench.resources.worker sm_90`.

A process of its own, because a process either interprets Triton's kernels or compiles them, and for one target.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
from collections.abc import Iterator

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from kernels.runtime import Launch, record_launches

from .amd import read_amd
from .calls import Call, op_calls
from .nvidia import read_nvidia
from .occupancy import PROCESSORS, occupancy
from .row import Assembly, Row


class AbsentDevice:
    """Stands where Triton's driver of a real GPU would, so that its JIT compiles for a GPU that is not here.

    The JIT itself then decides what each argument is specialised on, as it does before a launch.
    """

    def __init__(self, target: str) -> None:
        cuda = target.startswith("sm_")
        arch = int(target.removeprefix("sm_")) if cuda else target
        self.target = GPUTarget("cuda" if cuda else "hip", arch, PROCESSORS[target].warp_size)

    def get_current_target(self) -> GPUTarget:
        """What the JIT compiles for."""
        return self.target

    def get_current_device(self) -> int:
        """The key of the JIT's cache."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Asked for before every launch, used by none."""
        return 0


def compile_call(target: str, call: Call) -> Iterator[Row]:
    """A row for each kernel of `call`; launched twice with different code, the second is "name/2"."""
    with record_launches() as launches:
        call.run()
    seen: dict[str, list[str]] = {}
    for launch in launches:
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
        variants = seen.setdefault(launch.kernel.__name__, [])
        if compiled.hash not in variants:
            variants.append(compiled.hash)
            suffix = f"/{len(variants)}" if len(variants) > 1 else ""
            yield _row(target, call.name, launch, compiled, suffix)


def _row(target: str, call: str, launch: Launch, compiled: CompiledKernel, suffix: str) -> Row:
    metadata, assembly = compiled.metadata, _read(compiled)
    return Row(
        target=target,
        call=call,
        kernel=launch.kernel.__name__ + suffix,
        tile=" ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in launch.meta.items() if k.startswith("BLOCK")),
        warps=metadata.num_warps,
        shared=metadata.shared,
        occupancy=occupancy(target, assembly.registers, metadata.num_warps, metadata.shared),
        assembly=assembly,
        fusion=metadata.enable_fp_fusion,
    )


@functools.cache  # the JIT hands out the same object to every call that launches the same code
def _read(compiled: CompiledKernel) -> Assembly:
    asm = compiled.asm
    return read_nvidia(asm["cubin"], asm["ptx"]) if "cubin" in asm else read_amd(asm["amdgcn"])


def main() -> None:
    """Parse the arguments, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=PROCESSORS)
    parser.add_argument("--calls", metavar="MODULE:NAME", help="a list of more calls to compile")
    arguments = parser.parse_args()
    calls = list(op_calls())
    if arguments.calls:
        module, name = arguments.calls.split(":")
        calls += getattr(importlib.import_module(module), name)
    driver.set_active(AbsentDevice(arguments.target))
    for call in calls:
        for row in compile_call(arguments.target, call):
            print(json.dumps(row.to_dict()), flush=True)


if __name__ == "__main__":
    main()
