"""Choosing an implementation, and the folder on its own: without Triton, and under another name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend, box_iou, label_anchors, launch_counts, roi_align, use_backend

KERNELS = Path(kernels.__file__).parent


def run(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a fresh process that imports from `path`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=path, env=env, capture_output=True, text=True, timeout=300)


ALL_OPS = """
import torch
import {name} as k
f = [torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(1, 2, 4, 4)]
rois = torch.tensor([[0, 1.0, 1, 6, 7]])
k.roi_align(f[0], rois, 2, backend="{backend}").sum().backward()
k.multiscale_roi_align(f, rois, 2, [1.0, 0.5], backend="{backend}").sum().backward()
boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6]])
iou = k.box_iou(boxes, boxes, backend="{backend}")
labels, _ = k.label_anchors(boxes, boxes[None], torch.tensor([1]), backend="{backend}")
keep = k.nms_mask(boxes[None], torch.ones(1, 2, dtype=torch.bool), 0.1, backend="{backend}")
loss = k.mask_bce_loss(torch.zeros(1, 2, 3, 3), torch.tensor([1]), torch.ones(1, 3, 3), backend="{backend}")
print(round(iou[0, 1].item(), 4), labels.tolist(), keep.tolist(), round(loss.item(), 4), k.HAS_TRITON)
"""


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_everything_works_without_triton(backend):
    # A machine without Triton (macOS, Windows): import blocked, the PyTorch backend serves.
    blocked = "import sys; sys.modules['triton'] = None\n" + ALL_OPS.format(name="kernels", backend=backend)
    result = run(blocked, KERNELS.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.1429 [[1, 0]] [[True, False]] 0.6931 False"


def test_asking_for_triton_without_it_says_so():
    code = "import sys; sys.modules['triton'] = None\n" + ALL_OPS.format(name="kernels", backend="triton")
    result = run(code, KERNELS.parent)
    assert "RuntimeError: backend='triton' needs the triton package" in result.stderr


def test_triton_on_cpu_tensors_says_how():
    # Outside the interpreter the error names the variable that would make it work.
    result = run(ALL_OPS.format(name="kernels", backend="triton"), KERNELS.parent)
    assert "set TRITON_INTERPRET=1 before Python starts" in result.stderr


def test_a_copy_under_another_name(tmp_path):
    # A project copies the folder; both copies can live in one process (torch.library names are global).
    shutil.copytree(KERNELS, tmp_path / "detection_ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import kernels" + ALL_OPS.format(name="detection_ops", backend="triton")
    if torch.cuda.is_available():
        code = code.replace("import torch\n", "import torch\ntorch.set_default_device('cuda')\n")
    result = run(code, tmp_path, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.1429 [[1, 0]] [[True, False]] 0.6931 True"


def test_use_backend_decides_for_auto_only(device):
    # Seen by which kernels were launched; an explicit backend wins, and the block's end restores.
    boxes = torch.tensor([[0.0, 0, 1, 1]], device=device)
    launch_counts.clear()
    with use_backend("triton"):
        box_iou(boxes, boxes)
        assert launch_counts["box_iou_kernel"] == 1
        box_iou(boxes, boxes, backend="torch")
        assert launch_counts["box_iou_kernel"] == 1
        with use_backend("torch"):
            box_iou(boxes, boxes)
        assert launch_counts["box_iou_kernel"] == 1
        box_iou(boxes, boxes)
    assert launch_counts["box_iou_kernel"] == 2
    if device.type == "cpu":
        box_iou(boxes, boxes)  # auto on a CPU is the reference, also where the interpreter is on
        assert launch_counts["box_iou_kernel"] == 2
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, triton, torch, torchvision"):
        use_backend("cuda").__enter__()


def test_use_backend_of_some_ops(device):
    # One op at a time, inside another choice for the rest: what an ablation does.
    boxes = torch.tensor([[0.0, 0, 1, 1]], device=device)
    count = torch.tensor([1], device=device)
    launch_counts.clear()
    with use_backend("triton"):
        with use_backend("torch", only=("box_iou",)):
            box_iou(boxes, boxes)
            assert launch_counts["box_iou_kernel"] == 0
            label_anchors(boxes, boxes[None], count)  # another op: still Triton
            assert launch_counts["label_anchors_kernel"] == 1
            with use_backend("triton"):  # of all ops, this one too
                box_iou(boxes, boxes)
            assert launch_counts["box_iou_kernel"] == 1
            with use_backend("torch", only="label_anchors"):  # a name alone; box_iou stays as it was chosen
                label_anchors(boxes, boxes[None], count)
                box_iou(boxes, boxes)
            assert launch_counts["label_anchors_kernel"] == launch_counts["box_iou_kernel"] == 1
        box_iou(boxes, boxes)
    assert launch_counts["box_iou_kernel"] == 2
    with pytest.raises(ValueError, match="unknown op 'nms_mask'; only= takes roi_align, box_iou, "):
        use_backend("torch", only=["nms_mask"]).__enter__()


def test_every_op_has_a_name():
    # An op without one could not be chosen alone; a name that no op has would be taken and do nothing.
    found = set()
    for path in KERNELS.rglob("*.py"):
        found |= set(re.findall(r'choose_backend\(backend, [\w\[\]]+, "(\w+)"', path.read_text()))
        assert "choose_backend(backend, " not in re.sub(r'choose_backend\(backend, [\w\[\]]+, "', "", path.read_text())
    assert found == set(backend.OPS)


def test_without_torchvision(monkeypatch):
    # Then "auto" on a CPU is the reference for RoIAlign too, and asking for torchvision says what is missing.
    features, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0, 1.0, 1, 6, 7]])
    expected = roi_align(features, rois, 2, backend="torch")
    monkeypatch.setattr(backend, "_HAS_TORCHVISION", False)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)  # importing from it would fail
    assert torch.equal(roi_align(features, rois, 2), expected)
    with pytest.raises(RuntimeError, match="needs the torchvision package, which is not installed"):
        roi_align(features, rois, 2, backend="torchvision")
