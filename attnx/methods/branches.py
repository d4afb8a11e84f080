"""Rollout of CrossViT: a chain of vector products over the tokens of both branches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from attnx.methods.maps import fusion, inverse
from attnx.ops.reducers import Reduction
from attnx.trace.branch_layers import BranchLayer, match_name
from attnx.trace.layers import Layers
from attnx.trace.layout import TokenLayout
from attnx.trace.records import LayerRecord, no_autocast
from attnx.trace.trace import Trace

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class MultiScaleBlock:
    """The records of a multi-scale block.

    Attributes:
        attention: for each branch, its self-attention layers in order: maps [B, N_b, N_b].
        fusion: for each branch, the attention of its class token to itself and the other branch's patches.
    """

    attention: tuple[tuple[LayerRecord, ...], tuple[LayerRecord, ...]]
    fusion: tuple[LayerRecord, LayerRecord]


@dataclass(frozen=True)
class Branches:
    """The multi-scale blocks of a CrossViT's trace in order, and the token layouts of its two branches."""

    blocks: tuple[MultiScaleBlock, ...]
    layouts: tuple[TokenLayout, TokenLayout]


def branches_of(trace: Trace) -> Branches | None:
    """The blocks and branches of a trace of CrossViT; None if no layer is one of a CrossViT.

    Args:
        trace: a capture of all rows (rows=None), with any `keep`.

    Raises:
        ValueError: the trace holds other layers too, or lacks some of a multi-scale block or a block between others; a
            layer ran more than once; only some rows were captured, or with `layout`; or a grid is unknown.
        NotImplementedError: the model has three branches or more.
    """
    if not any(match_name(name.partition("#")[0]) for name in trace):
        return None
    places = {name: trace.tokens.branch(name) for name in trace}
    found = {name: place for name, place in places.items() if place is not None}
    if not found:
        return None
    if trace.rows is not None:
        raise ValueError(f"rows: expected a capture of whole maps, with rows=None; got rows={list(trace.rows)}")
    if trace.tokens.given is not None:
        raise ValueError("layout: expected None for CrossViT, whose branches have a layout each; capture without it")
    first = next(iter(found.values()))
    if first.branches != 2:
        raise NotImplementedError(f"rollout of CrossViT: expected 2 branches; got {first.branches}")
    _check_order(trace, trace.tokens.attending, first, [place.block for place in found.values()])
    layouts = [next(name for name, place in found.items() if (place.branch, place.fusion) == (b, None)) for b in (0, 1)]
    blocks = [_block(trace, dict(group)) for _, group in groupby(found.items(), lambda item: item[1].block)]
    return Branches(tuple(blocks), (trace.layout_of(layouts[0]), trace.layout_of(layouts[1])))


def _check_order(trace: Trace, attending: Sequence[str], first: BranchLayer, blocks: Sequence[int]) -> None:
    """Raise ValueError unless the trace holds exactly the layers of all blocks from the least to the greatest."""
    wanted = [f"{first.root}blocks.{i}." for i in range(min(blocks), max(blocks) + 1)]
    expected = [name for name in attending if name.startswith(tuple(wanted))]
    if list(trace) == expected:
        return
    missing = [name for name in expected if name not in trace]
    others = [name for name in trace if name not in expected]
    problem = (
        f"{', '.join(missing)} missing" if missing else f"unexpected or out of order: {', '.join(others or trace)}"
    )
    raise ValueError(
        f"rollout of CrossViT: expected every attention layer of its multi-scale blocks once, and no other; {problem}; "
        f"choose whole blocks, such as layers='{first.root}blocks.*'"
    )


def _block(trace: Trace, places: dict[str, BranchLayer]) -> MultiScaleBlock:
    def records(branch: int, fusion: int | None) -> tuple[LayerRecord, ...]:
        return tuple(trace.kept(n) for n, place in places.items() if (place.branch, place.fusion) == (branch, fusion))

    # Later blocks of a fusion see only the class token: they change no share.
    return MultiScaleBlock((records(0, None), records(1, None)), (records(0, 0)[0], records(1, 0)[0]))


def branch_rollout(
    trace: Trace, residual: float = 0.5, *, heads: str | None = None, layers: Layers = None
) -> tuple[Tensor, Tensor]:
    """Attention rollout of CrossViT: the share of each patch of each branch in the mean of both class tokens.

    The state has the tokens of both branches. Self-attention of branch b multiplies its own tokens by
    ``(1 - residual) F + residual I``. The fusion of branch b, with the row a over the keys [class token b, patches of
    the other branch], makes class token b ``residual + (1 - residual) a_0`` of itself and ``(1 - residual) a_j`` of
    patch j of the other branch; both class tokens are updated at once. Rows are normalised. The chain of vector
    products starts with one half on each class token, since the logits are the mean of both heads'.

    Args:
        trace: a capture of all rows (rows=None), with any `keep`. With keep="qk" memory is linear in the number of
            tokens, unless `heads` is "max" or "min".
        residual: weight of the identity.
        heads: how to fuse the heads of a capture with heads="each" (default "mean"); for other captures it must be the
            capture's own value.
        layers: the layers of the trace to use, as in `Trace.select`: whole multi-scale blocks; None: all.

    Returns:
        Two maps [B, h_b, w_b] float32, of branches 0 and 1. The sum of both is 1 less the shares of both class tokens.

    Raises:
        ValueError: the trace is not one of CrossViT, or an argument is out of range; and as in `branches_of`.
        NotImplementedError: the model has three branches or more.

    Reference:
        Chen et al., "CrossViT", https://arxiv.org/abs/2103.14899; Abnar & Zuidema, "Quantifying Attention Flow in
        Transformers", https://arxiv.org/abs/2005.00928

    Example:
        >>> import torch, attnx
        >>> from timm.models.crossvit import CrossVit
        >>> model = CrossVit(
        ...     img_size=48, patch_size=(8, 16), embed_dim=(16, 24), num_heads=(2, 3), depth=((1, 2, 0),),
        ...     mlp_ratio=(2.0, 2.0, 1.0),
        ... ).eval()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 48, 48))
        >>> maps = attnx.branch_rollout(trace)
        >>> [list(amap.shape) for amap in maps], list(attnx.fuse_branches(maps).shape)
        ([[2, 6, 6], [2, 3, 3]], [2, 6, 6])
    """
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual: expected a number in [0, 1]; got {residual}")
    if heads == "each":
        raise ValueError("heads: expected mean, max or min; got 'each': rollout fuses the heads of every layer")
    kind = fusion(trace, heads)
    chosen = trace if layers is None else trace.select(layers)
    branches = branches_of(chosen)
    if branches is None:
        raise ValueError(f"branch_rollout: expected the layers of a CrossViT; got {', '.join(chosen) or 'none'}")
    state = _start(branches)
    for block in reversed(branches.blocks):
        state = _through_fusion(block, state, residual, kind)
        state = (
            _through_attention(block.attention[0], state[0], residual, kind),
            _through_attention(block.attention[1], state[1], residual, kind),
        )
    return branches.layouts[0].patches(state[0][:, 0]), branches.layouts[1].patches(state[1][:, 0])


def _start(branches: Branches) -> State:
    """One half on each class token: [B, 1, N_0] and [B, 1, N_1]."""
    record = branches.blocks[0].fusion[0]
    first, second = (
        torch.zeros(record.shape[0], 1, layout.tokens, device=record.device) for layout in branches.layouts
    )
    first[..., 0] = second[..., 0] = 0.5
    return first, second


def _through_fusion(block: MultiScaleBlock, state: State, residual: float, kind: Reduction) -> State:
    """The state [B, 1, N_0], [B, 1, N_1] before the fusion of a block, from that after it."""
    result = state[0].clone(), state[1].clone()
    for branch, record in enumerate(block.fusion):
        # [B, 1, 1 + patches of the other branch]: key 0 is the class token itself.
        row = (1 - residual) * record.fused(kind).row(0)[:, None]
        row[..., 0] += residual
        passed = state[branch][..., :1] * row * inverse(row.sum(-1, keepdim=True))
        result[branch][..., 0] += passed[..., 0] - state[branch][..., 0]
        result[1 - branch][..., 1:] += passed[..., 1:]
    return result


def _through_attention(records: Sequence[LayerRecord], r: Tensor, residual: float, kind: Reduction) -> Tensor:
    """The vectors [B, 1, N] before a branch's self-attention layers, from those after them."""
    for record in reversed(records):
        layer = record.fused(kind)
        if not layer.rows_sum_to_one:
            r = r * inverse((1 - residual) * layer.row_sums() + residual)[:, None]
        r = (1 - residual) * layer.vecmat(r) + residual * r
    return r


def fuse_branches(maps: Sequence[Tensor], grid: tuple[int, int] | None = None) -> Tensor:
    """One map of an image from the maps of several branches over it.

    The mass of each patch is spread evenly over its area. A cell of the new grid sums what lies in it, so that the sum
    over cells is the sum of all maps.

    Args:
        maps: [B, h_b, w_b] of each branch. Each must cover the whole image, as CrossViT's do unless it crops
            (crop_scale=True in timm).
        grid: (rows, columns) of the result; None: the most rows and the most columns of the maps.

    Returns:
        [B, h, w] float32.

    Raises:
        ValueError: no maps, maps that are not [B, h, w] of one batch size and device, or an empty grid.

    Example:
        >>> import torch, attnx
        >>> attnx.fuse_branches([torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]])])
        tensor([[[2.5000, 3.5000]]])
    """
    shapes = [tuple(amap.shape) for amap in maps]
    if {len(shape) for shape in shapes} != {3} or len({(len(amap), amap.device) for amap in maps}) != 1:
        raise ValueError(f"maps: expected [B, h, w] of one batch size and device; got {shapes or 'none'}")
    h, w = grid or (max(shape[1] for shape in shapes), max(shape[2] for shape in shapes))
    if min(h, w) < 1:
        raise ValueError(f"grid: expected at least one row and one column; got {(h, w)}")
    with no_autocast(maps[0]):
        parts = [
            _overlap(h, amap.shape[1], amap.device) @ amap.float() @ _overlap(w, amap.shape[2], amap.device).T
            for amap in maps
        ]
    return torch.stack(parts).sum(0)


def _overlap(cells: int, patches: int, device: torch.device) -> Tensor:
    """The share of each patch along an axis that lies in each cell: [cells, patches]; columns sum to 1."""
    # The axis has cells * patches units: a cell is `patches` units long, a patch `cells` units.
    cell = torch.arange(cells, device=device)[:, None] * patches
    patch = torch.arange(patches, device=device) * cells
    shared = torch.minimum(cell + patches, patch + cells) - torch.maximum(cell, patch)
    return shared.clamp(min=0).float() / cells
