"""Block sizes: a pure function of op, head dims, element size and target. Nothing is searched at run time."""

from typing import Any, NamedTuple

SHORT_ROW = 256  # keys; a longer row does not fit on chip beside its map


class Target(NamedTuple):
    """backend: "cuda" | "hip"; arch: 80, 90, 100 or "gfx942"."""

    backend: str
    arch: int | str


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """A kernel with everything it is launched with, so that it can be run here or compiled for elsewhere."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: Config

    def run(self) -> None:
        self.kernel[self.grid](
            **self.args,
            BLOCK_M=self.config.block_m,
            BLOCK_N=self.config.block_n,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            enable_fp_fusion=True,
        )


def block_d(head_dim: int) -> int:
    """The power of two that a head dim is padded to; matrix units take no less than 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _stages(width: int, target: Target) -> int:
    """Loads in flight: what shared memory has room for. Consumer GPUs have 99 KB of it, Turing 64, CDNA 3 64."""
    if target.backend == "hip":
        return 1
    arch = int(target.arch)
    if arch in (80, 87, 90) or 100 <= arch < 120:
        return 3 if width <= 128 else 2
    return 2 if width <= 128 and arch > 80 else 1


def _is_turing(target: Target) -> bool:
    return target.backend == "cuda" and int(target.arch) < 80


def forward_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """Output and lse, one head a program. head_dim: the larger of D and Dv; bias: a tile of it is loaded too."""
    width = block_d(head_dim) * itemsize  # bytes a row of K or V takes
    stages = _stages(width, target)
    if width > 512:
        return Config(16 if rows <= 16 else 32, 16, 4, 1)
    if rows <= 16:
        return Config(16, 64 if width <= 256 else 32, 4, min(stages, 2))
    if itemsize == 4 or width == 512:
        return Config(64, 64 if width <= 256 else 32, 8, min(stages, 2))
    if bias or (width > 128 and _is_turing(target)):
        return Config(64, 64, 4, min(stages, 2))
    if width <= 128:
        return Config(128, 64, 4, stages)
    return Config(128, 64, 8, stages) if target.backend == "cuda" else Config(64, 64, 4, stages)


def map_config(head_dim: int, itemsize: int, rows: int, target: Target, bias: bool = False) -> Config:
    """A tile of the head-reduced map; the program loops over the heads."""
    width = block_d(head_dim) * itemsize
    stages = _stages(width, target)
    if width > (512 if itemsize == 2 else 256):
        return Config(16 if rows <= 16 else 32, 32, 4, 1)
    if rows <= 16:
        return Config(16, 128 if width <= 256 else 32, 4, stages if width <= 256 else 1)
    if itemsize == 4 or width == 512:
        return Config(64, 64, 8, min(stages, 2))
    if bias:
        return Config(128 if width <= 128 else 64, 64, 8, min(stages, 2))
    return Config(128, 128, 8, stages)


def one_pass_config(head_dim: int, itemsize: int, keys: int, target: Target, bias: bool = False) -> Config | None:
    """Whole rows of keys on chip; None where they do not fit without spills and the long way is taken."""
    block_n = max(16, 1 << (keys - 1).bit_length())
    width = block_d(head_dim) * itemsize
    if keys > SHORT_ROW or width > (256 if itemsize == 2 and not _is_turing(target) else 128):
        return None
    if block_n < SHORT_ROW:
        return Config(32 if width <= 128 and not bias else 16, block_n, 4, 1)
    return Config(32 if width == 128 and target.backend == "cuda" and not bias else 16, block_n, 8, 1)
