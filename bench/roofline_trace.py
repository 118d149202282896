"""Every operator of a training step, with its FLOPs and bytes, from a run on tensors without values.

A dispatch mode sees below autograd and autocast: each operator that would run on a GPU, forward and backward, in the
dtypes that it would have there. Of a few operators it makes the kernels that a GPU runs for them:

| operator | here |
| --- | --- |
| a convolution with a bias | the product, and the bias in a pass of its own: cuDNN's convolutions are called without |
| convolution_backward | products for the input and for the weight, and a sum for the bias |
| batch norm in training, group norm | statistics, which read all, then the pass that scales; backward likewise |

An operator's bytes are each tensor once: what it reads as it sees it (a slice, not the tensor it is cut from; an
expanded dimension once; of a table that it gathers from no more than it takes), and what it writes. Views cost nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Value = tuple[int, int]  # a storage, and how often it had been written to

PRODUCT, POINTWISE, REDUCTION, OTHER, OWN = "product", "pointwise", "reduction", "other", "own"
FORWARD, BACKWARD, DATA, WEIGHT = "forward", "backward", "backward-data", "backward-weight"
PASSES = (FORWARD, BACKWARD, DATA, WEIGHT)
MULTIPLE = 8  # channels: tensor cores read rows of 16 bytes

# Computed element by element, though PyTorch does not tag them so: copies, and what copies from computed places.
COPIES = {
    "_to_copy", "arange", "cat", "clone", "constant_pad_nd", "contiguous", "copy", "expand_copy", "fill", "full",
    "full_like", "gather", "index", "index_select", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "rand",
    "scalar_tensor", "select_backward", "slice_backward", "stack", "upsample_nearest2d", "where", "zero", "zeros",
    "zeros_like", "_log_softmax_backward_data", "_softmax_backward_data", "native_dropout",
}  # fmt: skip
REDUCTIONS = {
    "_log_softmax", "_softmax", "all", "amax", "amin", "any", "argmax", "argmin", "cumsum", "linalg_vector_norm",
    "logsumexp", "max", "mean", "min", "nll_loss2d_forward", "nll_loss_forward", "prod", "sum",
    "upsample_nearest2d_backward",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITING = {"copy_", "fill_", "zero_"}  # write their first argument without reading it
TABLES = {"gather", "index", "index_select", "embedding"}  # read of their first argument what they return
NORMS = {"native_batch_norm", "_native_batch_norm_legit", "native_group_norm", "native_layer_norm"}


@dataclass(frozen=True)
class Op:
    """What one kernel would do if it did nothing else."""

    name: str
    layer: str  # path of the module that called it, or whose backward it is
    part: str  # of PASSES
    kind: str
    reads: dict[Value, int]  # bytes
    writes: dict[Value, int]
    numel: dict[Value, int]  # elements of all of them
    flops: int = 0
    dtype: torch.dtype = torch.float32  # of the result
    shape: str = ""
    channels: tuple[int, ...] = ()  # of a product: what should be multiples of MULTIPLE
    after: tuple[Value, ...] = ()  # written to in place: must have been made before

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def odd_channels(self) -> tuple[int, ...]:
        """Those that are no multiple of MULTIPLE."""
        return tuple(sorted({c for c in self.channels if c % MULTIPLE}))


@dataclass
class Trace:
    """A step, operator by operator."""

    ops: list[Op] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)  # storages of parameters and buffers
    saved: dict[int, tuple[str, int]] = field(default_factory=dict)  # storage -> layer, bytes: kept for the backward

    @property
    def saved_bytes(self) -> int:
        """Of all tensors that the forward leaves for the backward, each storage once, parameters not counted."""
        return sum(size for _, size in self.saved.values())


@contextmanager
def trace_ops(model: nn.Module) -> Iterator[Trace]:
    """Collect what runs in the block, which calls `model` and may call backward."""
    recorder = _Recorder(model)
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda tensor: tensor)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(partial(recorder.enter, name)))
            stack.enter_context(module.register_forward_hook(partial(recorder.leave, name)))
        stack.enter_context(hooks)
        stack.enter_context(recorder)
        yield recorder.trace


class _Recorder(TorchDispatchMode):
    """The mode, and the hooks that tell it which layer runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self._layers = [""]
        self._marks: list[tuple[int, str]] = [(0, "")]  # from which autograd node on, which layer
        self._versions: dict[int, int] = {}
        self._kept: list[Any] = []  # storages: one that is freed would lend its address to another
        self._of_weights: set[Value] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self.trace.weights.add(self._storage(tensor))
            self._of_weights.add(self._value(tensor))

    # Layers

    def enter(self, name: str, *hook_arguments: object) -> None:
        """`name` is called."""
        self._layers.append(name)
        self._mark()

    def leave(self, name: str, *hook_arguments: object) -> None:
        """`name` has returned."""
        self._layers.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append((torch.autograd._get_sequence_nr(), self._layers[-1]))

    def _layer(self, node: Any) -> str:
        """That which is called, or made the node that runs: nodes are numbered in the order of the forward."""
        if node is None:
            return self._layers[-1]
        place = bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        return self._marks[place][1]

    # Values

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._versions:
            self._versions[storage._cdata] = 0
            self._kept.append(storage)
        return storage._cdata

    def _value(self, tensor: Tensor) -> Value:
        storage = self._storage(tensor)
        return storage, self._versions[storage]

    def save(self, tensor: Tensor) -> Tensor:
        """Autograd keeps `tensor` for the backward."""
        storage = self._storage(tensor)
        if storage not in self.trace.weights:
            self.trace.saved.setdefault(storage, (self._layers[-1], tensor.untyped_storage().nbytes()))
        return tensor

    # Operators

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace != "prim" and name not in ALLOCATIONS:
            self._record(func, name, args, kwargs or {}, out)
        return out

    def _record(self, func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        in_place = func._schema.is_mutable
        storages = {self._storage(t) for t in inputs}
        if not outputs or (not in_place and all(self._storage(t) in storages for t in outputs)):
            return  # a view
        node = torch._C._current_autograd_node()
        common = {"layer": self._layer(node), "part": FORWARD if node is None else BACKWARD}
        if name == "convolution_backward":
            return self._convolution_backward(func, args, out, common)
        if name.removesuffix("_backward") in NORMS and _has_statistics(name, args, outputs):
            return self._norm(name, args, out, common)
        read = [t for i, t in enumerate(inputs) if not (name in OVERWRITING and i == 0)]
        kind = _kind(func, name)
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) if kind == PRODUCT else 0
        channels = _channels(name, args) if kind == PRODUCT else ()
        if kind == PRODUCT and node is not None:
            common["part"] = DATA if any(self._value(t) in self._of_weights for t in read) else WEIGHT
        bias = name == "convolution" and args[2] is not None
        if bias:
            read = [args[0], args[1]]
        most = sum(_bytes(t) for t in outputs) if name in TABLES else None
        self._add(name, kind, read, outputs, in_place, most, flops=flops, channels=channels, **common)
        if bias:
            self._add("bias", POINTWISE, [out, args[2]], [out], True, **common)

    def _convolution_backward(self, func: Any, args: tuple, out: tuple, common: dict) -> None:
        gradient, x, weight = args[:3]
        mask = args[10]
        channels = _channels("convolution", (x, weight))
        for i, (part, other) in enumerate(((DATA, weight), (WEIGHT, x))):
            if not mask[i]:
                continue
            only = [i == 0, i == 1, False]
            flops = flop_registry[func._overloadpacket](*args[:10], only, out_val=out)
            common["part"] = part
            name = "convolution, gradient of " + ("the input" if i == 0 else "the weight")
            self._add(name, PRODUCT, [gradient, other], [out[i]], False, flops=flops, channels=channels, **common)
        if mask[2]:
            common["part"] = BACKWARD
            self._add("convolution, gradient of the bias", REDUCTION, [gradient], [out[2]], False, **common)

    def _norm(self, name: str, args: tuple, out: tuple, common: dict) -> None:
        result, *rest = out
        read = [t for t in args[: 2 if "backward" in name else 1] if isinstance(t, Tensor)]
        statistics = [t for t in rest if isinstance(t, Tensor)]
        self._add(f"{name}, sums", REDUCTION, read, statistics, False, **common)
        if isinstance(result, Tensor):
            self._add(name, POINTWISE, [*read, *statistics], [result], False, **common)

    def _add(
        self,
        name: str,
        kind: str,
        read: Iterable[Tensor],
        written: list[Tensor],
        in_place: bool,
        most: int | None = None,
        **rest: Any,
    ) -> None:
        """One operator; `most` bounds what it reads of its first argument."""
        reads: dict[Value, int] = {}
        numel: dict[Value, int] = {}
        for i, tensor in enumerate(read):
            size = _bytes(tensor) if most is None or i else min(_bytes(tensor), most)
            value = self._value(tensor)
            reads[value] = max(reads.get(value, 0), size)
            numel[value] = max(numel.get(value, 0), tensor.numel())
        after = tuple(self._value(t) for t in written) if in_place else ()
        of_weights = bool(reads) and all(value in self._of_weights for value in reads)
        for tensor in written if in_place else ():
            self._versions[self._storage(tensor)] += 1
        writes = {self._value(t): _bytes(t) for t in written}
        numel |= {self._value(t): t.numel() for t in written}
        if of_weights and rest["part"] == FORWARD:
            self._of_weights |= writes.keys()
        dtype, shape = written[0].dtype, "x".join(map(str, written[0].shape))
        self.trace.ops.append(Op(name, kind=kind, reads=reads, writes=writes, numel=numel, dtype=dtype, shape=shape,
                                 after=after, **rest))  # fmt: skip


def _bytes(tensor: Tensor) -> int:
    """Of what a view shows; dimensions that repeat the same elements count once."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride or not size else 1
    return number * tensor.element_size()


def _kind(func: Any, name: str) -> str:
    if func.namespace not in ("aten", "prims", "torchvision"):
        return OWN
    if func._overloadpacket in flop_registry:
        return PRODUCT
    bare = name.removesuffix("_") if name not in COPIES else name
    if name in REDUCTIONS or bare in REDUCTIONS:
        return REDUCTION
    scales = name.removesuffix("_backward") in NORMS or "batch_norm" in name  # by constants: no statistics
    return POINTWISE if torch.Tag.pointwise in func.tags or bare in COPIES or scales else OTHER


def _has_statistics(name: str, args: tuple, outputs: list[Tensor]) -> bool:
    """Whether a normalisation looks at its whole input first; else its statistics, and scale, are constants."""
    if "batch_norm" not in name:
        return True
    if name.endswith("_backward"):
        return bool(args[7]) or len(outputs) > 1
    return bool(args[5])


def _channels(name: str, args: tuple) -> tuple[int, ...]:
    """The sides of a product that tensor cores want to be multiples of 8."""
    if "convolution" in name:
        return tuple(args[1].shape[:2])
    first, second = [a for a in args if isinstance(a, Tensor)][-2:]
    return (*first.shape[-2:], second.shape[-1])
