"""Methods: rollout, relevance, CLS maps, layer-wise maps, probes, masks, entropy. Pure functions of traces or maps."""

from attnx.methods.branches import branch_rollout, fuse_branches
from attnx.methods.maps import LayerMaps, cls_map, layer_maps
from attnx.methods.metrics import entropy, entropy_levels, mass_mask, pointing_game
from attnx.methods.probes import head_importance, mean_attention_distance, row_entropy
from attnx.methods.relevance import relevance
from attnx.methods.resize import resize
from attnx.methods.rollout import gradient_rollout, rollout
from attnx.methods.token_map import token_map

__all__ = [
    "LayerMaps",
    "branch_rollout",
    "cls_map",
    "entropy",
    "entropy_levels",
    "fuse_branches",
    "gradient_rollout",
    "head_importance",
    "layer_maps",
    "mass_mask",
    "mean_attention_distance",
    "pointing_game",
    "relevance",
    "resize",
    "rollout",
    "row_entropy",
    "token_map",
]
