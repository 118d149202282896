"""Images to losses as one graph: no graph break, no data-dependent shape, nothing that waits for the device.

With the Triton ops, as on a GPU. What is inside the ops is tested in tests/kernels/test_registration.py.
"""

import dataclasses
import importlib
from contextlib import contextmanager

import pytest
import torch
from forbid_sync import forbid_sync
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from model_inputs import FEW, shapes_batch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import use_backend
from kernels.runtime import record_launches
from mrcnn.modeling import MaskRCNN, canvas
from mrcnn.structures import Targets

# Every way through the stages is in one of these.
OPTIONS = {
    "torchvision's": {},
    "tutorial's, hard negatives, canvas": {
        "objectness": "softmax", "anchor_sizes": (16, 32, 64, 128), "anchor_scales": (0.5, 1.0, 2.0),
        "rpn_low_inclusive": True, "rpn_require_overlap": True, "rpn_sampling": "hard", "rpn_negative_ratio": 3.0,
        "rpn_class_normalizer": "slots", "rpn_box_normalizer": "cells", "mask_loss": "canvas",
    },
    "detectron2's, softmax": {
        "roi_aligned": True, "sampling_ratio": 0, "mask_target": "binary", "box_beta": 0.0,
        "rpn_class_normalizer": "positives", "mask_loss": "softmax",
    },
}  # fmt: skip
OPS = {
    *("label_grid_anchors", "rpn_loss_rows", "topk_keys", "decode_proposals", "nms_mask"),
    *("label_anchors", "roi_align_forward"),
}


def few(option: str, device: torch.device | None = None) -> MaskRCNN:
    torch.manual_seed(0)
    model = MaskRCNN(dataclasses.replace(FEW, **OPTIONS[option])).train()
    return model if device is None else model.to(device)


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs none of them."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return lambda *args: [torch.zeros(())] * 5  # the five losses


@pytest.mark.parametrize("option", OPTIONS)
def test_forward_and_losses_are_one_graph(option, device):
    # fullgraph=True raises at the first graph break. The graph holds the Triton ops' own nodes.
    batch, model, graphs = shapes_batch().to(device), few(option, device), Graphs()
    torch._dynamo.reset()
    with use_backend("triton"):
        losses = torch.compile(model, fullgraph=True, backend=graphs)(batch.images, batch.sizes, batch.targets)
    assert len(losses) == 5
    (graph,) = graphs
    nodes = {str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("kernels.")}
    forms = {"bce": {"mask_targets", "mask_predictor_forward"}, "softmax": {"mask_targets"}, "canvas": set()}
    assert nodes == OPS | forms[model.config.mask_loss]


def test_images_of_many_sizes_share_a_graph(device):
    # Multi-scale training: the second size makes the sizes symbols; after that hardly anything is compiled again, where
    # a graph a size would reach torch.compile's limit of eight. (PyTorch 2.11 also tells odd from even sides of P5.)
    model, graphs = few("torchvision's", device), Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    batch = shapes_batch()
    for size in ((64, 64), (64, 128), (128, 192), (192, 256), (256, 128), (320, 192)):
        padded = dataclasses.replace(batch, images=torch.zeros(2, 3, *size, dtype=torch.uint8)).to(device)
        with use_backend("triton"):
            compiled(padded.images, padded.sizes, padded.targets)
    assert len(graphs) <= 4


def test_compiled_losses_and_gradients_are_the_eager_ones(device):
    # Backward comes through AOT autograd; the kernels really run. The same seed draws the same samples.
    batch = shapes_batch().to(device)
    model = few("torchvision's", device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        torch.manual_seed(3)
        model.zero_grad()
        with use_backend("triton"):
            losses = run(batch.images, batch.sizes, batch.targets)
            sum(losses.values()).backward()
        results.append((losses, {n: p.grad.clone() for n, p in model.named_parameters()}))
    (losses, grads), (expected_losses, expected_grads) = results
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss, msg=name)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_what_forward_keeps_for_backward(device):
    # The partitioner's graphs under bf16, as they go to the code generator. Backward holds the Triton ops' own nodes.
    # Kept are half types, but for vectors and the ops' tables; every weight is scaled by its norm and cast once a step,
    # not again in backward; and of the frozen stages nothing is kept.
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    model = MaskRCNN(dataclasses.replace(FEW, norm="frozen_bn", frozen_stages=2)).train().to(device)
    batch = shapes_batch().to(device)
    torch._dynamo.reset()
    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    with use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        losses = torch.compile(model, fullgraph=True, backend=backend)(batch.images, batch.sizes, batch.targets)
    sum(losses.values()).backward()
    _, backward = graphs
    nodes = {str(node.target).split(".")[1] for node in backward.graph.nodes if str(node.target).startswith("kernels.")}
    assert nodes == {"rpn_loss_rows_backward", "roi_align_backward", "mask_predictor_features", "mask_predictor_weight"}
    kept = [node.meta["val"] for node in backward.graph.nodes if node.op == "placeholder"]
    maps = [k for k in kept if k.ndim == 4 and k.is_floating_point() and k.numel() > 1024]
    weights = [p for p in model.parameters() if p.ndim == 4 and p.numel() > 1024]
    assert maps and all(k.dtype == torch.bfloat16 for k in maps), [(tuple(k.shape), k.dtype) for k in maps]
    assert len(weights) > 20 and not any(k.dtype == torch.float32 and k.shape == w.shape for k in kept for w in weights)
    assert max(k.shape[-1] * k.shape[-2] for k in maps if k.shape[0] == 2) == 16 * 16  # P2 and C2's output, no stem


@pytest.mark.parametrize("option", OPTIONS)
def test_no_shape_depends_on_data(option):
    # Images to losses and gradients with tensors that have shapes but no values: a nonzero(), an item() or a boolean
    # index anywhere would raise.
    batch = shapes_batch()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, use_backend("triton"), record_launches():
        model = few(option)
        images, sizes = mode.from_tensor(batch.images), mode.from_tensor(batch.sizes)
        t = batch.targets
        found = {f.name: mode.from_tensor(getattr(t, f.name)) for f in dataclasses.fields(Targets) if f.name != "masks"}
        targets = Targets(**found, masks=t.masks.map(mode.from_tensor))
        losses = model(images, sizes, targets)
        sum(losses.values()).backward()
    assert all(loss.shape == () for loss in losses.values())
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_waits_for_the_device(option, device, monkeypatch):
    # Real values: forward and backward, with everything forbidden that makes a GPU's host wait. (On a GPU PyTorch
    # itself sees some that a CPU cannot show, such as copies from pageable memory.)
    # They look at indices on a CPU only, where nothing waits.
    for op in ("roi_align", "mask_bce_loss", "mask_targets", "rpn_loss", "proposals"):
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}.op"), "check_indices", lambda *args, **kwargs: None)
    batch, model = shapes_batch().to(device), few(option, device)
    with use_backend("triton"):
        model(batch.images, batch.sizes, batch.targets)  # first calls compile and look around
        with forbid_sync(), no_waiting_on_a_gpu(device):
            losses = model(batch.images, batch.sizes, batch.targets)
            sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@contextmanager
def no_waiting_on_a_gpu(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_the_models_own_operator_does_not_wait():
    # The context above does not see inside registered operators.
    t = shapes_batch().targets
    with forbid_sync():
        classes = canvas._paint._init_fn(*t.masks.flat(), t.labels)
    assert sorted(classes.unique().tolist()) == sorted({0, *t.labels.flatten().tolist()})


def test_the_models_own_operator_is_registered_rightly():
    t = shapes_batch().targets
    torch.library.opcheck(canvas._paint, (*t.masks.flat(), t.labels))


def test_features_are_channels_last_all_the_way(device):
    # A model in channels_last, as on a GPU, keeps it: no stage turns a map or a pooled RoI back.
    model = few("torchvision's").to(device, memory_format=torch.channels_last)
    batch = shapes_batch().to(device)
    seen = {}

    def watch(name):
        def hook(module, inputs, output):
            maps = output if isinstance(output, list) else [output]
            seen.setdefault(name, []).extend(m for m in maps if m.ndim == 4 and min(m.shape[1:]) > 1)

        return hook

    for name in ("backbone", "fpn", "pooler", "mask_head.convs", "mask_head"):
        model.get_submodule(name).register_forward_hook(watch(name))
    images = model.normalize(batch.images, batch.sizes).contiguous(memory_format=torch.channels_last)
    with use_backend("triton"):
        model(images, batch.sizes, batch.targets)
    assert len(seen) == 5 and len(seen["pooler"]) == 2
    for name, maps in seen.items():
        assert maps, name
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps), name
