"""What machine code says of itself: every instruction by class, and the loop that it stands in.

Reads the text of `cuobjdump -sass` and of an AMDGCN assembly. Pure functions of text: no compiler, no GPU, no files.
"""

import re
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What an instruction keeps busy. SLOW conversions run where the special functions do."""

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

    fmas: multiply-adds that a warp contributes by a matrix instruction; of Hopper's, which four warps issue together,
        a quarter; 0 for UTCHMMA, whose shape stands in a register.
    bytes: that a thread moves to or from memory; of a Hopper matrix instruction, what a thread's share of the operands
        in shared memory is. 0 for bulk copies, whose size stands in a register.
    loop: index in Code.loops of the innermost loop; -1 outside of all.
    """

    opcode: str
    kind: Kind
    fmas: int = 0
    bytes: int = 0
    loop: int = -1


class Loop(NamedTuple):
    """A natural loop. first: index of the header's first instruction; parent: -1 where depth is 1.

    works: has a matrix instruction, an exp or fp32 arithmetic; those that don't wait for a barrier or walk lanes.
    """

    first: int
    parent: int
    depth: int
    works: bool


class Code(NamedTuple):
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def count(self, *kinds: Kind) -> int:
        return sum(i.kind in kinds for i in self.instructions)

    def fmas(self) -> int:
        return sum(i.fmas for i in self.instructions)

    def matrix(self) -> Counter[str]:
        """How often each matrix instruction occurs: {"HGMMA": 8}."""
        return Counter(re.split(r"[._]f32|\.", i.opcode)[0] for i in self.instructions if i.kind is Kind.MATRIX)


class _Raw(NamedTuple):
    """targets: where else than to the next instruction it may go; falls: whether it may go on to the next."""

    instruction: Instruction
    targets: tuple[str, ...]
    falls: bool


def parse(text: str) -> Code:
    """The code of one kernel, given as SASS or AMDGCN."""
    return parse_amdgcn(text) if "amdgcn" in text[:4096] else parse_sass(text)


SASS_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\.?\s*([^;]*);", re.MULTILINE
)


def parse_sass(text: str) -> Code:
    """The code of one function of `cuobjdump -sass`."""
    raws: list[_Raw] = []
    labels: dict[str, int] = {}
    joins: dict[str, tuple[str, ...]] = {}  # BSYNC Bx goes where the last BSSY Bx said
    for address, predicate, opcode, operands in SASS_LINE.findall(text):
        labels[f"{int(address, 16):x}"] = len(raws)
        base = opcode.split(".")[0]
        found = re.search(r"\b0x([0-9a-f]+)\s*$", operands)
        aim: tuple[str, ...] = (f"{int(found[1], 16):x}",) if found else ()
        if base == "BSSY":
            joins[operands.split(",")[0].strip()] = aim
        targets = aim if base in ("BRA", "CALL", "JMP") else ()
        if base == "BSYNC":
            targets = joins.get(operands.strip(), ())
        # A branch on a uniform predicate names it among its operands.
        sure = not predicate and (base in ("EXIT", "RET") or (base in ("BRA", "JMP") and "P" not in operands))
        raws.append(_Raw(sass_instruction(opcode, operands), targets, not sure))
    return _code(raws, labels)


def parse_amdgcn(text: str) -> Code:
    """The code of the first kernel of an AMDGCN assembly."""
    raws: list[_Raw] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.partition(";")[0].rstrip()
        if line.startswith(".Lfunc_end"):
            break
        if label := re.match(r"(\S+):$", line):
            labels[label[1]] = len(raws)
        elif found := re.match(r"\s+([a-z]\w*)\s*(.*)", line):
            opcode, operands = found.groups()
            branch = opcode.startswith(("s_cbranch", "s_branch"))
            ends = opcode in ("s_endpgm", "s_branch", "s_setpc_b64", "s_trap")
            raws.append(_Raw(amdgcn_instruction(opcode), (operands.strip(),) if branch else (), not ends))
    return _code(raws, labels)


def _code(raws: list[_Raw], labels: dict[str, int]) -> Code:
    """Finds the natural loops: an edge to a block that is still open in a depth-first walk closes one."""
    where = [[labels[t] for t in raw.targets if t in labels] for raw in raws]
    starts = {0} | {i for aims in where for i in aims}
    starts |= {i + 1 for i, raw in enumerate(raws) if raw.targets or not raw.falls}
    starts = {i for i in starts if i < len(raws)}
    heads = sorted(starts)
    block_of, block = [], -1
    for i in range(len(raws)):
        block += i in starts
        block_of.append(block)
    after: list[list[int]] = []
    for first, end in zip(heads, [*heads[1:], len(raws)], strict=True):
        falls = [block_of[end]] if raws[end - 1].falls and end < len(raws) else []
        after.append(falls + [block_of[i] for i in where[end - 1]])
        assert first < end
    bodies = _natural_loops(after)
    order = sorted(bodies, key=lambda head: (head, -len(bodies[head])))
    parents = [
        min(
            (j for j, other in enumerate(order) if bodies[head] < bodies[other]),
            key=lambda j: len(bodies[order[j]]),
            default=-1,
        )
        for head in order
    ]
    inner = {
        b: min((j for j, h in enumerate(order) if b in bodies[h]), key=lambda j: len(bodies[order[j]]), default=-1)
        for b in range(len(heads))
    }
    instructions = tuple(raw.instruction._replace(loop=inner[block_of[i]]) for i, raw in enumerate(raws))
    arithmetic = (Kind.MATRIX, Kind.EXP, Kind.FP32, Kind.PACKED)
    busy = {block_of[i] for i, raw in enumerate(raws) if raw.instruction.kind in arithmetic}
    loops = []
    for j, head in enumerate(order):
        depth, up = 1, parents[j]
        while up >= 0:
            depth, up = depth + 1, parents[up]
        loops.append(Loop(heads[head], parents[j], depth, bool(busy & bodies[head])))
    return Code(instructions, tuple(loops))


def _natural_loops(after: list[list[int]]) -> dict[int, set[int]]:
    """{header: blocks of its loop, the header too}, of what can be reached from block 0."""
    before: dict[int, list[int]] = {}
    closing: list[tuple[int, int]] = []
    state: dict[int, bool] = {}  # True while the walk is below the block
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(after[0]))] if after else []
    state[0] = True
    while stack:
        block, ways = stack[-1]
        to = next(ways, None)
        if to is None:
            state[block] = False
            stack.pop()
            continue
        before.setdefault(to, []).append(block)
        if to not in state:
            state[to] = True
            stack.append((to, iter(after[to])))
        elif state[to]:
            closing.append((block, to))
    bodies: dict[int, set[int]] = {}
    for tail, head in closing:
        body = bodies.setdefault(head, {head})
        todo = [tail]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before.get(block, [])
    return bodies


_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
# By the longest name that an opcode begins with.
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
    return sorted(((n, k) for k, names in kinds.items() for n in names.split()), key=lambda pair: -len(pair[0]))


_SASS_NAMES, _AMD_NAMES = _longest_first(_SASS_KINDS), _longest_first(_AMD_KINDS)


def sass_instruction(opcode: str, operands: str = "") -> Instruction:
    """An NVIDIA instruction by its opcode; the operands say which of a matrix product's come from shared memory."""
    kind = next((kind for name, kind in _SASS_NAMES if opcode.startswith(name)), Kind.UNKNOWN)
    fmas = size = 0
    if found := re.match(r"HGMMA\.64x(\d+)x(\d+)", opcode):
        n, k = int(found[1]), int(found[2])
        fmas = 64 * n * k // 4
        # A step of k is 32 bytes in every type; A comes from registers unless the descriptor stands first.
        size = 32 * (n + (64 if "gdesc" in operands.split(",")[1] else 0)) // 128
    elif opcode.startswith("HMMA."):
        fmas = _HMMA.get(opcode.split(".")[1], 0)
    elif kind in (Kind.LOAD, Kind.STORE, Kind.SHARED, Kind.SPILL) and opcode[0] != "U":
        wide = re.search(r"\.(128|64|[US]?16|[US]8)(?=\.|$)", opcode)
        size = {"128": 16, "64": 8, "8": 1}.get(wide[1].lstrip("US"), 2) if wide else 4
        if opcode.startswith(("LDSM", "STSM")):
            size = 4 * int(opcode[-1]) if opcode[-2] == "." else 4
    return Instruction(opcode, kind, fmas, size)


def amdgcn_instruction(opcode: str) -> Instruction:
    """An AMD instruction by its opcode."""
    kind = next((kind for name, kind in _AMD_NAMES if opcode.startswith(name)), Kind.UNKNOWN)
    if re.match(r"v_cmpx?_\w+_f(16|32)", opcode):
        kind = Kind.SELECT
    fmas = size = 0
    if found := re.search(r"_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode):
        fmas = int(found[1]) * int(found[2]) * int(found[3]) * int(found[4] or 1)
    elif kind in (Kind.LOAD, Kind.STORE, Kind.SPILL, Kind.SHARED):
        bits = re.search(r"_b(\d+)(?:_|$)", opcode)
        words = re.search(r"dword(?:x(\d))?", opcode)
        size = int(bits[1]) // 8 if bits else 4 * int(words[1] or 1) if words else 2 if "short" in opcode else 1
        size *= 2 if re.search(r"(read|write)2", opcode) else 1
    return Instruction(opcode, kind, fmas, size)
