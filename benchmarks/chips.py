"""What the chips can do at best, per clock: the numbers behind `benchmarks.estimate`, and where each comes from.

Sources.
[1] NVIDIA A100 and H100 whitepapers, H200 and AMD MI300X datasheets: processors, clock, peak rates, memory.
[2] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" and "Technical Specifications per Compute
    Capability": results a clock of an SM; warps, blocks, registers and shared memory of an SM.
[3] Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499: latencies, and that
    `mma` (HMMA) reaches 62.9 % of the H100's peak, which only `wgmma` (HGMMA) does.
[4] AMD CDNA 3 whitepaper and Instruction Set Architecture: a vector instruction of 64 lanes takes 4 cycles of one of
    four SIMDs, a transcendental or 32-bit multiply 16; a SIMD holds 8 waves; a CU does 2048 bf16 flop and moves 128
    bytes of LDS a clock.
[5] Chips and Cheese, "Nvidia's H100" (2023) and "Testing AMD's Giant MI300X" (2024): bandwidth of L2 and of the
    Infinity Cache, latency of the MI300X. The H100's L2 is scaled from the slower PCIe card by the clock.
Realistic rates are shares of the peaks: large matrix products reach 80 % on NVIDIA's chips and less than half on the
MI300X, copies 85 to 90 % of the memory's bandwidth (80 % on the MI300X). They are rounded, and no more exact than that.
"""

from typing import NamedTuple

from attnx.kernels.configs import Target
from attnx.kernels.machine_code import Instruction, Kind


class Chip(NamedTuple):
    """A processor is an SM or a CU. Rates are results (lanes) a clock of one processor.

    clock: GHz. matrix: multiply-adds of 16-bit numbers a clock. matrix_share: of it, what large products reach.
    memory, l2: realistic, TB/s. registers: 32-bit ones of a processor. shared: bytes of it, of which a program takes
    shared_reserved more than it asks for. latency: clocks of a load from memory. sync: clocks of a barrier.
    """

    target: Target
    processors: int
    clock: float
    matrix: int
    matrix_share: float
    memory: float
    l2: float
    fp32: int
    shared: int
    latency: int
    shared_reserved: int = 1024
    special: int = 16
    lanes: int = 32
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    sync: int = 30

    def flops(self) -> float:
        """Realistic flop/s of 16-bit matrix products."""
        return 2e9 * self.matrix * self.matrix_share * self.processors * self.clock


CHIPS = {
    "a100": Chip(Target("cuda", 80), 108, 1.41, 1024, 0.8, 1.75, 4.5, 64, 164 << 10, 466),
    "h100": Chip(Target("cuda", 90), 132, 1.83, 2048, 0.8, 3.0, 6.8, 128, 228 << 10, 479),
    "h200": Chip(Target("cuda", 90), 132, 1.83, 2048, 0.8, 4.3, 6.8, 128, 228 << 10, 479),
    "mi300x": Chip(
        Target("hip", "gfx942"), 304, 2.1, 1024, 0.47, 4.2, 11.9, 64, 64 << 10, 700,
        shared_reserved=0, lanes=64, registers=131072, warps=32, sync=60,
    ),
}  # fmt: skip

HMMA_ON_HOPPER = 0.629
INTEGER_LANES = 64  # also compare, minimum, select, and conversions to 16 bits
SHARED_BYTES, GLOBAL_BYTES = 128, 64  # a clock of a processor


def named(hardware: str) -> str | None:
    """The chip's name in CHIPS, from a name such as "NVIDIA H200"; None for another chip."""
    return next((name for name in CHIPS if name in hardware.lower()), None)


def slots(instruction: Instruction, chip: Chip) -> dict[str, float]:
    """{pipe: clocks of a processor that one warp's instruction keeps it busy}."""
    kind, lanes = instruction.kind, chip.lanes
    moved = instruction.bytes * lanes
    if kind is Kind.MATRIX:
        busy = {"matrix": instruction.fmas * _narrowing(instruction.opcode) / (chip.matrix * chip.matrix_share)}
        if instruction.opcode.startswith("HMMA") and chip.target.arch == 90:
            busy["matrix"] *= chip.matrix_share / HMMA_ON_HOPPER
        busy["shared"] = moved / SHARED_BYTES
    elif kind in (Kind.SHARED, Kind.SHUFFLE):
        busy = {"shared": max(moved, SHARED_BYTES) / SHARED_BYTES}
    elif kind in (Kind.LOAD, Kind.STORE, Kind.SPILL):
        busy = {"global": max(moved, GLOBAL_BYTES) / GLOBAL_BYTES}
        if instruction.opcode.startswith("LDGSTS"):
            busy["shared"] = moved / SHARED_BYTES
    elif chip.target.backend == "hip":
        return _amd_slots(kind)
    else:
        busy = _nvidia_slots(kind, chip)
    if chip.target.backend == "hip":
        return {**busy, **({"vector": 1.0} if kind is Kind.MATRIX else {})}
    return {**busy, "issue": 0.25}


def _nvidia_slots(kind: Kind, chip: Chip) -> dict[str, float]:
    if kind in (Kind.EXP, Kind.SPECIAL, Kind.SLOW):
        return {"exp": 32 / chip.special}
    if kind in (Kind.FP32, Kind.PACKED):
        return {"fp32": 32 * (1 + (kind is Kind.PACKED)) / chip.fp32}
    if kind is Kind.MULTIPLY:
        return {"fp32": 32 / INTEGER_LANES}
    if kind in (Kind.SELECT, Kind.INTEGER, Kind.CONVERT):
        return {"integer": 32 / INTEGER_LANES}
    return {}


def _amd_slots(kind: Kind) -> dict[str, float]:
    """One vector instruction a clock over four SIMDs; those of a quarter of the rate hold the same pipe."""
    if kind in (Kind.EXP, Kind.SPECIAL, Kind.MULTIPLY):
        return {"vector": 4.0}
    if kind in (Kind.FP32, Kind.PACKED, Kind.SELECT, Kind.INTEGER, Kind.CONVERT):
        return {"vector": 1.0}
    return {"scalar": 1.0} if kind is Kind.SCALAR else {}


def _narrowing(opcode: str) -> int:
    """How many times slower than with 16-bit numbers: tf32 takes twice the time, AMD's fp32 eight times."""
    if "TF32" in opcode or "xf32" in opcode:
        return 2
    return 8 if opcode.startswith("v_mfma") and opcode.endswith("f32") and "bf16" not in opcode else 1
