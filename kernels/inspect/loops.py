"""The main loop of a Hopper kernel in machine code: does it wait for its products, and does it use local memory?"""

import re
import subprocess
import tempfile
from typing import NamedTuple

from triton.backends.nvidia.compiler import get_ptxas

from attnx.kernels.inspect.machine_code import SASS_LINE

# ptxas's warnings that it waits for each product: C7508, C7510, C7514 and others.
_SERIALISED = re.compile(r"\(C75\d\d\)")


class Loop(NamedTuple):
    """Instructions of a warp in one iteration, which is one head for most kernels.

    Attributes:
        instructions: all of them.
        products: matrix instructions (HGMMA).
        waits: waits for products.
        exps: exponentials and other special functions (MUFU).
        overlapped: of these, those between the start of a product and the wait for it.
        local: loads and stores of local memory, where spilled registers are.
        serialised: ptxas says that it waits for every product of the kernel.
    """

    instructions: int
    products: int
    waits: int
    exps: int
    overlapped: int
    local: int
    serialised: bool


def main_loop(sass: str, ptx: str, arch: int) -> Loop | None:
    """The smallest loop of a kernel that has products and exponentials; None if there is none.

    Args:
        sass: one function of the output of `cuobjdump -sass`.
        ptx: its PTX, of which ptxas's warnings are read.
        arch: compute capability, such as 90.
    """
    lines = [(int(address, 16), opcode, operands) for address, _, opcode, operands in SASS_LINE.findall(sass)]
    bodies = []
    for address, opcode, operands in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) <= address:
            body = [name for at, name, _ in lines if int(target[1], 16) <= at <= address]
            if _count(body, "HGMMA") >= 2 and _count(body, "MUFU") >= 8 and not _count(body, "EXIT"):
                bodies.append(body)
    if not bodies:
        return None
    body = min(bodies, key=len)
    return Loop(
        instructions=len(body),
        products=_count(body, "HGMMA"),
        waits=_count(body, "WARPGROUP.DEPBAR"),
        exps=_count(body, "MUFU"),
        overlapped=_overlapped(body),
        local=_count(body, "LDL") + _count(body, "STL"),
        serialised=bool(_SERIALISED.search(_ptxas_messages(ptx, arch))),
    )


def _count(body: list[str], prefix: str) -> int:
    return sum(opcode.startswith(prefix) for opcode in body)


def _overlapped(body: list[str]) -> int:
    """Exponentials while a product is in flight. No product is in flight at the end of the loop."""
    count, in_flight = 0, False
    for opcode in body:
        if opcode.startswith("HGMMA"):
            in_flight = True
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            in_flight = False
        elif opcode.startswith("MUFU"):
            count += in_flight
    return count


def _ptxas_messages(ptx: str, arch: int) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}a", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout
