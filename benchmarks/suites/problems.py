"""What a sweep tries: every kernel at the shapes it serves, and the ways in which it could be launched."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attnx.kernels.arguments import shared_args, value_args
from attnx.kernels.configs import (
    Config,
    Launch,
    ShortRows,
    Target,
    forward_config,
    head_splits,
    map_config,
    one_pass_config,
    vecmat_config,
)
from attnx.kernels.forward import forward_launch
from attnx.kernels.map import fuse_launch, map_launch
from attnx.kernels.one_pass import one_pass_launch
from attnx.kernels.vecmat import vecmat_launch

HEADS = 12
BATCH = {197: 64, 257: 64, 1370: 4, 4097: 1}  # where a problem doesn't say
KERNELS = ("one_pass", "forward", "map", "vecmat")
SPLITS = (1, 2, 3, 6)
BLOCKS = {
    **dict.fromkeys(("forward", "map", "vecmat"), ((64, 128), (32, 64, 128))),
    "one_pass": ((16, 32, 64), (256,)),
}  # of rows, of keys
WARPS = (4, 8)
STAGES = {**dict.fromkeys(("forward", "map", "vecmat"), (2, 3)), "one_pass": (1, 2)}
LAYOUTS = {
    197: ((256, 1, 0), (128, 2, 0), (64, 3, 16), (64, 4, 0)),
    257: ((128, 2, 16), (64, 4, 16), (256, 1, 16)),
}  # of the one-pass kernel: a tile of keys, how many, and the tail


class Problem(NamedTuple):
    """What is computed: kernel is one of KERNELS; B: 0 stands for BATCH[N]."""

    kernel: str
    N: int
    D: int
    B: int = 0

    @property
    def batch(self) -> int:
        return self.B or BATCH[self.N]

    def __str__(self) -> str:
        return f"{self.kernel} B={self.batch} N={self.N} D={self.D}"


class Candidate(NamedTuple):
    """A configuration of any kernel: those of the one-pass kernel have all fields, others `Config`'s and splits."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    tail: int = 0
    lag: int = 0
    splits: int = 1

    @property
    def config(self) -> Config:
        return Config(*self[:5])

    def short_rows(self, head_dim: int) -> ShortRows:
        padded = max(16, 1 << (head_dim - 1).bit_length())
        return ShortRows(Config(*self[:4]), padded, self.parts, self.tail, bool(self.lag))


class Built(NamedTuple):
    """A launch, what it writes (NaN until all has run), and what makes one map of those of split heads."""

    launch: Launch
    results: dict[str, Tensor]
    fuse: Launch | None = None

    def run(self) -> None:
        self.launch.run()
        if self.fuse is not None:
            self.fuse.run()


# The most important first. One image alone is where the heads are split.
PROBLEMS = tuple(
    Problem(kernel, n, d, batch)
    for d in (64, 128)
    for kernel, n, batch in (
        *(("one_pass", 197, 0), ("map", 1370, 0), ("forward", 1370, 0), ("one_pass", 257, 0), ("vecmat", 4097, 0)),
        *(("one_pass", 197, 1), ("map", 1370, 1), ("forward", 1370, 1), ("vecmat", 1370, 0)),
    )
)


def default(problem: Problem, target: Target) -> Candidate | None:
    """What the backend would take; None where it would take the long way."""
    itemsize = torch.bfloat16.itemsize
    _, n, d, _ = problem
    if problem.kernel == "one_pass":
        short = one_pass_config(d, itemsize, n, target)
        if short is None:
            return None
        first = Candidate(*short.config[:4], short.parts, short.tail, int(short.lag))
        return first._replace(splits=_splits(first, problem, target))
    if problem.kernel == "forward":
        return Candidate(*forward_config(d, itemsize, n, problem.batch * HEADS, target))
    first = Candidate(*(map_config if problem.kernel == "map" else vecmat_config)(d, itemsize, n, target))
    return first._replace(splits=_splits(first, problem, target)) if problem.kernel == "map" else first


def candidates(problem: Problem, target: Target) -> list[Candidate]:
    """The default first, then every other one, no two the same."""
    first = default(problem, target)
    return list(dict.fromkeys([*([first] if first else []), *_candidates(problem, first)]))


def _candidates(problem: Problem, first: Candidate | None) -> Iterable[Candidate]:
    if problem.kernel != "one_pass":
        grid = itertools.product(*BLOCKS[problem.kernel], WARPS, STAGES[problem.kernel])
        found = [Candidate(*sizes) for sizes in grid]
        found += [Candidate(64, 256, 8, 2), Candidate(128, 256, 8, 2)]
        if problem.kernel == "map":
            found += [Candidate(rows, 64, 4, stages, 2) for rows in (64, 128) for stages in (2, 3)]
        if problem.kernel != "map" or problem.B != 1 or first is None:
            return found
        return [c._replace(splits=s) for c in found if c[2:4] == first[2:4] for s in SPLITS]
    return _one_pass(problem, first)


def _one_pass(problem: Problem, first: Candidate | None) -> Iterator[Candidate]:
    rows = BLOCKS["one_pass"][0]
    if problem.B == 1:
        if first is not None:
            for block_m, splits in itertools.product(rows, SPLITS):
                yield first._replace(block_m=block_m, splits=splits)
        return
    rows = rows[1:] if problem.D == 64 else rows[:-1]
    for block_m, layout, warps, stages in itertools.product(rows, LAYOUTS[problem.N], WARPS, STAGES["one_pass"]):
        block_n, parts, tail = layout
        yield Candidate(block_m, block_n, warps, stages, parts, tail, 1)
    if first is not None:
        yield first._replace(lag=1 - first.lag)


def build(problem: Problem, candidate: Candidate, target: Target, device: str) -> Built:
    """The launch of that candidate. On "meta" there are shapes only."""
    B, n, d, splits = problem.batch, problem.N, problem.D, candidate.splits
    if device != "meta":
        torch.manual_seed(0)
    qkv = torch.randn(B, n, 3, HEADS, d, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    out = torch.full((B, n, HEADS, d), torch.nan, dtype=q.dtype, device=device).transpose(1, 2)
    lse = torch.full((B, HEADS, n), torch.nan, device=device)
    shared, values = shared_args(q, k, None, None, d**-0.5, False), value_args(q, v, out)
    if problem.kernel == "forward":
        grid = triton.cdiv(n, candidate.block_m) * B * HEADS
        launch = forward_launch(shared, values, lse, target)._replace(config=candidate.config, grid=(grid,))
        return Built(launch, {"out": out, "lse": lse})
    if problem.kernel != "one_pass" and device != "meta":
        torch.logsumexp(q.float() @ k.float().transpose(-2, -1) * d**-0.5, -1, out=lse)
    if problem.kernel == "vecmat":
        r, result = torch.rand(B, n, device=device), torch.full((B, HEADS, n), torch.nan, device=device)
        grid = triton.cdiv(n, candidate.block_n) * B * HEADS
        launch = vecmat_launch(shared, r, lse, result, target)._replace(config=candidate.config, grid=(grid,))
        return Built(launch, {"vector": result})
    maps = torch.full((B * splits, n, n), torch.nan, device=device)
    amap = torch.full((B, n, n), torch.nan, device=device) if splits > 1 else maps
    fuse = fuse_launch(maps, amap, HEADS, splits, 0) if splits > 1 else None
    if problem.kernel == "map":
        return Built(map_launch(shared, lse, maps, 0, splits, candidate.config), {"map": amap}, fuse)
    launch = one_pass_launch(shared, values, maps, 0, splits, candidate.short_rows(d))
    return Built(launch, {"out": out, "map": amap}, fuse)


def _splits(candidate: Candidate, problem: Problem, target: Target) -> int:
    """Over how many programs the backend would split the heads."""
    tiles = triton.cdiv(problem.N, candidate.block_m) * problem.batch
    if problem.kernel == "map":
        tiles *= triton.cdiv(problem.N, candidate.block_n * candidate.parts)
    return head_splits(tiles, HEADS, target)
