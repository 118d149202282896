"""A provider that runs out of memory: recognised, put into words, and cleared away for those that come after it."""

from __future__ import annotations

import gc
import re

import torch

OUT_OF_MEMORY = "out of memory"
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(\w+)")  # "20.00 GiB" on a GPU, "4096 bytes" on a CPU
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class OutOfMemoryError(RuntimeError):
    """One of the providers that are timed together asked for more than there is."""

    def __init__(self, contestant: object, error: BaseException) -> None:
        super().__init__(out_of_memory_text(error))
        self.contestant = contestant


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is about memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def out_of_memory_text(error: BaseException) -> str:
    """What a row says: "out of memory (asked for 9.77 GiB)"."""
    if isinstance(error, OutOfMemoryError):
        return str(error)
    found = _ASKED.search(str(error))
    if not found or found[2] not in _UNITS:
        return OUT_OF_MEMORY
    asked = float(found[1]) * _UNITS[found[2]]
    return f"{OUT_OF_MEMORY} (asked for {asked / 2**30:.3g} GiB)"


def ran_out(row: dict) -> bool:
    """Whether that is what became of a row."""
    return row["status"] == "failed" and row["reason"].startswith(OUT_OF_MEMORY)


def give_back_memory() -> None:
    """Free what a failed call left: its blocks are cached, in pieces that fit nobody else.

    To be called when its error is no longer being handled: until then the traceback holds the call's tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
