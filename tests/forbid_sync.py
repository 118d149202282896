"""A context in which everything raises that makes a GPU's host wait for the device, on CPU tensors too.

    from forbid_sync import forbid_sync

It does not look inside custom ops: call their bodies (`op._init_fn`) in it as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Each needs a value, or the number of results, on the host. `.item()`, `bool(t)`, `int(t)` are the first.
_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "bincount", "_to_sparse"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# The dispatcher does not see these of a CPU tensor.
_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class WaitsForDevice(AssertionError):
    """Raised by what would wait."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        waits = name in _OPERATORS or name.lstrip("_").startswith("unique")
        if name in _INDEXING:  # by a mask: its results have to be counted
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":
            waits = (kwargs or {}).get("output_size") is None
        if waits:
            raise WaitsForDevice(f"{function} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _METHODS:
            raise WaitsForDevice(f"Tensor.{function.__name__} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


@contextmanager
def forbid_sync() -> Iterator[None]:
    """Raise `WaitsForDevice` from every operation inside the block that waits."""
    with _Operators(), _Methods():
        yield
