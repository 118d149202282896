"""Launches, waits and groups of kernels, from traces that were made up."""

import pytest

from bench.step.clocks import summarise
from bench.step.kernels_in_trace import COPIES, MATRIX, OTHER, OURS, group_of, our_kernels, read_steps
from bench.step_profile.phases import PREFIX, STEP

# Names as profilers show them; each group once at least, and those that a careless order of patterns gets wrong.
KERNELS = {
    "roi_align_forward_kernel": OURS,
    "nms_sweep_kernel": OURS,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<Metadata<3>, FusedSgdMathFunctor<f>>": (
        "optimizer"
    ),
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": MATRIX,
    "cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8": MATRIX,
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": MATRIX,
    "void cudnn::cnn::wgrad2d_grouped_direct_kernel<float>": MATRIX,
    "triton_tem_fused_mm_3": MATRIX,
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>": COPIES,
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>": COPIES,
    "triton_poi_fused_convolution_relu_3": "Inductor, pointwise",
    "triton_red_fused_convolution_backward_sum_7": "Inductor, reductions",
    "triton_per_fused_mean_2": "Inductor, reductions",
    "void vision::ops::(anonymous namespace)::roi_align_forward_kernel_impl<float>": "torchvision's kernels",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "sorting and indexing",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": (
        "PyTorch, pointwise and reductions"
    ),
    "something_new": OTHER,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_told_apart(name):
    assert group_of(name, our_kernels()) == KERNELS[name]


def event(cat, name, ts, dur, **more):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, **more}


def trace(captured):
    """Two steps of 100 us, 1000 us apart, with a wait behind each."""
    for start in (0, 1000):
        yield event("user_annotation", PREFIX + STEP, start, 100)
        yield event("gpu_user_annotation", PREFIX + STEP, start, 100)  # its copy on the device is no step
        if captured:
            yield event("cuda_runtime", "cudaGraphLaunch_v10000", start + 10, 5)
        else:
            yield event("cuda_runtime", "cudaLaunchKernel", start + 10, 1)
            yield event("cuda_runtime", "cudaLaunchKernelExC_v11060", start + 20, 1)
            yield event("cuda_driver", "cuLaunchKernelEx", start + 30, 1)  # Triton's
            yield event("cuda_runtime", "cudaStreamSynchronize_v3020", start + 40, 1)
            yield event("cuda_runtime", "cudaMemcpyAsync", start + 45, 1)
        yield event("kernel", "nvjet_tst_128x256", start + 20, 3000)
        yield event("kernel", "roi_align_forward_kernel", start + 40, 500)
        yield event("gpu_memcpy", "Memcpy DtoD", start + 50, 250)
        yield event("cuda_runtime", "cudaDeviceSynchronize", start + 200, 50)  # ours, between the steps


def test_launches_waits_and_milliseconds_of_a_step():
    found = read_steps(list(trace(captured=False)), our_kernels())
    assert found["launches"] == 3 and found["graph_launches"] == 0 and found["kernels"] == 2
    assert found["waits"] == {"cudaStreamSynchronize": 1}
    assert found["groups"] == {MATRIX: 3.0, OURS: 0.5, COPIES: 0.25}
    assert found["ours"] == {"roi_align_forward_kernel": 0.5} and next(iter(found["top"])) == "nvjet_tst_128x256"


def test_a_captured_step_is_one_launch():
    found = read_steps(list(trace(captured=True)), our_kernels())
    assert (found["launches"], found["graph_launches"], found["waits"]) == (0, 1, {}) and found["kernels"] == 2


def test_our_kernels_are_found_in_the_sources():
    assert {"roi_align_gather_kernel", "rpn_loss_forward_kernel", "label_anchors_kernel"} <= our_kernels()


def test_clocks_are_summarised():
    found = summarise("1980, 512.5\n1755, 650.0\n1980, [N/A]\n\ngarbage\n")
    assert found == {"sm_mhz_min": 1755, "sm_mhz_median": 1980, "watts_median": 581.25}
    assert summarise("") == {}
