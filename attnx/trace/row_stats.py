"""Statistics of the rows of a layer's map, and the places of its tokens that distances need."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnx.ops.statistics import NAMES, Statistics, by_name, grid_places, parse
from attnx.trace.layout import TokenLayout
from attnx.trace.tokens import Tokens
from attnx.trace.windows import Windows

Places = tuple[Tensor, Tensor]
PlacesCache = dict[Any, Places]
_MOST_PLACES = 256  # in a cache
KNOWN = (*NAMES, "importance")


class RowStats(Mapping[str, Tensor]):
    """{name: [B, H, M] float32} of one layer: see `attnx.attention_stats`. Windows are items, as in its map.

    Args:
        stats: the statistics.
        missing: {name: reason} of those that the layer cannot have.
    """

    def __init__(self, stats: Mapping[str, Tensor], missing: Mapping[str, str]) -> None:
        self._stats = dict(stats)
        self.missing = dict(missing)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._stats:
            captured = f"expected one of {', '.join(self._stats) or 'none'}"
            other = f"{captured}; pass it in stats= of the capture" if name in KNOWN else captured
            raise KeyError(f"{name!r}: {self.missing.get(name, other)}")
        return self._stats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def __repr__(self) -> str:
        shapes = [f"{name}: {list(stat.shape)}" for name, stat in self._stats.items()]
        return f"RowStats({{{', '.join([*shapes, *(f'{name}: none' for name in self.missing)])}}})"

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(stat.nbytes for stat in self._stats.values())

    def add(self, name: str, stat: Tensor) -> None:
        """Store a statistic that a backward pass has computed."""
        self._stats[name] = stat
        self.missing.pop(name, None)

    def clear(self) -> None:
        """Drop the statistics; the reasons of missing ones stay."""
        self._stats.clear()

    def to(self, device: str | torch.device) -> "RowStats":
        """The statistics on another device."""
        return RowStats({name: stat.to(device) for name, stat in self._stats.items()}, self.missing)

    def of_items(self, items: slice, rows: int | None) -> "RowStats":
        """The statistics of some items of the batch; `rows`: number of rows to keep; None: all."""
        return RowStats({name: stat[items, :, :rows] for name, stat in self._stats.items()}, self.missing)


class StatsOfLayers(Mapping[str, RowStats]):
    """{layer: its `RowStats`}, in the order of the calls; an index into the layers is allowed, too."""

    def __init__(self, stats: Mapping[str, RowStats]) -> None:
        self._stats = stats

    def __getitem__(self, layer: str | int) -> RowStats:
        names = list(self._stats)
        if not names:
            raise KeyError(f"{layer!r}: no statistics were captured; pass stats= to attnx.capture")
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            layer = names[layer]
        if layer not in self._stats:
            raise KeyError(f"layer {layer!r}: expected one of {', '.join(names)}")
        return self._stats[str(layer)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{layer!r}: {stats!r}' for layer, stats in self._stats.items())}}}"


class Wanted(NamedTuple):
    """The request for the statistics of one layer, for `attnx.ops.attention_stats.attention_with_stats`.

    Attributes:
        names: the statistics.
        missing: {name: reason} of those that were requested, and that the layer cannot have.
        places: places of the queries and the keys; None without distances.
        prefix: number of prefix tokens among the keys.
    """

    names: tuple[str, ...]
    missing: dict[str, str]
    places: Places | None
    prefix: int

    def of_weights(self, p: Tensor) -> RowStats:
        """The statistics of weights [B, H, M, N] that a model computed itself."""
        if not self.names:
            return RowStats({}, self.missing)
        which, places = parse(self.names), self.places or (None, None)
        found = Statistics(which, self.prefix, *places).of_weights(p)
        return RowStats(by_name(found, which, self.names), self.missing)


def check_stats(stats: Sequence[str], grad: bool | str) -> tuple[str, ...]:
    """The names, each once. Raise ValueError for an unknown one, for a string, or for importance without gradients."""
    if isinstance(stats, str) or not isinstance(stats, Sequence) or any(name not in KNOWN for name in stats):
        raise ValueError(f"stats: expected a sequence of {', '.join(KNOWN)}; got {stats!r}")
    if "importance" in stats and not grad:
        raise ValueError("stats: 'importance' needs grad=True; got grad=False")
    return tuple(dict.fromkeys(stats))


def wanted_of(
    names: Sequence[str],
    layer: str,
    sides: tuple[Tokens, Tokens],
    windows: Windows | None,
    device: torch.device,
    each: Sequence[tuple[int, int]] | None = None,
    known: PlacesCache | None = None,
) -> Wanted:
    """The request for those of the statistics `names` that a layer can have.

    Distances need patches on both sides, and mass needs prefix tokens among the keys.

    Args:
        names: the requested statistics.
        layer: name of the layer.
        sides: its queries and keys.
        windows: its windows, if it has any.
        device: of the places.
        each: the grid of each image, if there is padding after the patches of some.
        known: places of earlier calls, to which those of this call are added.
    """
    (queries, keys), missing = sides, {}
    patches = windows is not None or keys.layout is not None or each is not None
    places = None
    if "distance" in names:
        key = (queries, keys, windows, device, each)
        places = (known or {}).get(key) or places_of(*key)
        # Not those of a pass of fake tensors.
        if known is not None and places is not None and type(places[0]) is Tensor:
            if len(known) >= _MOST_PLACES:
                known.clear()
            known[key] = places
    if "distance" in names and places is None:
        missing["distance"] = f"{layer} has no distances: {_why(queries, keys)}"
    if "mass" in names and not patches:
        missing["mass"] = f"{layer} has no known prefix tokens: {_why(queries, keys)}"
    elif "mass" in names and not keys.prefix:
        missing["mass"] = f"{layer} has no prefix tokens: its keys are {keys}"
    if "importance" in names:
        missing["importance"] = f"no gradient reached {layer}: call trace.backward(score) first"
    found = tuple(name for name in names if name not in missing)
    return Wanted(found, missing, places, keys.prefix if patches else 0)


def places_of(
    queries: Tokens,
    keys: Tokens,
    windows: Windows | None,
    device: torch.device,
    each: Sequence[tuple[int, int]] | None = None,
) -> Places | None:
    """Rows and columns [P, M, 2] and [P, N, 2] of queries and keys, in the queries' grid; None unless they are patches.

    The grid of keys may be coarser, as with spatial reduction: the places are then the centres of its cells. Frames of
    a video have the same places. In windows, P is their number, and padding has no place. Images with grids of their
    own (`each`) have P = B.
    """
    with torch.inference_mode(False):
        return _places(queries, keys, windows, device, each)


def _places(
    queries: Tokens,
    keys: Tokens,
    windows: Windows | None,
    device: torch.device,
    each: Sequence[tuple[int, int]] | None,
) -> Places | None:
    if windows is not None:
        at, columns = windows.places(device)[0], windows.grid[1]
        found = torch.stack([at // columns, at % columns], -1).float()
        found = found.masked_fill(at[..., None] == windows.tokens, torch.nan)
        return found, found
    if each is not None and queries == keys:
        found = torch.stack([grid_places(grid, 0, keys.count, device) for grid in each])
        return found, found
    if queries.layout is None or keys.layout is None:
        return None
    mine, theirs = _grid(queries.layout, device), _grid(keys.layout, device)
    if keys.grid != queries.grid:
        ratios = [a / b for a, b in zip(queries.layout.grid, keys.layout.grid, strict=True)]
        theirs = (theirs + 0.5) * torch.tensor(ratios, device=device, dtype=torch.float32) - 0.5
    return mine[None], theirs[None]


def _grid(layout: TokenLayout, device: torch.device) -> Tensor:
    frame = grid_places(layout.grid, 0, layout.grid[0] * layout.grid[1], device)
    before, after = (frame.new_full((n, 2), torch.nan) for n in (layout.prefix, layout.suffix))
    return torch.cat([before, *[frame] * layout.frames, after])


def _why(queries: Tokens, keys: Tokens) -> str:
    """The reason that tokens have no places, in words."""
    if all(tokens.kind in ("image", "tokens") for tokens in (queries, keys)):
        return (
            f"expected patches of an image; got {keys} of no known grid: if they are patches, pass "
            f"layout=attnx.TokenLayout(prefix=..., grid=(rows, columns)) of {keys.count} tokens to attnx.capture"
        )
    both = f"{queries}" if queries == keys else f"{queries} over {keys}"
    return f"expected patches of an image; got {both}"
