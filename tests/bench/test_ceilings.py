"""The microkernels behind the ceilings: right numbers, and assembly that does the work that is counted."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bench.ceilings import MULTIPLY_ADDS, READS, Ceilings, measure_ceilings

SIGNATURES = {
    "read_kernel": {"source_ptr": "*i32", "sums_ptr": "*i32", "blocks": "i32", "iterations": "i32"},
    "multiply_add_kernel": {"sums_ptr": "*fp32", "factor": "fp32", "term": "fp32", "iterations": "i32"},
}


def loop(name, constants, warps):
    """Compile for sm_90 as it is launched; the instructions of its only loop, or None if there is not exactly one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench import ceiling_kernels

    types = SIGNATURES[name] | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(types.items()) if t[0] == "*" or n == "blocks"
    }
    source = ASTSource(getattr(ceiling_kernels, name), types, constants, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        assembly = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels, instructions, loops = {}, [], []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA .*\((\.L_\S+)\)", instruction[1])
            if branch and labels.get(branch[1], len(instructions)) < len(instructions) - 1:  # back, and not to itself
                loops.append(instructions[labels[branch[1]] :])
    return loops[0] if len(loops) == 1 else None


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """Loops of every variant that is launched, from a process in which kernels are compiled and not interpreted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("t"))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_read_loop_reads_all_that_is_counted_from_l2(loops):
    # L1 hits, narrow loads or a load moved out of the loop would make the ceiling of L2 wrong.
    for (constants, warps, _), body in zip(READS, loops["read_kernel"], strict=True):
        loads = [i for i in body if re.search(r"\bLD", i)]
        assert all("LDG.E.128.STRONG.GPU" in i for i in loads), loads
        assert len(loads) * 4 * 32 * warps == constants["BLOCK"] * constants["READS"]  # of 4 words, no lane twice
        assert not any("STL" in i for i in body)
        assert len(body) < 12 * len(loads)  # far from being bound by instructions: four words take 16 cycles of an SM


def test_the_multiply_add_loop_holds_little_else(loops):
    # Instructions are counted as multiply-adds: folded ones would raise the ceiling, others in the loop lower it.
    for (constants, warps, _), body in zip(MULTIPLY_ADDS, loops["multiply_add_kernel"], strict=True):
        multiply_adds = sum(i.startswith("FFMA") for i in body)
        assert multiply_adds * 32 * warps == constants["CHAINS"] * constants["STEPS"]
        assert multiply_adds >= 64 and len(body) <= 1.03 * multiply_adds


def test_read_kernel_wraps_around(device):
    # 2 programs x 3 iterations x 2 blocks on a source of 8 blocks: the last 4 of 12 reads start over.
    from bench.ceiling_kernels import read_kernel

    source = torch.randint(-99, 99, (8 * 16,), dtype=torch.int32, device=device)
    sums = torch.zeros(2, dtype=torch.int32, device=device)
    read_kernel[(2,)](source, sums, 8, 3, BLOCK=16, READS=2)
    blocks = source.view(8, 16).sum(dim=1)
    expected = [sum(int(blocks[i % 8]) for i in range(program, 12, 2)) for program in range(2)]
    assert sums.tolist() == expected


def test_multiply_add_kernel(device):
    # Each chain must take every step: 2 x 3 of them, with a value of its own.
    from bench.ceiling_kernels import multiply_add_kernel

    sums, x = torch.zeros(2, device=device), torch.arange(64.0, dtype=torch.float64)
    multiply_add_kernel[(2,)](sums, 0.999, 0.5, 2, CHAINS=64, STEPS=3)
    for _ in range(6):
        x = 0.999 * x + 0.5
    torch.testing.assert_close(sums.cpu().double(), x.sum().repeat(2), rtol=1e-6, atol=0)


def test_ceilings_survive_json():
    # They are saved with the times, and read again when a report is written elsewhere.
    ceilings = Ceilings(4e12, 4.5e12, 3e12, 6e12, 9e11, 8e14, 50 << 20)
    assert Ceilings.from_dict(json.loads(json.dumps(ceilings.to_dict())) | {"added_later": 1}) == ceilings
    assert ceilings.dram_bytes_per_s == 4.5e12  # else a kernel that only reads could pass 100 %


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so():
    # A CPU's figures under these names would be worse than none.
    with pytest.raises(RuntimeError, match="no CUDA device"):
        measure_ceilings()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_ceilings_are_plausible():
    # L2 slower than memory, or more instructions than schedulers x clock, would mean that something else was timed.
    ceilings = measure_ceilings()
    assert ceilings.l2_bytes_per_s > ceilings.dram_bytes_per_s > 1e10
    assert 0.5 < ceilings.dram_copy_bytes_per_s / ceilings.dram_bytes_per_s <= 1
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert 1e8 < ceilings.issue_per_s / properties.multi_processor_count < 4 * 3.5e9
    assert ceilings.matmul_bf16_flops_per_s > 2 * 32 * ceilings.issue_per_s


if __name__ == "__main__":
    variants = {"read_kernel": READS, "multiply_add_kernel": MULTIPLY_ADDS}
    print(json.dumps({name: [loop(name, c, warps) for c, warps, _ in ways] for name, ways in variants.items()}))
