"""Parse machine code into instructions and classify them by kind.

The input is the text of `cuobjdump -sass` or of an AMDGCN assembly. These are pure functions of text: they need no
compiler, no GPU and no files.
"""

import re
from collections import Counter
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """The hardware unit that executes an instruction. SLOW conversions run on the special function unit."""

    MATRIX = "matrix"
    EXP = "exp"
    SPECIAL = "special function"
    FP32 = "fp32"
    PACKED = "packed fp32"
    SELECT = "fp32 min, max, select, compare"
    INTEGER = "integer"
    MULTIPLY = "integer multiply"
    CONVERT = "conversion"
    SLOW = "slow conversion"
    SHUFFLE = "shuffle"
    LOAD = "global load"
    STORE = "global store"
    SHARED = "shared memory"
    TENSOR = "tensor memory"
    SPILL = "local memory"
    BARRIER = "barrier or wait"
    SCALAR = "scalar or uniform"
    CONTROL = "control"
    UNKNOWN = "unknown"


class Instruction(NamedTuple):
    """One instruction of a warp (NVIDIA, 32 threads) or wave (AMD, 64).

    fmas: multiply-adds of a matrix instruction per warp. Four warps issue a Hopper matrix instruction together, so a
        quarter is counted for each warp. 0 for UTCHMMA, because its shape is stored in a register.
    """

    opcode: str
    kind: Kind
    fmas: int = 0


class Code(NamedTuple):
    """The instructions of one kernel, in order."""

    instructions: tuple[Instruction, ...]

    def count(self, *kinds: Kind) -> int:
        """Number of instructions of these kinds."""
        return sum(i.kind in kinds for i in self.instructions)

    def fmas(self) -> int:
        """Multiply-adds of all matrix instructions, per warp."""
        return sum(i.fmas for i in self.instructions)

    def matrix(self) -> Counter[str]:
        """Number of occurrences of each matrix instruction, such as {"HGMMA": 8}."""
        return Counter(re.split(r"[._]f32|\.", i.opcode)[0] for i in self.instructions if i.kind is Kind.MATRIX)


def parse(text: str) -> Code:
    """Parse the code of one kernel, SASS or AMDGCN."""
    return parse_amdgcn(text) if "amdgcn" in text[:4096] else parse_sass(text)


# Address, predicate, opcode, operands.
SASS_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\.?\s*([^;]*);", re.MULTILINE
)


def parse_sass(text: str) -> Code:
    """Parse one function of the output of `cuobjdump -sass`."""
    return Code(tuple(sass_instruction(opcode) for _, _, opcode, _ in SASS_LINE.findall(text)))


def parse_amdgcn(text: str) -> Code:
    """Parse the first kernel of an AMDGCN assembly."""
    kernel = re.split(r"^\.Lfunc_end", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = (line.partition(";")[0] for line in kernel.splitlines())
    # Labels and directives are not instructions.
    opcodes = (re.match(r"\s+([a-z]\w*)", line) for line in lines)
    return Code(tuple(amdgcn_instruction(found[1]) for found in opcodes if found))


_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
# Opcode prefixes of each kind. The longest matching prefix determines the kind.
_SASS_KINDS = {
    Kind.MATRIX: "HGMMA HMMA UTCHMMA",
    Kind.EXP: "MUFU.EX2",
    Kind.SPECIAL: "MUFU",
    Kind.FP32: "FFMA FADD FMUL FSWZADD HFMA2 HADD2 HMUL2",
    Kind.PACKED: "FFMA2 FADD2 FMUL2",
    Kind.SELECT: "FMNMX FSEL FSET FCHK HMNMX HSET",
    Kind.INTEGER: "IADD LOP3 LEA SHF ISETP SEL PRMT MOV VIADD IABS VIMNMX IMNMX PLOP3 P2R R2P SGXT BMSK CS2R POPC FLO "
    "BREV LOP IADD3 VIADDMNMX",
    Kind.MULTIPLY: "IMAD",
    Kind.CONVERT: "F2FP I2FP",
    Kind.SLOW: "F2F F2I I2F FRND",
    Kind.SHUFFLE: "SHFL REDUX VOTE MATCH",
    Kind.LOAD: "LDG LDGSTS UTMALDG UBLKCP LD",
    Kind.STORE: "STG UTMASTG ST ATOMG RED",
    Kind.SHARED: "LDS STS LDSM STSM ATOMS",
    Kind.TENSOR: "LDTM STTM UTCCP",
    Kind.SPILL: "LDL STL",
    Kind.BARRIER: "BAR DEPBAR LDGDEPBAR WARPGROUP MEMBAR FENCE SYNCS WARPSYNC UTCBAR ERRBAR CCTL NANOSLEEP ACQBULK "
    "ARRIVES UTMACMDFLUSH UTMACCTL",
    Kind.SCALAR: "U R2UR S2UR S2R LDC LDCU ELECT",
    Kind.CONTROL: "BRA EXIT RET CALL BSSY BSYNC BREAK NOP BPT YIELD KILL JMP BRX BMOV",
}
_AMD_KINDS = {
    Kind.MATRIX: "v_mfma v_smfmac",
    Kind.EXP: "v_exp_",
    Kind.SPECIAL: "v_rcp_ v_rsq_ v_log_ v_sqrt_ v_sin_ v_cos_",
    Kind.FP32: "v_fma v_add_f v_sub_f v_subrev_f v_mul_f v_mac_f v_mad_f v_div_ v_ldexp_ v_mul_legacy v_dot2",
    Kind.PACKED: "v_pk_fma_f32 v_pk_add_f32 v_pk_mul_f32",
    Kind.SELECT: "v_max_f v_min_f v_max3_f v_min3_f v_med3_f v_cndmask v_cmp_class v_pk_max v_pk_min",
    Kind.INTEGER: "v_",
    Kind.MULTIPLY: "v_mul_lo v_mul_hi v_mad_u64 v_mad_i64",
    Kind.CONVERT: "v_cvt_",
    Kind.SHUFFLE: "ds_bpermute ds_permute ds_swizzle",
    Kind.LOAD: "global_load buffer_load flat_load",
    Kind.STORE: "global_store buffer_store flat_store global_atomic buffer_atomic",
    Kind.SHARED: "ds_",
    Kind.SPILL: "scratch_",
    Kind.BARRIER: "s_waitcnt s_barrier s_nop s_sleep buffer_inv buffer_wbl2 s_setprio",
    Kind.SCALAR: "s_",
    Kind.CONTROL: "s_branch s_cbranch s_endpgm s_setpc s_swappc s_getpc s_trap",
}


def _longest_first(kinds: dict[Kind, str]) -> list[tuple[str, Kind]]:
    """(prefix, kind) pairs, sorted by length, longest prefix first."""
    return sorted(((n, k) for k, names in kinds.items() for n in names.split()), key=lambda pair: -len(pair[0]))


_SASS_NAMES, _AMD_NAMES = _longest_first(_SASS_KINDS), _longest_first(_AMD_KINDS)


def sass_instruction(opcode: str) -> Instruction:
    """Classify an NVIDIA opcode."""
    kind = next((kind for name, kind in _SASS_NAMES if opcode.startswith(name)), Kind.UNKNOWN)
    fmas = 0
    if found := re.match(r"HGMMA\.64x(\d+)x(\d+)", opcode):
        fmas = 64 * int(found[1]) * int(found[2]) // 4
    elif opcode.startswith("HMMA."):
        fmas = _HMMA.get(opcode.split(".")[1], 0)
    return Instruction(opcode, kind, fmas)


def amdgcn_instruction(opcode: str) -> Instruction:
    """Classify an AMD opcode."""
    kind = next((kind for name, kind in _AMD_NAMES if opcode.startswith(name)), Kind.UNKNOWN)
    if re.match(r"v_cmpx?_\w+_f(16|32)", opcode):
        kind = Kind.SELECT
    fmas = 0
    if found := re.search(r"_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode):
        fmas = int(found[1]) * int(found[2]) * int(found[3]) * int(found[4] or 1)
    return Instruction(opcode, kind, fmas)
