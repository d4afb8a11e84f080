"""Block sizes as pure functions of op, head dims, element size and target. There is no autotuning at run time."""

from functools import lru_cache
from typing import Any, NamedTuple

from attnx.kernels.launching import launch

SHORT_ROW = 256  # largest number of keys for which scores and map of a row fit on chip in one tile
WIDEST_HEAD = 1024  # largest head dim
WHOLE_HEAD = 256  # largest head dim whose rows are loaded whole; wider heads are read in chunks
LONGER_ROW = 288  # the same with a tail of 32 keys: 256 patches, a class token and register tokens

# Streaming multiprocessors (compute units) of the common model of each architecture, used if there is no device.
PROCESSORS = {80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, "gfx90a": 110, "gfx942": 304}


class Target(NamedTuple):
    """A GPU architecture.

    backend: "cuda" | "hip". arch: 80, 90, 100 or "gfx942".
    processors: number of streaming multiprocessors or compute units; 0: unknown.
    """

    backend: str
    arch: int | str
    processors: int = 0

    @property
    def processor_count(self) -> int:
        """`processors`, or the number of the architecture's common model if that is 0."""
        return self.processors or PROCESSORS.get(self.arch, 108)


class Config(NamedTuple):
    """Launch configuration of a kernel.

    block_m, block_n: rows and keys of a tile. num_warps: warps per program. num_stages: depth of the load pipeline.
    parts: number of key tiles per program, side by side (map kernel only).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1


WIDE = Config(32, 32, 4, 1)  # of tiles of a map, for head dims above WHOLE_HEAD


class Launch(NamedTuple):
    """A kernel with its grid, arguments and configuration, to be run here or compiled for another target."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: Config

    @property
    def all_args(self) -> dict[str, Any]:
        """The arguments, with the block sizes if the kernel takes them."""
        if "BLOCK_M" not in self.kernel.arg_names:
            return self.args
        return {**self.args, "BLOCK_M": self.config.block_m, "BLOCK_N": self.config.block_n}

    def run(self) -> Any:
        """Launch the kernel on the current device; returns the compiled kernel, None in the interpreter."""
        config = self.config
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
        return launch(self.kernel, self.grid, self.all_args, options)


class ShortRows(NamedTuple):
    """Layout of a row of keys in the one-pass kernel: `parts` tiles of config.block_n keys, then a tail.

    padded: head dim, rounded up to a power of two. tail: keys of the tail, 0 for none.
    delay_pv: P V of each head is computed one loop iteration later, see `one_pass_kernel`.
    """

    config: Config
    padded: int
    parts: int = 1
    tail: int = 0
    delay_pv: bool = True


def split_d(head_dim: int) -> tuple[int, int]:
    """Widths of the two tiles of a head dim, each 0 or a power of two of at least 16.

    64 gives (64, 0), 72 and 80 give (64, 16), 104 gives (128, 0). Above WHOLE_HEAD: (width of a chunk, 0).
    """
    if head_dim > WHOLE_HEAD:
        return 64, 0
    padded = max(16, 1 << (head_dim - 1).bit_length())
    first = padded // 2
    rest = max(16, 1 << (head_dim - first - 1).bit_length()) if padded > 16 else padded
    return (first, rest) if first + rest < padded else (padded, 0)


def head_splits(programs: int, heads: int, target: Target) -> int:
    """Number of programs that share the heads of a tile, so that small batches use all processors.

    Every program except the last has at least two heads. So there are fewer partial maps than heads, and at most as
    many as processors.
    """
    splits = max(1, min(heads // 2, target.processor_count // max(1, programs)))
    each = -(-heads // splits)
    return -(-heads // each)


def forward_config(
    head_dim: int, itemsize: int, rows: int, heads: int, target: Target, bias: bool = False, even: bool = True
) -> Config:
    """Configuration of the forward kernel, which computes output and lse, one head per program.

    Args:
        head_dim: the larger of D and Dv.
        itemsize: bytes per element of q.
        rows: number of query rows.
        heads: B * H.
        target: the GPU.
        bias: the kernel also loads bias tiles.
        even: D equals Dv, and `split_d` gives a single tile.
    """
    if head_dim > WHOLE_HEAD:
        return WIDE._replace(num_warps=8)
    row_bytes = sum(split_d(head_dim)) * itemsize  # bytes of a row of K or V on chip
    stages = _stages(row_bytes, target)
    if row_bytes > 512:
        return Config(16 if rows <= 16 else 32, 16, 4, 1)
    if rows <= 16:
        return Config(16, 64 if row_bytes <= 256 else 32, 4, min(stages, 2))
    if itemsize == 4:
        return Config(32, 32, 8, 1)
    if row_bytes == 512:
        return Config(64, 32, 8, min(stages, 2))
    if bias:
        return Config(128, 32, 8, 1) if _is_blackwell(target) else Config(64, 32, 4, 1)
    if target.backend == "hip":
        return Config(128 if row_bytes <= 128 else 64, 64, 4, stages)
    if target.arch == 90 and not even:
        # With 64 keys, ptxas 12.8 reads descriptors from an uninitialised register, see inspect/undefined.py.
        return Config(64, 32, 4, min(stages, 2))
    if -(-rows // 128) * heads < target.processor_count:
        return Config(64, 64 if row_bytes <= 128 else 32, 4, stages)
    return Config(128, 64, 4, stages) if row_bytes <= 128 else Config(128, 32, 8, stages)


def map_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """Configuration of the map kernel. Each program loops over the heads of one tile."""
    if head_dim > WHOLE_HEAD:
        return WIDE
    row_bytes = sum(split_d(head_dim)) * itemsize
    stages = _stages(row_bytes, target)
    if row_bytes > 512:
        return Config(16 if rows <= 16 else 32, 32, 4, 1)
    if itemsize == 4:
        return Config(16, 32, 4, 1) if rows <= 16 else Config(32, 32, 8, 1)
    if rows <= 16:
        if bias:
            return Config(16, 64 if row_bytes <= 256 and not _is_blackwell(target) else 32, 4, 1)
        return Config(16, 128 if row_bytes <= 256 else 32, 4, stages if row_bytes <= 256 else 1)
    if row_bytes == 512:
        return Config(64, 64, 8, min(stages, 2))
    if bias:
        if _is_blackwell(target):
            return Config(64, 32, 4, 1)
        return Config(64, 64, 4 if row_bytes <= 64 else 8, 1)
    if target.arch == 90 and row_bytes <= 128:
        return Config(64, 64, 4, 3, parts=2)  # three programs per processor hide latency
    if target.backend == "cuda" and row_bytes <= 128:
        return Config(128, 64, 4, min(stages, 2))  # two programs per processor
    return Config(128, 64 if _is_small(target) else 128, 8, stages)


def gradient_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """Configuration of the gradient kernel. Tiles are smaller than those of the map, because there are two products."""
    if head_dim > WHOLE_HEAD:
        return WIDE
    row_bytes = sum(split_d(head_dim)) * itemsize
    if target.arch == 90 and rows > 16 and itemsize == 4 and row_bytes <= 256:
        return Config(32, 32, 4, 1)
    if target.arch == 90 and rows > 16 and bias and row_bytes <= 64:
        return Config(64, 32, 4, 1)
    if target.backend == "hip" or itemsize == 4 or (bias and row_bytes <= 160) or (rows <= 16 and not bias):
        return map_config(head_dim, itemsize, rows, target, bias)
    if bias and rows <= 16:
        return Config(16, 32, 4, 1)
    if bias:
        return Config(64, 32, 4, 1) if int(target.arch) in (90, 100, 120) else Config(32, 64, 4, 1)
    return Config(128, 64, 8, 2) if row_bytes <= 256 else Config(64, 32, 8, 1)


def vecmat_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """Configuration of the vecmat kernel: a tile as for the map, which is summed over its rows once at the end."""
    if head_dim > WHOLE_HEAD:
        return WIDE
    row_bytes = sum(split_d(head_dim)) * itemsize
    if bias or itemsize == 4 or row_bytes > 256:
        return map_config(head_dim, itemsize, rows, target, bias)
    if target.arch == 90 and row_bytes <= 128:
        return Config(64, 128, 4, 3)
    stages = min(_stages(row_bytes, target), 2)
    return Config(64, 64, 4, stages) if row_bytes <= 128 else Config(64, 128, 8, stages)


def statistics_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """Configuration of the statistics kernel: a small tile, because weights and distances are in registers."""
    if head_dim > WHOLE_HEAD:
        return WIDE
    row_bytes = sum(split_d(head_dim)) * itemsize
    if itemsize == 4:
        keys = 16 if bias and row_bytes > 256 else 32
        return Config(16, keys, 4, 1) if rows <= 16 or row_bytes > 512 else Config(32, keys, 8, 1)
    if bias:
        return Config(16 if rows <= 16 else 64, 32, 8 if rows > 16 and row_bytes > 256 else 4, 1)
    if rows <= 16:
        return Config(16, 64 if row_bytes <= 256 else 32, 4, 1)
    return Config(64, 64, 8 if row_bytes > 256 else 4, min(_stages(row_bytes, target), 2))


def importance_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """Configuration of the importance kernel: a tile as of the statistics, with fewer keys, for two products."""
    if head_dim > WHOLE_HEAD:
        return WIDE._replace(num_warps=8) if itemsize == 4 else WIDE
    row_bytes = sum(split_d(head_dim)) * itemsize
    if itemsize == 4 and row_bytes > 256:
        return Config(16, 16, 8, 1)
    if rows <= 16:
        return Config(16, 16 if itemsize == 2 and _is_blackwell(target) else 32, 4, 1)
    if itemsize == 4:
        return Config(32, 32, 8, 1)
    return Config(64, 16 if row_bytes > 256 else 32, 8 if row_bytes > 128 else 4, 1)


@lru_cache(1024)
def one_pass_config(head_dim: int, itemsize: int, keys: int, target: Target, bias: bool = False) -> ShortRows | None:
    """Configuration of the one-pass kernel, which holds whole rows of keys on chip.

    None if a row doesn't fit without register spills. Then the forward and map kernels are used instead.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    row_bytes = padded * itemsize
    if keys > LONGER_ROW or row_bytes > (128 if itemsize == 4 else 256):
        return None
    if itemsize == 4 or bias or target.backend == "hip":
        return _plain_row(padded, itemsize, keys, target, bias)
    if head_dim < padded and row_bytes > 128 and keys > SHORT_ROW // 2:
        return None
    if row_bytes <= 128 and keys <= (208 if target.arch == 90 else 128):
        # Two programs per processor, each of four warps and 64 rows: one computes while the other loads.
        parts = max(1, (keys + 31) // 64)
        tail = 0 if keys <= 64 * parts else 16 if keys <= 64 * parts + 16 else 32
        return ShortRows(Config(64, 64, 4, 1), padded, parts, tail)
    if keys <= SHORT_ROW:
        block_n = max(64, 1 << (keys - 1).bit_length())
        if row_bytes <= 128 and int(target.arch) < 90:
            return ShortRows(Config(32, 128, 4, 1), padded, 2)  # two programs per processor, as above
        rows = 32 if row_bytes > 128 and target.arch != 90 else 64
        return ShortRows(Config(rows, block_n, 8, 2 if target.arch == 90 and row_bytes <= 128 else 1), padded)
    if row_bytes > 128:
        return None
    if int(target.arch) < 90:
        return ShortRows(Config(32 if padded == 64 else 16, SHORT_ROW, 8, 1), padded, 1, 32, delay_pv=padded < 64)
    if target.arch == 90 and keys <= SHORT_ROW + 16:
        return ShortRows(Config(64, SHORT_ROW, 8, 2), padded, 1, 16)
    return ShortRows(Config(64, SHORT_ROW, 8, 1), padded, 1, 32)


def _plain_row(padded: int, itemsize: int, keys: int, target: Target, bias: bool) -> ShortRows | None:
    """One tile per row of keys and few rows, for fp32, a bias, or AMD, which need more registers."""
    block_n = max(16, 1 << (keys - 1).bit_length())
    if keys > SHORT_ROW or (bias and block_n > 128 and padded * itemsize > 128):
        return None
    if bias and itemsize < 4 and target.backend == "cuda":
        divisor = 4 if padded * itemsize > 128 else 2 if _is_blackwell(target) else 1
        rows = 64 * 64 // max(64, block_n) // divisor
        return ShortRows(Config(max(16, rows), block_n, 8, 1), padded)
    return ShortRows(Config(16, block_n, 8 if block_n > 64 and target.backend == "cuda" else 4, 1), padded)


def _stages(row_bytes: int, target: Target) -> int:
    """Pipeline stages that fit in shared memory, for rows of K of `row_bytes`."""
    if target.backend == "hip":
        return 1
    if not _is_small(target):
        return 3 if row_bytes <= 128 else 2
    return 2 if row_bytes < 256 else 1


def _is_small(target: Target) -> bool:
    """True for GPUs with 99 KB of shared memory (consumer GPUs); data center GPUs have at least 163 KB."""
    return target.backend == "cuda" and not (target.arch in (80, 87, 90) or _is_blackwell(target))


def _is_blackwell(target: Target) -> bool:
    return target.backend == "cuda" and 100 <= int(target.arch) < 120
