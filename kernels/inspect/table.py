"""The output of `attnx kernels`: a table of what kernels take, and a line for each failure."""

from collections.abc import Iterator
from typing import Any

from attnx.kernels.inspect.offline import Resources

COLUMNS = {
    "kernel": "<15", "target": "<7", "D": ">4", "dtype": "<5", "blocks": ">9", "warps": ">5", "stages": ">6",
    "regs": ">5", "spills": ">6", "shared": ">7", "limit": ">7", "matrix": "<14", "exps": ">5",
}  # fmt: skip


MOST_LOCAL = 0.06
"""The largest share of a main loop's instructions that may use local memory. Kernels for Hopper keep a row of a map and
its scores in 208 of 240 registers; what the compiler spills beside them depends on its version."""


def failures(rows: list[Resources]) -> Iterator[str]:
    """Error lines: one for each compiler error, spill, read of an unwritten register and shared memory overflow."""
    for row in rows:
        name = f"{row.kernel} on {row.target}, head dim {row.head_dim}, {row.dtype}"
        if row.error:
            yield f"{name}: {row.error}"
        if row.spills and row.loop is None:
            yield f"{name}: {row.spills} bytes a thread are spilled"
        if row.loop is not None and row.loop.local > MOST_LOCAL * row.loop.instructions:
            yield f"{name}: {row.loop.local} of the loop's {row.loop.instructions} instructions use local memory"
        if row.loop is not None and row.loop.serialised:
            yield f"{name}: ptxas waits for every product"
        if row.undefined:
            yield f"{name}: {row.undefined}"
        if row.shared > row.limit:
            yield f"{name}: asks for {row.shared} bytes of shared memory, {row.limit} are allowed"


def table(rows: list[Resources]) -> Iterator[str]:
    """Lines of a text table: a header, then one line for each row."""
    yield _line(list(COLUMNS))
    for row in rows:
        block_m, block_n, warps, stages, parts = row.config
        blocks = f"{block_m}x{parts * block_n}"
        cells = [row.kernel, row.target, row.head_dim, row.dtype, blocks, warps, stages]
        if row.error:
            yield _line(cells) + f"  {row.error}"
            continue
        cells += [row.registers, row.spills, row.shared, row.limit, f"{row.matrix} {row.matrix_count}", row.exp_count]
        also = f"  {row.sgpr_spills} scalars in lanes" if row.sgpr_spills else ""
        also += "  one by one" if 1 < row.batches == row.matrix_count else ""
        if row.loop is not None:
            loop = row.loop
            also += f"  loop: {loop.instructions} instructions, {loop.products} products, {loop.waits} waits, "
            also += f"{loop.exps} exps, {loop.overlapped} of them overlapped, {loop.local} local"
        yield _line(cells) + also


def _line(cells: list[Any]) -> str:
    """The cells, aligned to their columns."""
    return " ".join(f"{cell!s:{form}}" for cell, form in zip(cells, COLUMNS.values(), strict=False)).rstrip()
