"""CUDA graphs by shape of batch.

Without a GPU a stand-in for torch.cuda's graphs shows who is called when: as the real ones, capturing computes nothing,
and replaying computes from what lies in the captured tensors. tests/mrcnn/test_step.py captures for real, on a GPU.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from kernels import MaskPool
from mrcnn import graphs
from mrcnn.errors import GraphError
from mrcnn.graphs import LEAST_POOL, GraphedCalls, StaticBatch, shape_key, tensors
from mrcnn.structures import Batch, Targets


def batch_of(value: int, size: tuple[int, int] = (32, 64), pool: int = 5, packed: bool = True) -> Batch:
    """Two images of a size; `value` is everywhere in them."""
    masks = MaskPool(
        bitmaps=torch.full((pool,), value, dtype=torch.uint8),
        offset=torch.zeros(2, 3, dtype=torch.int64),
        extent=torch.full((2, 3, 4), value, dtype=torch.int32),
        sizes=torch.tensor([size, size]),
        padded_size=size,
        packed=packed,
    )
    targets = Targets(torch.full((2, 3, 4), float(value)), torch.full((2, 3), value), torch.tensor([1, 2]).int(), masks)
    images = torch.full((2, 3, *size), value, dtype=torch.uint8)
    return Batch(images, torch.tensor([size, size]), [1, 2], [size, size], targets)


class Cuda:
    """Stands for torch.cuda: what is captured is recorded, and runs when it is replayed."""

    def __init__(self) -> None:
        self.capturing, self.watching, self.invalidated, self.graphs, self.pools = None, False, False, [], 0

    def CUDAGraph(self):
        graph = SimpleNamespace(work=[])
        graph.replay = lambda: [work() for work in graph.work]
        self.graphs.append(graph)
        return graph

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and pool == f"pool {self.pools}"
        self.capturing = graph
        yield
        if self.invalidated:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.capturing = None

    def device(self, device):
        return nullcontext()

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, stream):
        return nullcontext()

    def set_sync_debug_mode(self, mode):
        self.watching = mode == "error"

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"


class Sums:
    """A function of a batch that returns a sum in memory of its own, as a step returns losses."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.calls, self.waits, self.fails = cuda, 0, False, False

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        out = torch.zeros((), dtype=torch.int64)
        if self.cuda.capturing is not None:
            if self.fails:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nsecond line")
            self.cuda.capturing.work.append(lambda: out.copy_(batch.images.sum()))
            return out
        if self.waits and self.cuda.watching:
            raise RuntimeError("called a synchronizing CUDA operation")
        return out.copy_(batch.images.sum())


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda()
    for name in dir(stand_in):
        if not name.startswith("_") and callable(getattr(stand_in, name)):
            monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    monkeypatch.setattr(graphs, "_on_gpu", lambda batch: True)
    return stand_in


def total(value: int, size: tuple[int, int] = (32, 64)) -> int:
    return 2 * 3 * size[0] * size[1] * value


def test_each_shape_is_captured_once(cuda):
    # Three calls as they are, then a graph; another shape begins anew, and neither disturbs the other's graph.
    function, notes = Sums(cuda), []
    calls = GraphedCalls(function, on_note=notes.append)
    for value in range(1, 8):
        assert calls(batch_of(value)).item() == total(value)
        assert calls.captured == (value > 3)
    assert function.calls == 4 and len(cuda.graphs) == 1
    tall = (64, 32)
    for value in range(1, 6):
        assert calls(batch_of(value, tall)).item() == total(value, tall)
        assert calls(batch_of(value)).item() == total(value)
    assert function.calls == 8 and calls.captured == len(cuda.graphs) == 2
    assert notes == [] and calls.reason is None


def test_what_is_returned_is_overwritten(cuda):
    # As documented: the tensor of the capture, with the last call's value.
    calls = GraphedCalls(Sums(cuda), warmup=1)
    calls(batch_of(1))
    first, second = calls(batch_of(2)), calls(batch_of(3))
    assert first is second and first.item() == total(3)


def test_the_pool_of_masks_may_have_any_length(cuda):
    # It has another in every batch: one graph serves them, until one is larger than the copy has room for.
    function = Sums(cuda)
    calls = GraphedCalls(function, warmup=2)
    for length in (5, 0, 1000, LEAST_POOL):
        calls(batch_of(1, pool=length))
    assert calls.captured == 1 and function.calls == 3
    calls(batch_of(1, pool=LEAST_POOL + 1))
    assert calls.captured == 0
    for length in (5, LEAST_POOL + 1, 2 * LEAST_POOL):
        assert calls(batch_of(2, pool=length)).item() == total(2)
    assert calls.captured == 1


def test_shapes_beyond_the_limit_run_without(cuda):
    # Each graph holds memory; the ones there are go on, and the sentence is said once.
    function, notes = Sums(cuda), []
    calls = GraphedCalls(function, warmup=1, limit=2, on_note=notes.append)
    for _ in range(3):
        for side in (32, 64, 96):
            assert calls(batch_of(1, (side, 32))).item() == total(1, (side, 32))
    assert calls.captured == 2 and function.calls == 2 + 2 + 3
    assert notes == ["no CUDA graph for more than 2 shapes of batches: the others run without"]


def test_a_function_that_waits_is_not_captured(cuda):
    # Found in the last call before the capture, which would fail in the middle; that call is repeated.
    function, notes = Sums(cuda), []
    function.waits = True
    calls = GraphedCalls(function, on_note=notes.append)
    for value in range(1, 6):
        assert calls(batch_of(value)).item() == total(value)
    assert not cuda.graphs and not cuda.watching
    assert notes == [
        "no CUDA graphs: the host waits for the device (RuntimeError: called a synchronizing CUDA operation)"
    ]
    assert calls.reason == notes[0].removeprefix("no CUDA graphs: ")


def test_a_capture_that_fails_leaves_the_function(cuda):
    function, notes = Sums(cuda), []
    calls = GraphedCalls(function, warmup=1, on_note=notes.append)
    calls(batch_of(1))
    function.fails = True
    for value in (2, 3):
        assert calls(batch_of(value)).item() == total(value)
    assert calls.captured == 0
    assert notes == [
        "no CUDA graphs: capturing failed (RuntimeError: CUDA error: operation not permitted when stream is capturing)"
    ]


def test_a_capture_that_is_invalidated_ends_the_process(cuda):
    # PyTorch cannot be used after it: a step that draws random numbers would fail for another reason.
    function = Sums(cuda)
    calls = GraphedCalls(function, warmup=1)
    calls(batch_of(1))
    function.fails = cuda.invalidated = True
    with pytest.raises(
        GraphError, match=r"\(RuntimeError: CUDA error: operation not permitted .*run without --cuda-graphs"
    ):
        calls(batch_of(2))
    assert function.calls == 2


def test_the_pool_goes_with_its_last_graph(cuda):
    # PyTorch refuses a handle whose graphs are gone.
    calls = GraphedCalls(Sums(cuda), warmup=1)
    for length in (5, 5, LEAST_POOL + 1, 5):
        calls(batch_of(1, pool=length))
    assert cuda.pools == 2
    for _ in range(2):
        calls(batch_of(1, (64, 32)))
    assert cuda.pools == 2 and calls.captured == 2


def test_other_errors_are_the_callers(cuda):
    # Not a reason to do without graphs: raised, in the watched call too, which is not left watching.
    def broken(batch):
        raise RuntimeError("shapes do not fit")

    calls = GraphedCalls(broken, warmup=1)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        calls(batch_of(1))
    assert not cuda.watching and calls.reason is None


def test_without_a_gpu_the_function_is_called():
    notes = []
    calls = GraphedCalls(lambda batch: batch.images.sum(), on_note=notes.append)
    for value in (1, 2):
        assert calls(batch_of(value)).item() == total(value)
    assert notes == ["no CUDA graphs: CUDA graphs need a GPU"] and calls.captured == 0


def test_a_static_batch_stays_where_it_is():
    # Every tensor, the masks' too, takes the new values in the old memory.
    batch = batch_of(1, pool=7)
    static = StaticBatch(batch)
    places = [t.data_ptr() for t in tensors(static.batch)]
    for value in (1, 9):
        static.fill(batch_of(value, pool=7))
        for own, given in zip(tensors(static.batch), tensors(batch_of(value, pool=7)), strict=True):
            assert torch.equal(own[: len(given)], given)
    assert [t.data_ptr() for t in tensors(static.batch)] == places
    assert len(tensors(batch)) == 2 + 3 + 4 and static.batch.image_ids == batch.image_ids


def test_a_batch_without_targets():
    # As in inference.
    batch = batch_of(3)
    batch.targets = None
    static = StaticBatch(batch)
    static.fill(batch)
    assert static.holds(batch) and torch.equal(static.batch.images, batch.images)
    assert shape_key(batch) != shape_key(batch_of(3))


def test_shapes_that_one_graph_cannot_take():
    # Bytes or bits are compiled into the kernels; the length of the pool is not.
    key = shape_key(batch_of(1))
    assert key == shape_key(batch_of(2, pool=50))
    assert key != shape_key(batch_of(1, packed=False)) and key != shape_key(batch_of(1, (64, 32)))
    floats = batch_of(1)
    floats.images = floats.images.float()
    assert key != shape_key(floats)
