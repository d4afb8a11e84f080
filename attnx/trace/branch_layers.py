"""The layers of CrossViT, which has two branches: tokens of one image cut into patches of two sizes.

Reference:
    Chen et al., "CrossViT", https://arxiv.org/abs/2103.14899; https://github.com/IBM/CrossViT
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from attnx.trace.grids import Grid
from attnx.trace.layout import TokenLayout, declared_tokens

_LAYER = re.compile(r"(|.*\.)blocks\.(\d+)\.(?:blocks\.(\d+)\.\d+|fusion\.(\d+)(?:\.(\d+))?)\.attn")


@dataclass(frozen=True)
class BranchLayer:
    """An attention layer of a multi-scale block.

    Attributes:
        root: name of the CrossViT, with a dot at its end; "" if it is the whole model.
        block: index of the multi-scale block.
        branches: number of branches.
        branch: the branch of the queries.
        fusion: None for self-attention, else the index of the block within the branch's fusion. The query of a fusion
            is the branch's class token. The keys of block 0 are that token, projected, and the next branch's patches;
            later blocks have that token as their only key.
    """

    root: str
    block: int
    branches: int
    branch: int
    fusion: int | None

    @property
    def keys(self) -> int:
        """The branch whose patches are keys."""
        return self.branch if self.fusion is None else (self.branch + 1) % self.branches

    def part(self, branch: int) -> str:
        """Name of the module that makes the patches of a branch."""
        return f"{self.root}patch_embed.{branch}"


def branch_layer(modules: Mapping[str, nn.Module], layer: str) -> BranchLayer | None:
    """The place of a layer in a CrossViT; None for a layer of another model.

    Args:
        modules: all modules of the model by name.
        layer: name of the layer, without the number of its call.
    """
    found = match_name(layer)
    if found is None:
        return None
    root, block, own, fused, depth = found.groups()
    module = modules.get(f"{root}blocks.{block}")
    branches = getattr(module, "num_branches", None)
    if type(module).__name__ != "MultiScaleBlock" or not isinstance(branches, int):
        return None
    return BranchLayer(root, int(block), branches, int(own or fused), None if own else int(depth or 0))


@lru_cache(4096)
def match_name(layer: str) -> re.Match[str] | None:
    """The parts of a name that layers of CrossViT have; None for another name. Other models may have such names, too.

    Args:
        layer: name of the layer, without the number of its call.
    """
    return _LAYER.fullmatch(layer)


def branch_layout(
    modules: Mapping[str, nn.Module], layer: BranchLayer, grids: Mapping[str, Grid], count: int
) -> TokenLayout | None:
    """Layout of the `count` keys of a layer, from the last grid in its branch's patch embedding; None if unknown.

    Args:
        modules: all modules of the model by name.
        layer: the layer.
        grids: {module: grid} of the modules that ran before the layer, the newest first.
        count: number of keys.
    """
    part = layer.part(layer.keys) + "."
    grid = next((grid for name, grid in grids.items() if name.startswith(part)), None)
    declared = declared_tokens(modules[layer.root.rstrip(".")])
    fitting = set() if grid is None or declared is None else declared.layouts([grid], count)
    return fitting.pop() if fitting else None
