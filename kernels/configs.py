"""Block sizes: a pure function of op, head dims, element size and target. Nothing is searched at run time."""

from typing import Any, NamedTuple

from attnx.kernels.launching import launch

SHORT_ROW = 256  # keys of a row that fits on chip beside its map, in one tile
LONGER_ROW = 288  # and with a tail of 32 keys: 256 patches, a class token, registers

# Streaming multiprocessors (compute units) of the usual part; the device's own number is taken where there is one.
PROCESSORS = {80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, "gfx90a": 110, "gfx942": 304}


class Target(NamedTuple):
    """backend: "cuda" | "hip"; arch: 80, 90, 100 or "gfx942"; processors: how many programs run side by side."""

    backend: str
    arch: int | str
    processors: int = 0

    @property
    def width(self) -> int:
        return self.processors or PROCESSORS.get(self.arch, 108)


class Config(NamedTuple):
    """A tile of rows and of keys, warps of a program, loads in flight; parts: tiles of keys side by side (of a map)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1


class Launch(NamedTuple):
    """A kernel with everything it is launched with, so that it can be run here or compiled for elsewhere."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: Config

    def run(self) -> None:
        """Launches it on the current device."""
        config = self.config
        blocks = {} if "BLOCK" in self.args else dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n)
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
        launch(self.kernel, self.grid, {**self.args, **blocks}, options)


class ShortRows(NamedTuple):
    """How the one-pass kernel lays out a row of keys: `parts` tiles of config.block_n, and a tail.

    padded: the head dim, padded; lag: the values are weighed one head later (see the kernel).
    """

    config: Config
    padded: int
    parts: int = 1
    tail: int = 0
    lag: bool = True


def split_d(head_dim: int) -> tuple[int, int]:
    """A head dim as two tiles, powers of two of 16 or more: 64 is (64, 0), 80 (64, 16), 72 (64, 16), 104 (128, 0)."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    first = padded // 2
    rest = max(16, 1 << (head_dim - first - 1).bit_length()) if padded > 16 else padded
    return (first, rest) if first + rest < padded else (padded, 0)


def head_splits(programs: int, heads: int, target: Target) -> int:
    """Over how many programs the heads of a tile are split, so that a small batch does not leave processors idle.

    All but the last have two heads or more, so the partial maps are fewer than the heads' and than the processors.
    """
    splits = max(1, min(heads // 2, target.width // max(1, programs)))
    each = -(-heads // splits)
    return -(-heads // each)


def forward_config(
    head_dim: int, itemsize: int, rows: int, heads: int, target: Target, bias: bool = False, even: bool = True
) -> Config:
    """Output and lse, one head a program.

    head_dim: the larger of D and Dv; heads: B * H; bias: a tile of it too; even: D is Dv, and one tile of `split_d`.
    """
    width = sum(split_d(head_dim)) * itemsize  # bytes a row of K or V takes
    stages = _stages(width, target)
    if width > 512:
        return Config(16 if rows <= 16 else 32, 16, 4, 1)
    if rows <= 16:
        return Config(16, 64 if width <= 256 else 32, 4, min(stages, 2))
    if itemsize == 4:
        return Config(32, 32, 8, 1)
    if width == 512:
        return Config(64, 32, 8, min(stages, 2))
    if bias:
        return Config(128, 32, 8, 1) if _is_blackwell(target) else Config(64, 32, 4, 1)
    if target.backend == "hip":
        return Config(128 if width <= 128 else 64, 64, 4, stages)
    if target.arch == 90 and not even:
        # Of 64 keys at a time ptxas 12.8 takes some descriptors from a register that nothing wrote, see `undefined`.
        return Config(64, 32, 4, min(stages, 2))
    if -(-rows // 128) * heads < target.width:
        return Config(64, 64 if width <= 128 else 32, 4, stages)
    return Config(128, 64, 4, stages) if width <= 128 else Config(128, 32, 8, stages)


def map_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """A tile of the head-reduced map; the program loops over the heads."""
    width = sum(split_d(head_dim)) * itemsize
    stages = _stages(width, target)
    if width > 512:
        return Config(16 if rows <= 16 else 32, 32, 4, 1)
    if itemsize == 4:
        return Config(16, 32, 4, 1) if rows <= 16 else Config(32, 32, 8, 1)
    if rows <= 16:
        if bias:
            return Config(16, 64 if width <= 256 and not _is_blackwell(target) else 32, 4, 1)
        return Config(16, 128 if width <= 256 else 32, 4, stages if width <= 256 else 1)
    if width == 512:
        return Config(64, 64, 8, min(stages, 2))
    if bias:
        if _is_blackwell(target):
            return Config(64, 32, 4, 1)
        return Config(64, 64, 4 if width <= 64 else 8, 1)
    if target.arch == 90 and width <= 128:
        return Config(64, 64, 4, 3, parts=2)  # three programs a processor: what one waits for, the others hide
    if target.backend == "cuda" and width <= 128:
        return Config(128, 64, 4, min(stages, 2))  # two programs a processor
    return Config(128, 64 if _is_small(target) else 128, 8, stages)


def gradient_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """A tile of the gradient-weighted map: smaller than the map's, because a second product is beside the first."""
    width = sum(split_d(head_dim)) * itemsize
    if target.arch == 90 and rows > 16 and itemsize == 4 and width <= 256:
        return Config(32, 32, 4, 1)
    if target.arch == 90 and rows > 16 and bias and width <= 64:
        return Config(64, 32, 4, 1)
    if target.backend == "hip" or itemsize == 4 or (bias and width <= 160) or (rows <= 16 and not bias):
        return map_config(head_dim, itemsize, rows, target, bias)
    if bias and rows <= 16:
        return Config(16, 32, 4, 1)
    if bias:
        return Config(64, 32, 4, 1) if int(target.arch) in (90, 100, 120) else Config(32, 64, 4, 1)
    return Config(128, 64, 8, 2) if width <= 256 else Config(64, 32, 8, 1)


def vecmat_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """A block of r @ P: a tile as of the map, whose sum over its rows is taken once, at the end."""
    width = sum(split_d(head_dim)) * itemsize
    if bias or itemsize == 4 or width > 256:
        return map_config(head_dim, itemsize, rows, target, bias)
    if target.arch == 90 and width <= 128:
        return Config(64, 128, 4, 3)
    stages = min(_stages(width, target), 2)
    return Config(64, 64, 4, stages) if width <= 128 else Config(64, 128, 8, stages)


def one_pass_config(head_dim: int, itemsize: int, keys: int, target: Target, bias: bool = False) -> ShortRows | None:
    """Whole rows of keys on chip; None where they do not fit without spills and the long way is taken."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    width = padded * itemsize
    if keys > LONGER_ROW or width > (128 if itemsize == 4 else 256):
        return None
    if itemsize == 4 or bias or target.backend == "hip":
        return _plain_row(padded, itemsize, keys, target, bias)
    if head_dim < padded and width > 128 and keys > SHORT_ROW // 2:
        return None
    if width <= 128 and keys <= (208 if target.arch == 90 else 128):
        # Four warps with 64 rows of their own, two programs a processor: one computes while the other loads.
        parts = max(1, (keys + 31) // 64)
        tail = 0 if keys <= 64 * parts else 16 if keys <= 64 * parts + 16 else 32
        return ShortRows(Config(64, 64, 4, 1), padded, parts, tail)
    if keys <= SHORT_ROW:
        block_n = max(64, 1 << (keys - 1).bit_length())
        if width <= 128 and int(target.arch) < 90:
            return ShortRows(Config(32, 128, 4, 1), padded, 2)  # two programs a processor, as above
        rows = 32 if width > 128 and target.arch != 90 else 64
        return ShortRows(Config(rows, block_n, 8, 2 if target.arch == 90 and width <= 128 else 1), padded)
    if width > 128:
        return None
    if int(target.arch) < 90:
        return ShortRows(Config(32 if padded == 64 else 16, SHORT_ROW, 8, 1), padded, 1, 32, lag=padded < 64)
    if target.arch == 90 and keys <= SHORT_ROW + 16:
        return ShortRows(Config(64, SHORT_ROW, 8, 2), padded, 1, 16)
    return ShortRows(Config(64, SHORT_ROW, 8, 1), padded, 1, 32)


def _plain_row(padded: int, itemsize: int, keys: int, target: Target, bias: bool) -> ShortRows | None:
    """One tile a row, few rows: fp32, a bias, and AMD need the registers."""
    block_n = max(16, 1 << (keys - 1).bit_length())
    if keys > SHORT_ROW or (bias and block_n > 128 and padded * itemsize > 128):
        return None
    if bias and itemsize < 4 and target.backend == "cuda":
        fewer = 4 if padded * itemsize > 128 else 2 if _is_blackwell(target) else 1
        rows = 64 * 64 // max(64, block_n) // fewer
        return ShortRows(Config(max(16, rows), block_n, 8, 1), padded)
    return ShortRows(Config(16, block_n, 8 if block_n > 64 and target.backend == "cuda" else 4, 1), padded)


def _stages(width: int, target: Target) -> int:
    """Loads in flight: what shared memory has room for."""
    if target.backend == "hip":
        return 1
    if not _is_small(target):
        return 3 if width <= 128 else 2
    return 2 if width < 256 else 1


def _is_small(target: Target) -> bool:
    """Consumer GPUs have 99 KB of shared memory, data centers' 163 and more."""
    return target.backend == "cuda" and not (target.arch in (80, 87, 90) or _is_blackwell(target))


def _is_blackwell(target: Target) -> bool:
    return target.backend == "cuda" and 100 <= int(target.arch) < 120
