"""Reading machine code: small texts with one of everything, and what registers leave room for."""

import pytest

from bench.resources.amd import read_amd
from bench.resources.nvidia import parse_nvidia
from bench.resources.occupancy import occupancy
from bench.resources.row import vector, wide

SASS = """
        .type           roi_align_backward_kernel,@function
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E R0, desc[UR14][R6.64] ;
        /*0020*/             @!UPT LDG.E.128 R8, desc[UR14][R6.64+0x4] ;
        /*0030*/                   LDG.E.U16.CONSTANT R3, desc[UR14][R6.64] ;
        /*0040*/              @P0  LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0050*/                   LDL.LU R3, [R1+0x8] ;
        /*0060*/                   STL [R1+0x8], R3 ;
        /*0070*/                   STG.E.64 desc[UR14][R6.64], R2 ;
        /*0080*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR6][R4.64], R8 ;
        /*0090*/                   RED.E.ADD.F16x2.RN.STRONG.GPU desc[UR6][R4.64], R8 ;
        /*00a0*/               @P2 ATOMG.E.CAS.STRONG.GPU PT, R5, desc[UR6][R2.64], R4, R5 ;
        /*00b0*/                   REDUX.SUM UR5, R2 ;
        /*00c0*/                   ATOMS.ADD R4, [R2], R3 ;
        /*00d0*/                   HFMA2.MMA R30, -RZ, RZ, 0, 0 ;
        /*00e0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
.L_x_1:
        /*00f0*/                   BRA `(.L_x_1) ;
        /*0100*/                   NOP ;
"""
PTX = """
\t.file\t1 "/home/div.full.f32/fma.rn.f32.py"
\t.loc\t1 93 0 // fma.rn.f32
\tfma.rn.f32 \t%r1, %r2, %r3, %r4;
\t@%p1 fma.rn.f64 \t%rd1, %rd2, %rd3, %rd4;
\tdiv.rn.f32 \t%r5, %r6, %r7;
\tdiv.full.f32 \t%r8, %r9, %r10;
"""


def test_nvidia_parser():
    # Predicates, warp and shared memory reductions that are no global atomics, and file names that look like code.
    code = parse_nvidia(" Function f:\n  REG:62 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:632", SASS, PTX)
    assert (code.registers, code.stack, code.spills, code.instructions) == (62, 16, 2, 16)
    assert (code.loads, code.stores) == ({"4": 1, "16": 2, "2": 1}, {"8": 1})
    assert code.atomics == {"F32x4": 1, "F16x2": 1, "CAS": 1}
    assert code.matrix == {"HGMMA.64x128x16.F32.BF16": 1}
    assert (code.fma, code.ieee_divisions, code.fast_divisions) == (2, 1, 1)
    assert (wide(code.loads), wide(code.stores), vector(code.atomics)) == (2, 0, 2)


AMDGCN = """
\ts_load_dwordx8 s[4:11], s[0:1], 0x8
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tbuffer_load_ushort v6, v7, s[0:3], 0 offen
\tglobal_load_dword v8, v[0:1], off
\tbuffer_store_dwordx2 v[2:3], v4, s[0:3], 0 offen
\tglobal_atomic_add_f32 v[0:1], v2, off
\tglobal_atomic_pk_add_bf16 v[0:1], v2, off
\tglobal_atomic_cmpswap v3, v[0:1], v[4:5], off sc0
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
; %bb.1:
\t.loc\t1 93 0 ; global_load_dwordx4
  - .agpr_count:     0
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 0
    .vgpr_count:     51
    .vgpr_spill_count: 3
"""


def test_amd_parser():
    # Scalar loads and directives are not vector loads.
    code = read_amd(AMDGCN)
    assert (code.registers, code.stack, code.spills, code.instructions) == (51, 12, 3, 9)
    assert (code.loads, code.stores) == ({"16": 1, "2": 1, "4": 1}, {"8": 1})
    assert code.atomics == {"add_f32": 1, "pk_add_bf16": 1, "CAS": 1}
    assert code.matrix == {"v_mfma_f32_32x32x8_bf16_1k": 1}
    assert code.fma is None


def test_an_unreadable_disassembly_is_an_error():
    # A changed format would else count nothing, and nothing is what passes.
    with pytest.raises(ValueError, match="no instruction"):
        parse_nvidia("REG:1 STACK:0", "0000: LDG", "")
    with pytest.raises(ValueError, match="no instruction"):
        read_amd("LDG")


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "percent"),
    [
        ("sm_80", 32, 4, 0, 100),
        ("sm_80", 33, 4, 0, 75),  # 40 are allotted: 12 warps a quarter
        ("sm_90", 64, 4, 0, 50),
        ("sm_90", 255, 4, 0, 12),
        ("sm_90", 255, 16, 0, 0),  # 2 warps a quarter fit, 4 are needed
        ("sm_90", 32, 1, 0, 50),  # 32 blocks at most
        ("sm_80", 32, 8, 81 * 1024, 25),  # two blocks, with the system's kilobyte each
        ("sm_80", 32, 8, 82 * 1024, 12),
        ("sm_90", 32, 8, 82 * 1024, 25),
        ("sm_80", 32, 4, 164 * 1024, 0),
        ("gfx942", 64, 4, 0, 100),
        ("gfx942", 65, 4, 0, 88),
        ("gfx942", 129, 4, 0, 38),
        ("gfx942", 512, 4, 0, 12),
        ("gfx942", 64, 4, 16 * 1024, 50),
    ],
)
def test_occupancy(target, registers, warps, shared, percent):
    # Against the CUDA occupancy calculator, and LLVM's "Occupancy" (waves a SIMD, of 8) in AMD assembly.
    assert occupancy(target, registers, warps, shared) == percent
