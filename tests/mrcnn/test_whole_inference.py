"""Images to detections as one graph: no graph break, no data-dependent shape, nothing that waits for the device.

With the Triton ops, as on a GPU. What is inside the ops is tested in tests/kernels/test_registration.py.
"""

import dataclasses
import functools
import importlib
import io
from collections import Counter

import pytest
import torch
from forbid_sync import forbid_sync
from model_inputs import FEW, shapes_batch
from test_whole_step import no_waiting_on_a_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kernels import use_backend
from kernels.runtime import record_launches
from mrcnn import inference
from mrcnn.inference import Detector, detect
from mrcnn.modeling import MaskRCNN
from mrcnn.modeling.detections import Detections

# Every way through the stages is in one of these.
OPTIONS = {
    "torchvision's": {},
    "tutorial's, canvas": {
        "objectness": "softmax", "anchor_sizes": (16, 32, 64, 128), "anchor_scales": (0.5, 1.0, 2.0),
        "mask_loss": "canvas",
    },
    "detectron2's, softmax": {"roi_aligned": True, "sampling_ratio": 0, "mask_loss": "softmax"},
}  # fmt: skip
OPS = {"topk_keys", "decode_proposals", "nms_mask", "roi_align_forward"}
FIELDS = [field.name for field in dataclasses.fields(Detections)]
SLOTS = 6


def few(option: str, device: torch.device | None = None) -> MaskRCNN:
    """Weights whose outputs are of the size that trained ones have."""
    torch.manual_seed(0)
    model = MaskRCNN(dataclasses.replace(FEW, max_detections=SLOTS, **OPTIONS[option])).eval()
    with torch.no_grad():
        model.box_head.classes.weight.mul_(8)
        model.box_head.deltas.weight.mul_(2)
        model.mask_head.logits.bias.add_(torch.linspace(-1, 1, 4))
    return model if device is None else model.to(device)


@torch.no_grad()
def choosy(option: str, batch, device: torch.device | None = None) -> MaskRCNN:
    """With a threshold that one of two images' scores are below: it has no detection, the other has some."""
    model = few(option, device)
    model.configure(score_threshold=0.0)
    scores = model(batch.images, batch.sizes).scores
    assert (scores[:, 0] - scores[:, 0].flip(0)).abs().min() > 1e-3
    worse, better = scores[:, 0].argsort()
    between = scores[better][scores[better] > scores[worse, 0]]
    model.configure(score_threshold=float((scores[worse, 0] + between[-1]) / 2))
    return model


def check_not_vacuous(found: Detections) -> None:
    """One image with detections, one without; empty slots hold zeros."""
    count = found.count.tolist()
    assert min(count) == 0 and max(count) > 0, count
    filled = torch.arange(SLOTS, device=found.count.device) < found.count[:, None]
    assert torch.equal(found.labels > 0, filled) and torch.equal(found.scores > 0, filled)
    for name in FIELDS[:4]:
        field = getattr(found, name)
        assert field.isfinite().all() and not field[~filled].any() and field[filled].any(), name
    masks = found.masks[filled]
    assert masks.min() >= 0 and masks.max() <= 1 and masks.std() > 0


def check_equal(found: Detections, wanted: Detections) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def op_names(graph: torch.fx.GraphModule) -> set[str]:
    """This project's operators in a graph and in those inside it."""
    nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    return {str(node.target).split(".")[1] for node in nodes if str(node.target).startswith("kernels.")}


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them by way of AOT autograd."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_detection_is_one_graph(option, device):
    # fullgraph=True raises at the first graph break. The graph holds the Triton ops' own nodes.
    batch, graphs = shapes_batch().to(device), Graphs()
    model = choosy(option, batch, device)
    torch._dynamo.reset()
    with use_backend("triton"):
        found = torch.compile(model, fullgraph=True, dynamic=False, backend=graphs)(batch.images, batch.sizes)
        check_equal(found, model(batch.images, batch.sizes))
    check_not_vacuous(found)
    (graph,) = graphs
    assert op_names(graph) == OPS


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_exported_program_detects_the_same(strict, backend, device):
    # Under no_grad, as one graph; strict is by Dynamo, which reads the source; the other traces what runs.
    batch = shapes_batch().to(device)
    model = choosy("torchvision's", batch, device)
    with use_backend(backend):
        program = torch.export.export(model, (batch.images, batch.sizes), strict=strict)
    assert op_names(program.graph_module) == (OPS if backend == "triton" else {"nms_mask_waiting"})
    others = batch.images.flip(0), batch.sizes.flip(0)  # the detections are not those of the images it was made with
    found = program.module()(*others)  # the backend is part of the program
    with use_backend(backend):
        check_equal(found, model(*others))
    check_not_vacuous(found)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_can_be_exported_and_saved(option, device):
    # With gradients enabled, too, as export is often called; a file holds the program.
    batch = shapes_batch().to(device)
    model = choosy(option, batch, device)
    with use_backend("triton"):
        program = torch.export.export(model, (batch.images, batch.sizes))
    assert op_names(program.graph_module) == OPS
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad(), use_backend("triton"):
        wanted = model(batch.images, batch.sizes)
        found = torch.export.load(file).module()(batch.images, batch.sizes)
    check_not_vacuous(wanted)
    check_equal(found, wanted)


@pytest.mark.parametrize("option", OPTIONS)
def test_no_shape_depends_on_data(option):
    # Tensors that have shapes but no values: a nonzero(), an item() or a boolean index anywhere would raise.
    batch = shapes_batch()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, use_backend("triton"), record_launches(), torch.no_grad():
        model = MaskRCNN(dataclasses.replace(FEW, max_detections=SLOTS, **OPTIONS[option])).eval()
        found = model(mode.from_tensor(batch.images), mode.from_tensor(batch.sizes))
    shapes = {name: tuple(getattr(found, name).shape) for name in FIELDS}
    rows = (2, SLOTS)
    assert shapes == {"boxes": (*rows, 4), "labels": rows, "scores": rows, "masks": (*rows, 28, 28), "count": (2,)}
    assert found.labels.dtype == torch.int64 and found.count.dtype == torch.int32


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_waits_for_the_device(option, device, monkeypatch):
    # They look at indices on a CPU only, where nothing waits.
    for op in ("roi_align", "proposals"):
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}.op"), "check_indices", lambda *args, **kwargs: None)
    batch = shapes_batch().to(device)
    model = choosy(option, batch, device)  # first calls compile and look around
    detector = Detector(model)
    with use_backend("triton"), forbid_sync(), no_waiting_on_a_gpu(device):
        found = detector(batch)
    check_not_vacuous(found)


class Waits(TorchFunctionMode):
    """Counts what copies a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.cpu, Tensor.tolist, Tensor.item):
            self.calls[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_results_are_copied_at_once():
    # One wait for everything small, of all images; one for each image's masks.
    batch = shapes_batch()
    model = few("torchvision's")
    model.configure(score_threshold=0.0)
    found = model(batch.images, batch.sizes)
    sizes = [(64, 64), (64, 64)]
    with Waits() as waits, use_backend("triton"):  # as on a GPU: the reference looks at boxes on the host
        assert len(list(found.on_originals(sizes, [(50, 90), (64, 64)]))) == 2
    assert waits.calls == {"cpu": 1 + 2}
    with Waits() as waits:
        found.by_image()
    assert waits.calls == {"tolist": 1}


@torch.no_grad()
@pytest.mark.parametrize("rle", [False, True])
def test_originals_of_a_batch_are_those_of_its_images(rle, device):
    # An image with detections, one without, each of another size.
    batch = shapes_batch().to(device)
    model = choosy("torchvision's", batch, device)
    found = model(batch.images, batch.sizes)
    check_not_vacuous(found)
    sizes, originals = [(64, 64), (40, 64)], [(50, 90), (128, 32)]
    together = list(found.on_originals(sizes, originals, rle=rle))
    for one, all_, size, original in zip(found.by_image(), together, sizes, originals, strict=True):
        alone = one.on_original(size, original, rle=rle)
        assert alone.keys() == all_.keys() and len(all_["masks"]) == len(one.labels)
        for name, value in alone.items():
            if isinstance(value, Tensor):
                assert all_[name].device.type == "cpu" and all_[name].dtype == value.dtype
                assert torch.equal(all_[name], value.cpu()), name
            else:
                assert all_[name] == value and rle


@torch.no_grad()
def test_detector_compiled_and_captured(device, monkeypatch):
    # All forms detect the same, and targets, names and original sizes are no part of what is compiled.
    graphs, notes = Graphs(), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    batch = shapes_batch()
    model = choosy("torchvision's", batch.to(device), device)
    torch._dynamo.reset()
    ways = [{}, {"compile": True}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}]
    wanted = Detector(model.train())(batch)
    check_not_vacuous(wanted)
    assert not model.training
    for way in ways:
        detector = Detector(model, on_note=notes.append, **way)
        for number in range(5):  # on a GPU the fourth is captured and the fifth replayed
            other = dataclasses.replace(batch, image_ids=[number, 7], targets=None if number % 2 else batch.targets)
            check_equal(detector(other), wanted)
    assert len(graphs) == 1  # both have the same one
    assert len(notes) == (0 if device.type == "cuda" else 2), notes


@torch.no_grad()
def test_a_graph_depends_on_images_and_sizes_alone(monkeypatch):
    # Ground truth is of another size in every batch: no copy of it, or each would be captured anew.
    seen, batch = [], shapes_batch()
    captured = lambda function, on_note: lambda batch: seen.append(batch) or function(batch)
    monkeypatch.setattr(inference, "GraphedCalls", captured)
    Detector(few("torchvision's"), cuda_graphs=True)(batch)
    (given,) = seen
    tensors = [name for name, value in vars(given).items() if isinstance(value, Tensor)]
    assert tensors == ["images", "sizes"] and given.targets is None and batch.targets is not None


@torch.no_grad()
def test_detect_takes_a_detector():
    batch = shapes_batch()
    model = choosy("torchvision's", batch)
    ours, theirs = list(detect(Detector(model), batch)), list(detect(model, batch))
    assert [image for image, _ in ours] == batch.image_ids
    assert sorted(len(found["labels"]) > 0 for _, found in ours) == [False, True]
    for (_, found), (_, wanted) in zip(ours, theirs, strict=True):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "error", [torch._dynamo.exc.TorchDynamoException("no compiler"), RuntimeError("out of memory")]
)
def test_detector_without_a_compiler(error, device, monkeypatch):
    # It detects as it is, and says so once; an error of the model itself is the caller's.
    def compiled(*args):
        raise error

    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled)
    model, batch, notes = few("torchvision's", device).eval(), shapes_batch().to(device), []
    detector = Detector(model, compile=True, on_note=notes.append)
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        with pytest.raises(RuntimeError, match="out of memory"):
            detector(batch)
        return
    for _ in range(2):
        assert torch.equal(detector(batch).boxes, Detector(model)(batch).boxes)
    assert notes == ["not compiled: TorchDynamoException: no compiler"]
