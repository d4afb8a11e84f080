"""Maps of windows as one sparse map of the grid, and the merging of patches, as linear maps of a rollout."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.ops.reducers import Reduction
from attnx.trace.records import LayerRecord
from attnx.trace.windows import Pair, Windows

# Elements of the largest dense map that `WindowRecord.map` makes: 1 GiB.
_MAX_ELEMENTS = 2**28


@dataclass(frozen=True, eq=False)
class WindowRecord:
    """The record of a block with windows: a map of the N tokens of the grid, [B, N, N], zero between windows.

    ``A[index[w, i], index[w, j]] = P_w[i, j]``. Padding has neither rows nor columns. Weights that a model gives to
    padding are given to the row's other keys, in proportion to their weights: the row keeps its sum.

    Args:
        record: the maps of the windows: [B * nW, K, K], or [B * nW, H, K, K] for heads="each".
        windows: the geometry.
        renormalise: False: the weights of padding are dropped, as for maps weighted by gradients.

    Raises:
        ValueError: the record does not have B * nW maps of K x K tokens.

    Example:
        >>> import torch
        >>> from attnx.trace.records import MapRecord
        >>> from attnx.trace.windows import Pair, Windows, window_index
        >>> windows = Windows(window_index((1, 4), (1, 2), (0, 0), False), (1, 4))
        >>> maps = torch.tensor([[[0.5, 0.5], [0, 1]], [[1, 0], [0.25, 0.75]]])
        >>> WindowRecord(MapRecord(maps), windows).map()
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000],
                 [0.0000, 1.0000, 0.0000, 0.0000],
                 [0.0000, 0.0000, 1.0000, 0.0000],
                 [0.0000, 0.0000, 0.2500, 0.7500]]])
    """

    record: LayerRecord
    windows: Windows
    renormalise: bool = True

    def __post_init__(self) -> None:
        shape, count, size = self.record.shape, self.windows.count, self.windows.size
        if shape[0] % count or shape[-2:] != (size, size):
            raise ValueError(f"record: expected maps of B * {count} windows of {size} tokens; got shape {list(shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map of the grid."""
        n = self.windows.tokens
        return (self.record.shape[0] // self.windows.count, *self.record.shape[1:-2], n, n)

    @property
    def device(self) -> torch.device:
        """Device of the maps of the windows."""
        return self.record.device

    @property
    def nbytes(self) -> int:
        """Bytes of the record of the windows. Layers of the same geometry share the index."""
        return self.record.nbytes

    @property
    def rows_sum_to_one(self) -> bool:
        """True if the rows of the windows sum to 1, and none loses the weight of padding."""
        return self.record.rows_sum_to_one and (self.renormalise or not self.windows.padded)

    def map(self) -> Tensor:
        """The dense map: [B, N, N], or [B, H, N, N] for heads="each".

        Raises:
            ValueError: it would have more than 2^28 elements.
        """
        shape, n = self.shape, self.windows.tokens
        if torch.Size(shape).numel() > _MAX_ELEMENTS:
            raise ValueError(
                f"map: expected at most 2^28 elements; got {list(shape)}: this layer attends in {self.windows.count} "
                "windows; read single rows by row(i), or multiply by vecmat(r), without the dense map"
            )
        at, _ = self.windows.places(self.device)
        maps: Tensor = self._real(self.record.map(), at).unflatten(0, (shape[0], -1)).movedim(1, -3)
        # Padding writes to row and column n, which are cut off.
        dense = maps.new_zeros(*shape[:-2], (n + 1) ** 2)
        dense[..., (at[:, :, None] * (n + 1) + at[:, None, :]).flatten()] = maps.flatten(-3)
        return dense.view(*shape[:-2], n + 1, n + 1)[..., :n, :n].contiguous()

    def row(self, i: int) -> Tensor:
        """Row of the token at position `i` of the grid: [B, N], or [B, H, N] for heads="each"."""
        w, inside = self._window_of("row", i)
        at = self.windows.places(self.device)[0][w]
        row = self._real(self.record.row(inside)[..., None, :][w :: self.windows.count], at[None])[..., 0, :]
        return self._scattered(row, at)

    def column(self, i: int) -> Tensor:
        """Column of the token at position `i` of the grid: [B, N], or [B, H, N] for heads="each"."""
        w, inside = self._window_of("column", i)
        at = self.windows.places(self.device)[0][w]
        column = self._real(self.record.map()[w :: self.windows.count], at[None])[..., inside]
        return self._scattered(column, at)

    def fused(self, heads: Reduction) -> "WindowRecord":
        """A record with the heads fused; the record itself if they already are."""
        record = self.record.fused(heads)
        return self if record is self.record else replace(self, record=record)

    def row_sums(self) -> Tensor:
        """Row sums of the map of the grid: [B, N]."""
        sums = self.record.row_sums() if self._sums is None else self._sums[0 if self.renormalise else 1]
        return sums.reshape(self.shape[0], -1)[:, self.windows.places(self.device)[1]]

    def vecmat(self, r: Tensor) -> Tensor:
        """Row vectors times the map, in time and memory linear in N: [B, R, N] -> [B, R, N].

        The maps of the windows are computed only if there is padding and `renormalise` is True.
        """
        at, place = self.windows.places(r.device)
        B, R, _ = r.shape
        inside = F.pad(r, (0, 1))[..., at].transpose(1, 2).flatten(0, 1)
        if self.renormalise and self._sums is not None:
            whole, kept = self._sums
            inside = inside * (whole / _divisor(kept))[:, None]
        passed = self.record.vecmat(inside).view(B, -1, R, self.windows.size).transpose(1, 2)
        return passed.reshape(B, R, -1)[..., place]

    def _window_of(self, what: str, i: int) -> tuple[int, int]:
        """(window, place inside it) of the token at position `i` of the grid."""
        n = self.windows.tokens
        if not -n <= i < n:
            raise IndexError(f"{what}: expected -{n}..{n - 1}; got {i}")
        return divmod(int(self.windows.places(torch.device("cpu"))[1][i]), self.windows.size)

    def _scattered(self, values: Tensor, at: Tensor) -> Tensor:
        """Values of the tokens of a window, [..., K], at their positions in the grid: [..., N], zero elsewhere."""
        # Padding writes to position N, which is cut off.
        whole = values.new_zeros(*values.shape[:-1], self.windows.tokens + 1)
        whole[..., at] = values
        return whole[..., :-1]

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor] | None:
        """Sums of the rows of the windows, [B * nW, K], with and without padding; None if there is no padding."""
        if not self.windows.padded:
            return None
        at, _ = self.windows.places(self.device)
        maps = self.record.map()
        whole, kept = maps.sum(-1), self._kept(maps, at).sum(-1)
        return torch.where(kept == 0, 0, whole), kept

    def _kept(self, rows: Tensor, at: Tensor) -> Tensor:
        """Rows of windows, [B * nW, (H,) M, K], without the weight of padding."""
        if not self.windows.padded:
            return rows
        padding = (at == self.windows.tokens).repeat(len(rows) // len(at), 1)
        return rows.masked_fill(padding.reshape(len(rows), *[1] * (rows.dim() - 2), -1), 0)

    def _real(self, rows: Tensor, at: Tensor) -> Tensor:
        """`_kept`, and each row with the sum it had before, if there is padding and `renormalise` is True."""
        kept = self._kept(rows, at)
        if not self.windows.padded or not self.renormalise:
            return kept
        return kept * (rows.sum(-1, keepdim=True) / _divisor(kept.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class PatchMerge:
    """The merging of 2 x 2 patches as a step of a rollout: each patch passes its weight to its patches before merging.

    Args:
        grid: (rows, columns) of patches before.
        merged: (rows, columns) after: half, rounded up.

    Raises:
        ValueError: `merged` is not half of `grid`.

    Example:
        >>> import torch
        >>> PatchMerge((1, 3), (1, 2)).vecmat(torch.tensor([[[0.5, 0.5]]]))
        tensor([[[0.2500, 0.2500, 0.5000]]])
    """

    grid: tuple[int, int]
    merged: tuple[int, int]

    def __post_init__(self) -> None:
        half = self.half(self.grid)
        if self.merged != half:
            raise ValueError(f"merged: expected {half}, half of {self.grid}; got {self.merged}")

    @staticmethod
    def half(grid: Pair) -> Pair:
        """The grid after the merging."""
        return (grid[0] + 1) // 2, (grid[1] + 1) // 2

    def vecmat(self, r: Tensor) -> Tensor:
        """Weights of the merged patches, in equal parts to their 4, 2 or 1 patches: [B, R, h' w'] -> [B, R, h w]."""
        x = r.reshape(*r.shape[:-1], *self.merged)
        for axis, n in ((-2, self.grid[0]), (-1, self.grid[1])):
            x = (x / 2).repeat_interleave(2, axis)
            if n % 2:
                # The last patch of an odd axis has one patch on that axis, and passes it everything.
                x = torch.cat([x.narrow(axis, 0, n - 1), 2 * x.narrow(axis, n - 1, 1)], axis)
        return x.flatten(-2)


def _divisor(sums: Tensor) -> Tensor:
    """The sums, and 1 in place of 0: a row without weight stays zero."""
    return torch.where(sums == 0, 1, sums)
