"""The tokens that the rows and the columns of a map stand for."""

from collections.abc import Mapping

from attnx.trace.branch_layers import BranchLayer, branch_layer, branch_layout
from attnx.trace.facts import Facts
from attnx.trace.grids import Grid
from attnx.trace.layout import TokenLayout
from attnx.trace.parts import CROSS, Parts
from attnx.trace.tokens import Tokens, of_layout


def sides(
    parts: Parts, layer: str, shape: tuple[int, int, int], facts: Facts, grids: Mapping[str, Grid]
) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a layer's maps [items, M, N].

    Args:
        parts, facts: of the model and of the layer's call.
        layer: its name.
        shape: (items, M, N).
        grids: {module: grid} of the modules that ran before the layer, the newest first.
    """
    layer = layer.partition("#")[0]
    part, (items, rows, columns), width = parts.of(layer), shape, facts.width
    if facts.windows is not None:
        tokens = Tokens("windows", grid=facts.windows.grid, count=columns, part=part)
        return tokens, tokens
    if facts.channels:
        return Tokens("channels", count=rows, part=part), Tokens("channels", count=columns, part=part)
    if (branch := branch_layer(parts.modules, layer)) is not None:
        return _of_branch(parts, branch, columns, grids)
    if facts.crosses:
        return _crossing(parts, part, (rows, columns), width, grids)
    keys = parts.tokens(part, grids, columns, width)
    known = keys.grid is not None and parts.declares(part)
    # The self-attention of a decoder may have several sets of queries for each image.
    in_decoder = layer.rpartition(".")[0] in parts.decoders and not CROSS.search(layer.rpartition(".")[2])
    if keys.kind != "text" and not in_decoder and not known and parts.is_split(part, grids, items):
        return Tokens("windows", count=rows, part=part), Tokens("windows", count=columns, part=part)
    keys = keys if keys.grid else facts.placed(keys, items, parts.outside(grids))
    if rows == columns:
        if in_decoder and keys.kind != "text":
            keys = Tokens("queries", count=columns, part=part)
        return keys, keys
    if keys.kind == "text":
        return Tokens("text", count=rows, part=part), keys
    keys = keys if keys.grid else _reduced(keys, layer, grids)
    queries = parts.tokens(part, grids, rows, width)
    queries = queries if queries.grid else facts.placed(queries, items, parts.outside(grids))
    return queries if rows > 1 and queries.grid else Tokens("queries", count=rows, part=part), keys


def _reduced(keys: Tokens, layer: str, grids: Mapping[str, Grid]) -> Tokens:
    """The keys with the grid of the only convolution or pool inside the layer that gives as many; else unchanged."""
    inside = {grid.shape for name, grid in grids.items() if name.startswith(f"{layer}.") and grid.tokens == keys.count}
    return of_layout(TokenLayout(0, inside.pop()), keys.part) if len(inside) == 1 else keys


def _crossing(
    parts: Parts, part: str, size: tuple[int, int], width: int, grids: Mapping[str, Grid]
) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a layer in a part whose keys come from another source than its queries."""
    rows, columns = size
    candidates = [parts.tokens(other, grids, columns, width) for other in dict.fromkeys([*parts.kinds, part])]
    images = [tokens for tokens in candidates if tokens.grid]
    texts = [tokens for tokens in candidates if tokens.kind == "text" and tokens.part != part]
    own = [tokens for tokens in images if tokens.part == part]
    known = own or (images if len(images) == 1 else []) or texts[:1] or parts.features(grids, columns, width)
    if rows == 1:
        # The single query of a pooling layer over the tokens of the layers before it.
        keys = known[0] if known else parts.tokens(part, grids, columns, width)
        return Tokens("queries", count=1, part=part), keys
    keys = known[0] if known else Tokens("tokens", count=columns, part="elsewhere")
    queries = parts.tokens(part, grids, rows, width)
    if queries == keys or (queries.kind != "text" and not queries.grid):
        return Tokens("queries", count=rows, part=part), keys
    return queries, keys


def _of_branch(parts: Parts, layer: BranchLayer, count: int, grids: Mapping[str, Grid]) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a layer of CrossViT with `count` keys."""
    part, own = layer.part(layer.keys), Tokens("queries", count=1, part=layer.part(layer.branch))
    layout = branch_layout(parts.modules, layer, grids, count)
    keys = Tokens("image", count=count, part=part) if layout is None else of_layout(layout, part)
    return (keys if layer.fusion is None else own), (own if layer.fusion else keys)
