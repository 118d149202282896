"""Theoretical occupancy: how many warps fit on a processor, by registers and shared memory alone.

NVIDIA's limits are those of the CUDA C++ Programming Guide ("Compute Capabilities", technical specifications per
compute capability) and the allocation units of the CUDA Occupancy Calculator. AMD's are those of the CDNA 3 ISA
guide and of LLVM's "User Guide for AMDGPU Backend"; they give the "Occupancy" that LLVM notes in its assembly, which
leaves out Triton's shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """What a streaming multiprocessor (NVIDIA) or a compute unit (AMD) holds; it has four partitions."""

    warp_size: int
    warps: int
    registers: int  # 32-bit, in all
    register_unit: int  # registers are handed to a warp in multiples of this
    shared: int  # bytes
    shared_a_block: int  # bytes, the most
    reserved: int = 0  # bytes of shared memory that the system takes from each block
    blocks: int = 32


PROCESSORS = {
    "sm_80": Processor(32, 64, 65536, 256, 164 * 1024, 163 * 1024, 1024),
    "sm_90": Processor(32, 64, 65536, 256, 228 * 1024, 227 * 1024, 1024),
    "sm_100": Processor(32, 64, 65536, 256, 228 * 1024, 227 * 1024, 1024),
    # 512 registers a lane for a SIMD's waves, accumulation registers among them, in units of 8.
    "gfx942": Processor(64, 32, 4 * 512 * 64, 8 * 64, 64 * 1024, 64 * 1024),
}


def occupancy(target: str, registers: int, warps: int, shared: int) -> int:
    """Percent of the warps a processor can hold, for blocks of `warps`; 0 where not one block fits."""
    processor = PROCESSORS[target]
    if shared > processor.shared_a_block:
        return 0
    blocks = min(processor.blocks, processor.warps // warps, _by_registers(processor, registers) // warps)
    if shared:
        blocks = min(blocks, processor.shared // _round_up(shared + processor.reserved, 128))
    return round(100 * blocks * warps / processor.warps)


def _by_registers(processor: Processor, registers: int) -> int:
    a_warp = _round_up(max(registers, 1) * processor.warp_size, processor.register_unit)
    return 4 * (processor.registers // 4 // a_warp)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
