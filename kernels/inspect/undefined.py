"""Uniform registers that machine code reads before any instruction writes them, which shows a compiler bug.

ptxas 12.8, which Triton 3.6 uses, takes descriptors of some matrix products from a register that is never written. The
operand is then arbitrary memory. The interpreter has no registers, so its tests don't catch this.
"""

import re

from attnx.kernels.inspect.machine_code import SASS_LINE

_REGISTER = re.compile(r"(\w*\[)?\bUR(\d+)\b(\.64)?")
_WIDE = re.compile(r"\.(?:WIDE|64)\b")


def undefined(text: str) -> list[str]:
    """Lines of one function of `cuobjdump -sass`, in order, that read a register which no earlier line writes.

    A register written on one branch counts as written on all, so there are no false positives but there may be misses.
    """
    written: set[int] = set()
    found = []
    for address, _, opcode, operands in SASS_LINE.findall(text):
        aim, _, rest = operands.partition(",")
        target = re.fullmatch(r"UR(\d+)", aim.strip())
        read = _read(opcode, rest if target else operands)
        if missing := sorted(read - written):
            names = ", ".join(f"UR{register}" for register in missing)
            found.append(f"{address}: {opcode} {operands.strip()}: nothing wrote {names}")
        written |= read  # report each register once
        if target:
            first = int(target[1])
            written.update(range(first, first + (4 if ".128" in opcode else 2 if _WIDE.search(opcode) else 1)))
    return found


def _read(opcode: str, operands: str) -> set[int]:
    """Numbers of the uniform registers that an instruction reads."""
    read: set[int] = set()
    # A descriptor of HGMMA has four registers, for A and B. Only B's are read if A is in registers.
    hopper = opcode.startswith("HGMMA")
    both = hopper and not re.match(r"R\d+", operands.partition(",")[2].strip())
    for descriptor, number, wide in _REGISTER.findall(operands):
        first = int(number)
        if descriptor == "gdesc[" and hopper:
            read.update(range(first if both else first + 2, first + 4))
        else:
            read.update(range(first, first + (2 if descriptor in {"gdesc[", "desc["} or wide else 1)))
    return read
