"""Statistics of each row of attention weights: their names, what they need, and their definition in torch."""

from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor


class Statistic(IntFlag):
    """A statistic of a row of weights. The kernels use the same values."""

    ENTROPY = 1
    DISTANCE = 2
    MAX = 4
    MASS = 8


# A plain dict, since torch.compile does not trace the members of an enum class.
_BY_NAME = {member.name.lower(): int(member) for member in Statistic if member.name}
NAMES = tuple(_BY_NAME)


def parse(names: Sequence[str]) -> int:
    """The statistics with these names, as a sum of values of `Statistic`.

    Raises:
        ValueError: no names, or an unknown one.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"stats: expected a sequence of {', '.join(NAMES)}; got {names!r}")
    which = 0
    for name in names:
        if not isinstance(name, str) or name not in _BY_NAME:
            raise ValueError(f"stats: expected names among {', '.join(NAMES)}; got {name!r}")
        which |= _BY_NAME[name]
    return which


def by_name(stats: Tensor, which: int, names: Sequence[str]) -> dict[str, Tensor]:
    """{name: [B, H, M]} in the order of `names`, from the statistics `which`, [S, B, H, M]."""
    found = dict(zip((name for name in NAMES if which & _BY_NAME[name]), stats.unbind(), strict=True))
    return {name: found[name] for name in names}


class Statistics(NamedTuple):
    """The statistics of a call.

    Attributes:
        which: a sum of values of `Statistic`.
        prefix: the number of keys at the start whose weights MASS sums.
        queries_at: [P, M, 2] float32, contiguous: row and column of each query on the grid of patches, NaN for one
            without a place. P divides B, and item b has queries_at[b % P]. None without DISTANCE.
        keys_at: [P, N, 2], the same of the keys.
    """

    which: int
    prefix: int = 0
    queries_at: Tensor | None = None
    keys_at: Tensor | None = None

    @property
    def places(self) -> int:
        """Number of items of the places, P."""
        return 1 if self.queries_at is None else len(self.queries_at)

    @property
    def members(self) -> list[Statistic]:
        """The statistics in the order of their results."""
        return [member for member in Statistic if member & self.which]

    def new_result(self, q: Tensor) -> Tensor:
        """Uninitialised result [S, B, H, M] for queries [B, H, M, D]."""
        return q.new_empty((self.which.bit_count(), *q.shape[:3]), dtype=torch.float32)

    def of_empty_rows(self, q: Tensor) -> Tensor:
        """[S, B, H, M]: the statistics of rows without keys: 0, and NaN for the distance of a query without a place."""
        stats = self.new_result(q).zero_()
        if self.queries_at is not None and self.which & Statistic.DISTANCE:
            at = self.members.index(Statistic.DISTANCE)
            stats[at] += (self.queries_at[..., 0] * 0).repeat(len(q) // self.places, 1)[:, None]
        return stats

    def distances(self, block: slice) -> Tensor | None:
        """[P, rows, N]: distances of a block of queries to all keys; 0 for a key, NaN for a query without a place."""
        if self.queries_at is None or self.keys_at is None:
            return None
        return distances(self.queries_at[:, block], self.keys_at)

    def of_rows(self, p: Tensor, far: Tensor | None) -> Tensor:
        """[S, B, rows]: the statistics of weights [B, rows, N] with the distances [P, rows, N]. This is the definition.

        float64 weights have float64 statistics.
        """
        found = []
        for member in self.members:
            if member is Statistic.ENTROPY:
                found.append(torch.special.entr(p).sum(-1).clamp(min=0))
            elif member is Statistic.DISTANCE and far is not None:
                found.append((p.view(-1, *far.shape) * far).sum(-1).view(p.shape[:-1]))
            elif member is Statistic.MAX:
                found.append(p.amax(-1))
            else:
                found.append(p[..., : self.prefix].sum(-1))
        return torch.stack(found)

    def of_weights(self, p: Tensor) -> Tensor:
        """[S, B, H, M]: the statistics of weights [B, H, M, N]."""
        far = self.distances(slice(None))
        return torch.stack([self.of_rows(head.float(), far) for head in p.unbind(1)], 2)


def distances(queries_at: Tensor, keys_at: Tensor) -> Tensor:
    """[..., M, N]: Euclidean distances of places [..., M, 2] and [..., N, 2].

    0 for a key without a place, NaN for a query without one.
    """
    between = (queries_at[..., :, None, :] - keys_at.nan_to_num(nan=torch.inf)[..., None, :, :]).square().sum(-1).sqrt()
    return between.masked_fill(between == torch.inf, 0.0)


def grid_places(grid: tuple[int, int], prefix: int, count: int, device: torch.device) -> Tensor:
    """[count, 2] float32: row and column of each token; the grid follows `prefix` tokens, other tokens are NaN."""
    at = torch.full((count, 2), torch.nan, device=device, dtype=torch.float32)
    rows = torch.arange(grid[0], device=device, dtype=torch.float32)
    columns = torch.arange(grid[1], device=device, dtype=torch.float32)
    at[prefix : prefix + grid[0] * grid[1]] = torch.cartesian_prod(rows, columns).view(-1, 2)
    return at
