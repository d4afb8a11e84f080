"""Adapters that make unfused blocks call SDPA, independent of maps, kernels and devices.

Each adapter returns a list of functions that undo its changes; `route_to_sdpa` applies all adapters. The outermost
capture restores the blocks. No adapter changes what a model computes: a block whose arithmetic differs from SDPA's is
left as it is, and `unfused_blocks` returns the reason.
"""

from collections.abc import Callable

from torch import nn

from attnx.trace.adapters import albef, bert_like, blip, crossvit, dino, huggingface, lavt, mvit, plain, swin, timm
from attnx.trace.adapters.known import Known, bind_known
from attnx.trace.structure import Structure, structure_of

Undo = Callable[[], None]

_BLOCKS: dict[str, list[Known]] = {}  # by the name of the class
for _adapter in (albef, bert_like, blip, crossvit, dino, lavt, mvit, plain, swin):
    for _known in _adapter.BLOCKS:
        _BLOCKS.setdefault(_known.name, []).append(_known)


def route_to_sdpa(model: nn.Module, structure: Structure | None = None) -> list[Undo]:
    """Make the model's unfused blocks call SDPA; returns functions that undo it, to be called in any order.

    structure: of the model, if it is known already.
    """
    if structure is None:
        structure = structure_of(model)
    known = [module for _, module in structure.where(_is_known)]
    return [*timm.use_sdpa(structure), *huggingface.use_sdpa(structure), *bind_known(known, _BLOCKS)]


def _is_known(module: nn.Module) -> bool:
    return type(module).__name__ in _BLOCKS


def unfused_blocks(model: nn.Module) -> dict[str, str]:
    """{module name: reason} of the parts of a model that do not call SDPA."""
    return huggingface.not_switched(model)
