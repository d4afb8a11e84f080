"""Table of the calls that the Hopper kernels take, with their block sizes. The kernels for all GPUs take the others.

| kernel                | head dim  | keys      | rows | keys of a tile | stages |
|-----------------------|-----------|-----------|------|----------------|--------|
| short rows, one exp   | to 64     | to 208    | > 64 | whole row      | 2      |
| short rows, one exp   | 72 to 128 | to 128    | > 64 | whole row      | 2      |
| short rows, two exps  | to 64     | 209 to 288| > 64 | whole row      | 2      |
| map                   | to 64     | any       | > 64 | 256            | 3      |
| map                   | 72 to 96  | any       | > 64 | 256            | 2      |
| map                   | 104 to 128| any       | > 64 | 128            | 3      |
| map, additive mask    | to 128    | any       | > 64 | 128            | 3      |
| vecmat, no mask       | to 96     | any       | > 64 | 256            | 3      |
| vecmat, no mask       | to 128    | any       | > 64 | 128            | 3      |

All of them take float16 and bfloat16, head dims that are multiples of 8, and grouped heads. The map and the short rows
also take every reduction of the heads, causal attention and masks of keys.
"""

from typing import NamedTuple

from attnx.kernels.configs import LONGER_ROW, split_d

ROWS = 128  # query rows of a tile: 64 for each of two warpgroups
CHUNK = 64  # keys of a product
FEWEST_ROWS = 65  # with fewer rows, one of the warpgroups has no work
WIDEST_HEAD = 128


class ShortRow(NamedTuple):
    """Layout of a row of keys: `chunks` of CHUNK keys and a tail of 0, 16 or 32.

    width: columns of a box, the head dim rounded up to a power of two. twice: each weight is computed twice.
    """

    width: int
    chunks: int
    tail: int
    twice: bool
    stages: int = 2


class Tile(NamedTuple):
    """Tile of a map. width, rest: columns of the two boxes of a head, see `split_d`. chunks: of CHUNK keys."""

    width: int
    rest: int
    chunks: int
    stages: int

    @property
    def keys(self) -> int:
        """Keys of the tile."""
        return self.chunks * CHUNK


def short_row(head_dim: int, rows: int, keys: int) -> ShortRow | None:
    """Layout of a row for the short rows kernel; None if it doesn't take the call."""
    if not _takes(head_dim, rows) or keys > (LONGER_ROW if head_dim <= 64 else 128):
        return None
    width = max(32, 1 << (head_dim - 1).bit_length())
    over = keys % CHUNK
    tail = 0 if over == 0 or over > 32 or keys < CHUNK else 16 if over <= 16 else 32
    chunks = keys // CHUNK if tail else -(-keys // CHUNK)
    return ShortRow(width, chunks, tail, twice=keys > 208)


def map_tile(head_dim: int, rows: int, additive: bool) -> Tile | None:
    """Tile of the map kernel; None if it doesn't take the call. additive: there is an additive mask of keys."""
    if not _takes(head_dim, rows):
        return None
    width, rest = split_d(max(32, head_dim))
    if additive or width > 64:
        return Tile(width, rest, 2, 3)
    return Tile(width, rest, 4, 2 if rest else 3)


def vecmat_tile(head_dim: int, rows: int) -> Tile | None:
    """Tile of the vecmat kernel; None if it doesn't take the call."""
    if not _takes(head_dim, rows):
        return None
    width, rest = split_d(max(32, head_dim))
    return Tile(width, rest, 2 if width > 64 else 4, 3)


def _takes(head_dim: int, rows: int) -> bool:
    return head_dim % 8 == 0 and 8 <= head_dim <= WIDEST_HEAD and rows >= FEWEST_ROWS
