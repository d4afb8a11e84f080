"""Uniform registers that machine code reads before anything writes them: what a compiler's bug looks like.

ptxas 12.8, Triton 3.6's, takes descriptors of some matrix products from a register that nothing wrote. The product is
then of whatever lies there; the interpreter, which has no registers, can't show it.
"""

import re

from attnx.kernels.inspect.machine_code import SASS_LINE

_REGISTER = re.compile(r"(\w*\[)?\bUR(\d+)\b(\.64)?")
_WIDE = re.compile(r"\.(?:WIDE|64)\b")


def undefined(text: str) -> list[str]:
    """Lines of one function of `cuobjdump -sass`, in order, each with a register that no line before it writes.

    Whatever is written by one way is taken as written by all: what is named here is wrong, not all that is wrong.
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
        written |= read  # said once
        if target:
            first = int(target[1])
            written.update(range(first, first + (4 if ".128" in opcode else 2 if _WIDE.search(opcode) else 1)))
    return found


def _read(opcode: str, operands: str) -> set[int]:
    read: set[int] = set()
    # HGMMA's descriptors of four registers are A's and B's: the second alone, where A is not in shared memory.
    hopper = opcode.startswith("HGMMA")
    both = hopper and not re.match(r"R\d+", operands.partition(",")[2].strip())
    for descriptor, number, wide in _REGISTER.findall(operands):
        first = int(number)
        if descriptor == "gdesc[" and hopper:
            read.update(range(first if both else first + 2, first + 4))
        else:
            read.update(range(first, first + (2 if descriptor in {"gdesc[", "desc["} or wide else 1)))
    return read
