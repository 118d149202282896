"""Which source a result was measured with: a hash that comments, docstrings and empty lines do not change."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
SHARED = ("backend.py", "checks.py", "device.py", "runtime.py")
PROVIDERS = ("providers.py", "rpn_providers.py", "mask_providers.py")
MODELS = ("floors.py", "roi_floors.py", "rpn_floors.py", "mask_floors.py")
_GRID = ("anchors.py", "device_anchors.py")
_MASK_LOSS = ("mask_bce_loss", "device_bce.py", "layouts.py")
FOLDERS = {  # of each op: its folder, and the folders and files of kernels/ that it takes from
    "roi_align": ("roi_align", "layouts.py"),
    "multiscale_roi_align": ("roi_align", "layouts.py"),
    "joint_multiscale_roi_align": ("roi_align", "layouts.py"),
    "box_iou": ("box_iou",),
    "label_grid_anchors": ("label_anchors", "box_iou", *_GRID),  # the reference forms the matrix
    "label_anchors": ("label_anchors", "box_iou", *_GRID),
    "rpn_loss": ("rpn_loss", "boxes.py", *_GRID),
    "stable_topk": ("proposals", "boxes.py", *_GRID),
    "decode_proposals": ("proposals", "boxes.py", *_GRID),
    "nms_mask": ("nms", "box_iou"),
    "mask_predictor_loss": ("mask_predictor_loss", *_MASK_LOSS),
    "mask_targets": ("mask_targets", "mask_pool.py"),
    "paste_masks": ("paste_masks",),
    "mask_bce_loss": _MASK_LOSS,
}


@functools.cache
def source_hash(op: str) -> str:
    """Hash of all code of `kernels/` that the op runs, and of how the baselines are called."""
    files = [*(ROOT / "bench" / name for name in PROVIDERS), *(KERNELS / name for name in SHARED)]
    for name in FOLDERS[op]:
        files += [KERNELS / name] if name.endswith(".py") else sorted((KERNELS / name).glob("*.py"))
    return _hash(files)


@functools.cache
def model_hash() -> str:
    """Hash of the code that counts floors: mended, it is applied to old times too."""
    return _hash([ROOT / "bench" / name for name in MODELS])


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT).as_posix()}\n{code_of(file.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:12]


def code_of(source: str) -> str:
    """`source` without docstrings, comment lines and empty lines: rewording must not make a measurement stale.

    It drops lines rather than printing the syntax tree, which differs between releases of Python.
    """
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            dropped.update(range(text.lineno, text.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(
        line.rstrip() for n, line in lines if n not in dropped and line.strip() and not line.strip().startswith("#")
    )
