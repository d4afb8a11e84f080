"""Problems and candidates of the block-size sweep: the kernels, their shapes, and their launch configurations."""

import itertools
from collections.abc import Iterator
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
    map_config,
    one_pass_config,
    vecmat_config,
)
from attnx.kernels.forward import forward_launch
from attnx.kernels.map import map_launch
from attnx.kernels.one_pass import one_pass_launch
from attnx.kernels.vecmat import vecmat_launch

HEADS = 12
BATCH = {197: 64, 257: 64, 1370: 4, 4097: 1}  # {N: batch size}, large enough that the heads are not split
WARPS = (4, 8)
# (keys in a tile, tiles, tail) of the one-pass kernel.
LAYOUTS = {
    197: ((256, 1, 0), (128, 2, 0), (64, 3, 16), (64, 4, 0)),
    257: ((128, 2, 16), (64, 4, 16), (256, 1, 16)),
}


class Problem(NamedTuple):
    """A kernel ("one_pass", "forward", "map" or "vecmat") on N tokens with head dim D."""

    kernel: str
    N: int
    D: int


# The most important first.
PROBLEMS = tuple(
    Problem(kernel, n, d)
    for d in (64, 128)
    for kernel, n in (("one_pass", 197), ("map", 1370), ("forward", 1370), ("one_pass", 257), ("vecmat", 4097))
)


class Candidate(NamedTuple):
    """A configuration of any kernel. tail and lag apply to the one-pass kernel only."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    tail: int = 0
    lag: int = 0

    @property
    def config(self) -> Config:
        """The configuration of a kernel other than one-pass."""
        return Config(*self[:5])

    def short_rows(self, head_dim: int) -> ShortRows:
        """The configuration of the one-pass kernel."""
        padded = max(16, 1 << (head_dim - 1).bit_length())
        return ShortRows(Config(*self[:4]), padded, self.parts, self.tail, bool(self.lag))


class Built(NamedTuple):
    """A launch and the tensors that it writes, which are NaN before."""

    launch: Launch
    results: dict[str, Tensor]


def default(problem: Problem, target: Target) -> Candidate | None:
    """The backend's configuration; None if it does not use this kernel."""
    itemsize = torch.bfloat16.itemsize
    kernel, n, d = problem
    if kernel == "one_pass":
        short = one_pass_config(d, itemsize, n, target)
        return short and Candidate(*short.config[:4], short.parts, short.tail, int(short.delay_pv))
    if kernel == "forward":
        return Candidate(*forward_config(d, itemsize, n, BATCH[n] * HEADS, target))
    return Candidate(*(map_config if kernel == "map" else vecmat_config)(d, itemsize, n, target))


def candidates(problem: Problem, target: Target) -> list[Candidate]:
    """The default, if there is one, then all other candidates."""
    first = default(problem, target)
    others = _one_pass(problem, first) if problem.kernel == "one_pass" else _tiles(problem)
    return list(dict.fromkeys([*([first] if first else []), *others]))


def _tiles(problem: Problem) -> Iterator[Candidate]:
    for sizes in itertools.product((64, 128), (32, 64, 128), WARPS, (2, 3)):
        yield Candidate(*sizes)
    yield from (Candidate(64, 256, 8, 2), Candidate(128, 256, 8, 2))
    if problem.kernel == "map":
        yield from (Candidate(rows, 64, 4, stages, 2) for rows in (64, 128) for stages in (2, 3))


def _one_pass(problem: Problem, first: Candidate | None) -> Iterator[Candidate]:
    rows = (32, 64) if problem.D == 64 else (16, 32)
    for block_m, layout, warps, stages in itertools.product(rows, LAYOUTS[problem.N], WARPS, (1, 2)):
        block_n, parts, tail = layout
        yield Candidate(block_m, block_n, warps, stages, parts, tail, 1)
    if first is not None:
        yield first._replace(lag=1 - first.lag)


def build(problem: Problem, candidate: Candidate, target: Target, device: str) -> Built:
    """The launch of a candidate. On the "meta" device tensors have shapes only."""
    kernel, n, d = problem
    B = BATCH[n]
    if device != "meta":
        torch.manual_seed(0)
    qkv = torch.randn(B, n, 3, HEADS, d, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    out = torch.full((B, n, HEADS, d), torch.nan, dtype=q.dtype, device=device).transpose(1, 2)
    lse = torch.full((B, HEADS, n), torch.nan, device=device)
    shared, values = shared_args(q, k, None, None, d**-0.5, False), value_args(q, v, out)
    if kernel == "forward":
        grid = triton.cdiv(n, candidate.block_m) * B * HEADS
        launch = forward_launch(shared, values, lse, target)._replace(config=candidate.config, grid=(grid,))
        return Built(launch, {"out": out, "lse": lse})
    if kernel != "one_pass" and device != "meta":
        torch.logsumexp(q.float() @ k.float().transpose(-2, -1) * d**-0.5, -1, out=lse)
    if kernel == "vecmat":
        r, result = torch.rand(B, n, device=device), torch.full((B, HEADS, n), torch.nan, device=device)
        grid = triton.cdiv(n, candidate.block_n) * B * HEADS
        launch = vecmat_launch(shared, r, lse, result, target)._replace(config=candidate.config, grid=(grid,))
        return Built(launch, {"vector": result})
    maps = torch.full((B, n, n), torch.nan, device=device)
    if kernel == "map":
        return Built(map_launch(shared, lse, maps, 0, 1, candidate.config), {"map": maps})
    launch = one_pass_launch(shared, values, maps, 0, 1, candidate.short_rows(d))
    return Built(launch, {"out": out, "map": maps})
