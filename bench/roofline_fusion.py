"""Which operators become one kernel: the three ways of running the pointwise ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .roofline_trace import FORWARD, OTHER, OWN, POINTWISE, PRODUCT, REDUCTION, Op, Trace, Value

EPILOGUE, ONE_PASS, SEPARATE = "epilogue", "one pass", "separate"
FUSIONS = {
    EPILOGUE: "pointwise operators ride in the product, the sum or the pass that makes their input: no library does "
    "all of it, so this is a bound",
    ONE_PASS: "neighbouring pointwise operators, and a sum behind them, are one pass over memory, products kernels of "
    "their own: what torch.compile writes, with convolutions that are cuDNN's",
    SEPARATE: "every operator is a kernel: PyTorch without a compiler",
}


@dataclass
class Kernel:
    """Operators that run as one, in their order."""

    ops: list[Op]
    depth: int  # no kernel needs one that is as deep
    reads: dict[Value, int] = field(default_factory=dict)
    writes: dict[Value, int] = field(default_factory=dict)

    @property
    def anchor(self) -> Op:
        """What it is called after: its product or other operator that is not pointwise, else the largest."""
        largest = max(self.ops, key=lambda op: op.bytes)
        return next((op for op in self.ops if op.kind not in (POINTWISE, REDUCTION)), largest)

    @property
    def kind(self) -> str:
        """Of its anchor."""
        return self.anchor.kind

    @property
    def flops(self) -> int:
        """Of its product."""
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        """Read from outside, and written for someone outside."""
        return sum(self.reads.values()) + sum(self.writes.values())


def make_kernels(trace: Trace, fusion: str) -> list[Kernel]:
    """The kernels of a step, in an order in which they can run; their bytes are those that leave or enter them."""
    kernels = _Builder(fusion).build(trace.ops)
    read_by: dict[Value, set[int]] = {}
    for number, kernel in enumerate(kernels):
        for op in kernel.ops:
            for value in op.reads:
                read_by.setdefault(value, set()).add(number)
    for number, kernel in enumerate(kernels):
        made = {value for op in kernel.ops for value in op.writes}
        for op in kernel.ops:
            _leave(op, number, kernel, read_by)
            for value, size in op.reads.items():
                if value not in made:
                    kernel.reads[value] = max(kernel.reads.get(value, 0), size)
    return kernels


def _leave(op: Op, number: int, kernel: Kernel, read_by: dict[Value, set[int]]) -> None:
    """What `op` writes: its results for other kernels, and its first where nobody reads it: a loss, a gradient."""
    replaced = {before for later in kernel.ops for before in later.after}  # changed in place, within the kernel
    for place, (value, size) in enumerate(op.writes.items()):
        readers = read_by.get(value, set())
        if readers - {number} or (not readers and place == 0 and value not in replaced):
            kernel.writes[value] = size


class _Builder:
    """Each operator joins the deepest of those that made its inputs, where it may, else starts a kernel.

    Kernels of one depth cannot need each other, so that those of a depth that feed one operator may also become one.
    What was made long before a single kernel reads it is then moved into that one.
    """

    def __init__(self, fusion: str) -> None:
        self.fusion = fusion
        self.kernels: dict[int, Kernel] = {}  # by a number of its own, in the order of their first operators
        self.maker: dict[Value, int] = {}

    def build(self, ops: Iterable[Op]) -> list[Kernel]:
        """Of all operators, in an order in which each finds its inputs."""
        for number, op in enumerate(ops):
            target = self._join(op)
            if target is None:
                target = number
                makers = self._makers(op)
                self.kernels[number] = Kernel([], 1 + max((self.kernels[m].depth for m in makers), default=0))
            self.kernels[target].ops.append(op)
            self.maker |= dict.fromkeys(op.writes, target)
        if self.fusion != SEPARATE:
            self._sink()
        return sorted(self.kernels.values(), key=lambda kernel: kernel.depth)

    def _sink(self) -> None:
        """Pointwise kernels into the only kernel that reads them: nothing can lie between the two."""
        readers: dict[int, set[int]] = {number: set() for number in self.kernels}
        for number, kernel in self.kernels.items():
            for op in kernel.ops:
                for maker in self._makers(op) - {number}:
                    readers[maker].add(number)
        for number in sorted(self.kernels, key=lambda n: -self.kernels[n].depth):
            kernel = self.kernels[number]
            if len(readers[number]) != 1 or any(op.kind != POINTWISE for op in kernel.ops):
                continue
            (reader,) = readers[number]
            reading = [op for op in self.kernels[reader].ops if number in self._makers(op)]
            if not all(op.kind in (POINTWISE, REDUCTION) and self._may(op, number) for op in reading):
                continue
            self.kernels[reader].ops[:0] = kernel.ops
            for op in kernel.ops:
                self.maker |= dict.fromkeys(op.writes, reader)
            for others in readers.values():
                if number in others:
                    others.remove(number)
                    others.add(reader)
            del self.kernels[number]

    def _makers(self, op: Op) -> set[int]:
        return {self.maker[value] for value in (*op.reads, *op.after) if value in self.maker}

    def _join(self, op: Op) -> int | None:
        """The kernel that `op` becomes part of."""
        makers = self._makers(op)
        if self.fusion == SEPARATE or op.kind not in (POINTWISE, REDUCTION) or not makers:
            return None
        depth = max(self.kernels[m].depth for m in makers)
        deepest = sorted(m for m in makers if self.kernels[m].depth == depth)
        if not all(self._may(op, m) for m in deepest):
            return None
        kinds = [o.kind for m in deepest for o in self.kernels[m].ops] + [op.kind]
        if kinds.count(PRODUCT) > 1 or kinds.count(REDUCTION) > 1:
            return None
        first, *others = deepest
        for other in others:
            for merged in self.kernels.pop(other).ops:
                self.kernels[first].ops.append(merged)
                self.maker |= dict.fromkeys(merged.writes, first)
        return first

    def _may(self, op: Op, number: int) -> bool:
        """Whether `op` can be computed where `number` has its results: element by element, in the same pass."""
        made_by = self.kernels[number]
        if any(o.kind in (OTHER, OWN) or (o.kind == PRODUCT and self.fusion != EPILOGUE) for o in made_by.ops):
            return False
        if (made_by.ops[0].part == FORWARD) != (op.part == FORWARD):
            return False  # the losses lie between them
        whole = max(op.numel.values())
        return all(
            op.numel.get(value, whole) == whole for value in (*op.reads, *op.after) if self.maker.get(value) == number
        )
