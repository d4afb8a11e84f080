"""Selection of layers by name, by glob, or by depth."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch.nn.functional as F
from torch import fx, nn

from attnx.trace.structure import Structure, structure_of

_ATTENTION = ("GPSA", "MHSA")  # names of classes that attend, beside those that say so

Layers = str | int | Sequence[str | int] | None


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the self-attention blocks in order of depth; depth indices refer to this list.

    Blocks are recognised by their class name or by timm's `fused_attn` flag. Only the innermost such modules count, and
    pooling heads are excluded.
    """
    return list(structure_of(model).derived(attending_names))


def attending_names(structure: Structure) -> tuple[str, ...]:
    """`attention_layers` of a structure."""
    named = dict(structure.named_modules())
    pools = [name for name, module in named.items() if "pool" in type(module).__name__.lower()]
    found = [
        name
        for name, module in named.items()
        if is_attention(module) and not any(name == pool or name.startswith(pool + ".") for pool in pools)
    ]
    return tuple(name for name in found if not any(other.startswith(name + ".") for other in found))


def is_attention(module: nn.Module) -> bool:
    """True if the class name, or timm's flag, says that the module attends; see `attention_layers`."""
    name = type(module).__name__
    # vars() instead of hasattr: a failed lookup by nn.Module.__getattr__ takes microseconds.
    named = "attention" in name.lower() or name.endswith("Attn") or name in _ATTENTION
    # The projection after an attention is called so, too: LxmertAttentionOutput.
    return (named and not name.endswith("Output")) or "fused_attn" in vars(module)


def names_in_graph(graph: fx.GraphModule) -> tuple[str, ...]:
    """Name of the attention module of each SDPA call in a traced graph; "" if unknown.

    torch.fx inlines the code of a block and keeps the modules inside it. A call is assigned to the innermost module
    around those that produce its queries and keys.
    """
    calls = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention
    ]
    return tuple(_around(*map(_origin, node.all_input_nodes[:2])) for node in calls)


def _origin(node: fx.Node) -> list[str]:
    """Path of the module or parameter that a node's first operand comes from."""
    while node.op not in ("call_module", "get_attr") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target).split(".")[:-1] if node.op in ("call_module", "get_attr") else []


def _around(a: list[str], b: list[str]) -> str:
    """Name of the innermost module around both paths."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return ".".join(a[: same.index(False) if False in same else len(same)])


def matches(pattern: str, name: str) -> bool:
    """True if a pattern selects a layer: by its name, a glob, or the name of a block around it."""
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def resolve(model: nn.Module, layers: Layers) -> list[str] | None:
    """The list of patterns in `layers`, with depth indices resolved to names; None for None.

    Raises:
        ValueError: `layers` is empty, or a pattern or index matches no module.
    """
    if layers is None:
        return None
    requested = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    names = structure_of(model).names
    depth = attention_layers(model)
    known = ", ".join(depth) or "none recognised by its class name; pass module names or globs"
    patterns: list[str] = []
    for layer in requested:
        if isinstance(layer, bool) or not isinstance(layer, (str, int)):
            raise ValueError(f"layers: expected names, globs or depth indices; got {layer!r}")
        if isinstance(layer, int):
            if not -len(depth) <= layer < len(depth):
                raise ValueError(
                    f"layers: expected an index into {len(depth)} attention layers; got {layer}; they are: {known}"
                )
            patterns.append(depth[layer])
        elif any(matches(layer, name) for name in names):
            patterns.append(layer)
        else:
            raise ValueError(f"layers: {layer!r} matches no module; attention layers: {known}")
    if not patterns:
        raise ValueError("layers: expected at least one layer; got none (None selects all)")
    return patterns


def select(names: Sequence[str], layers: Layers) -> list[str]:
    """The names of a trace's layers that `layers` selects, in the order of the trace; see `Trace.select`.

    Raises:
        ValueError: a name or index matches no layer of the trace.
    """
    requested = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    chosen: set[str] = set()
    for layer in requested:
        if isinstance(layer, int) and not isinstance(layer, bool):
            matched = [names[layer]] if -len(names) <= layer < len(names) else []
        else:
            matched = [name for name in names if selects(layer, name)] if isinstance(layer, str) else []
        if not matched:
            raise ValueError(f"layers: {layer!r} matches no layer of the trace; expected some of {', '.join(names)}")
        chosen |= set(matched)
    if not chosen:
        raise ValueError("layers: expected at least one layer of the trace; got none")
    return [name for name in names if name in chosen]


def selects(pattern: str, layer: str) -> bool:
    """True if a name, glob or block name selects a layer of a trace, with or without its call number."""
    return matches(pattern, layer) or matches(pattern, layer.partition("#")[0])


def check_model(model: object) -> None:
    """Raise ValueError unless the model is a torch module."""
    if not isinstance(model, nn.Module):
        inner = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ValueError(f"model: expected a torch.nn.Module; got {type(model).__name__}{inner}")
