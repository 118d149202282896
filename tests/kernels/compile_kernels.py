"""Compile every kernel for one target without a GPU and check what its assembly promises."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.box_iou.kernel import box_iou_backward_kernel, box_iou_kernel
from kernels.label_anchors.kernel import best_iou_of_gt_kernel, label_anchors_kernel
from kernels.mask_bce_loss.kernel import mask_bce_backward_kernel, mask_bce_forward_kernel
from kernels.roi_align.kernel import roi_align_backward_kernel, roi_align_forward_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_for(target: GPUTarget, kernel, types: dict, constants: dict, exact: bool = True) -> None:
    """Compile `kernel` as it is launched: pointers aligned to 16 bytes, fused multiply-adds off.

    In `exact` kernels the assembly itself must show IEEE division and nothing fused, so that a changed default of
    Triton's cannot move a label or a RoI's grid.
    """
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            attributes |= {(i, j): aligned for j, k in enumerate(kind) if k[0] == "*"}
        elif kind[0] == "*":
            attributes[(i,)] = aligned
    source = ASTSource(kernel, signature, constants, attributes)
    assembly = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm.get("ptx", "")
    if exact and assembly:
        assert "div.full" not in assembly and "div.rn" in assembly, f"{kernel.__name__}: the division is not IEEE"
        assert "fma.rn.f32" not in assembly, f"{kernel.__name__}: operations are fused"
    print("ok", kernel.__name__)


def roi_align(target: GPUTarget) -> None:
    # (features, channels_last, levels): what trains, the drop-in for torchvision's op, and gradcheck's.
    cases = [("bf16", True, 4), ("fp16", True, 4), ("fp32", True, 4), ("fp32", False, 1), ("bf16", False, 1)]
    for dtype, channels_last, levels in [*cases, ("fp64", False, 4)]:
        wide = "*fp64" if dtype == "fp64" else "*fp32"
        types = {
            "features": (f"*{dtype}",) * levels, "grads": (wide,) * levels, "rois_ptr": wide, "out_ptr": f"*{dtype}",
            "grad_out_ptr": f"*{dtype}", "batch_size": "i32", "channels": "i32", "heights": ("i32",) * levels,
            "widths": ("i32",) * levels,
        }  # fmt: skip
        constants = {
            "SCALES": (1 / 4, 1 / 8, 1 / 16, 1 / 32)[:levels], "THRESHOLDS": (1.0, 2.0, 3.0)[: levels - 1],
            "LEVELS": levels, "POOLED_H": 7,
            "POOLED_W": 7, "SAMPLING_RATIO": 2 if channels_last else 0, "ALIGNED": False,
            "CHANNELS_LAST": channels_last, "BLOCK_BINS": 8, "BLOCK_C": 128,
        }  # fmt: skip
        for kernel in (roi_align_forward_kernel, roi_align_backward_kernel):
            compile_for(target, kernel, types, constants)


def boxes(target: GPUTarget) -> None:
    for dtype, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        types = {
            "boxes1_ptr": f"*{dtype}", "boxes2_ptr": f"*{dtype}", "iou_ptr": f"*{wide}", "grad_iou_ptr": f"*{wide}",
            "grad1_ptr": f"*{dtype}", "n": "i32", "m": "i32", "stride_b": "i32", "stride_n": "i32", "stride_m": "i32",
        }  # fmt: skip
        compile_for(target, box_iou_kernel, types, {"BLOCK_N": 16, "BLOCK_M": 128})
        compile_for(target, box_iou_backward_kernel, types, {"BLOCK_N": 16, "BLOCK_M": 128})
    types = {
        "anchors_ptr": "*fp32", "gt_ptr": "*fp32", "count_ptr": "*i32", "partial_ptr": "*fp32",
        "best_of_gt_ptr": "*fp32", "labels_ptr": "*i8", "matched_ptr": "*i32", "num_anchors": "i32", "num_gt": "i32",
        "anchors_per_split": "i32", "high_threshold": "fp32", "low_threshold": "fp32",
    }  # fmt: skip
    compile_for(target, best_iou_of_gt_kernel, types, {"BLOCK_G": 8, "BLOCK_A": 256})
    compile_for(target, label_anchors_kernel, types, {"BLOCK_A": 512, "LOW_QUALITY": True})


def mask_loss(target: GPUTarget) -> None:
    for dtype, target_dtype, wide in (("bf16", "fp32", "fp32"), ("fp32", "u8", "fp32"), ("fp64", "fp64", "fp64")):
        types = {
            "logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "targets_ptr": f"*{target_dtype}", "loss_ptr": f"*{wide}",
            "grad_loss_ptr": f"*{wide}", "grad_ptr": f"*{dtype}", "num_classes": "i32",
        }  # fmt: skip
        types |= {f"{p}stride_{axis}": "i32" for p in ("", "grad_") for axis in "nkyx"}
        for kernel in (mask_bce_forward_kernel, mask_bce_backward_kernel):
            compile_for(target, kernel, types, {"PIXELS": 784, "WIDTH": 28, "BLOCK": 1024}, exact=False)


if __name__ == "__main__":
    chosen = TARGETS[sys.argv[1]]
    roi_align(chosen)
    boxes(chosen)
    mask_loss(chosen)
