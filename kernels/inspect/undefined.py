"""Find uniform registers that machine code reads before any instruction writes them. Such a read is a compiler bug.

ptxas 12.8, which Triton 3.6 uses, reads the descriptors of some matrix products from a register that is never written.
The operand is then arbitrary memory. The interpreter has no registers, so tests in the interpreter don't find this bug.
"""

import re

from attnx.kernels.inspect.machine_code import SASS_LINE

_REGISTER = re.compile(r"(\w*\[)?\bUR(\d+)\b(\.64)?")
_WIDE = re.compile(r"\.(?:WIDE|64)\b")


def undefined(text: str) -> list[str]:
    """Lines that read a register before any earlier line has written it, in order.

    A register that is written on one branch counts as written on all branches. So there are no false positives, but
    reads on other branches can be missed.

    Args:
        text: one function of the output of `cuobjdump -sass`.
    """
    written: set[int] = set()
    found = []
    for address, _, opcode, operands in SASS_LINE.findall(text):
        destination, _, rest = operands.partition(",")
        target = re.fullmatch(r"UR(\d+)", destination.strip())
        read = _read(opcode, rest if target else operands)
        if missing := sorted(read - written):
            names = ", ".join(f"UR{register}" for register in missing)
            found.append(f"{address}: {opcode} {operands.strip()}: nothing wrote {names}")
        # Each register is reported once.
        written |= read
        if target:
            first = int(target[1])
            written.update(range(first, first + (4 if ".128" in opcode else 2 if _WIDE.search(opcode) else 1)))
    return found


def _read(opcode: str, operands: str) -> set[int]:
    """Numbers of the uniform registers that an instruction reads."""
    read: set[int] = set()
    # A descriptor of HGMMA has four registers: two for A and two for B. If A is in registers, only B's are read.
    hopper = opcode.startswith("HGMMA")
    both = hopper and not re.match(r"R\d+", operands.partition(",")[2].strip())
    for descriptor, number, wide in _REGISTER.findall(operands):
        first = int(number)
        if descriptor == "gdesc[" and hopper:
            read.update(range(first if both else first + 2, first + 4))
        else:
            read.update(range(first, first + (2 if descriptor in {"gdesc[", "desc["} or wide else 1)))
    return read
