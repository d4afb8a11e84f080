"""attnx: the attention maps of any vision transformer, at the price of its attention."""

from attnx import huggingface
from attnx.capture import Handle, capture, patch
from attnx.classes import class_maps
from attnx.extractor import Extractor
from attnx.jobs.maps import open
from attnx.layout import TokenLayout
from attnx.methods import (
    cls_map,
    entropy,
    entropy_levels,
    gradient_rollout,
    layer_maps,
    mass_mask,
    pointing_game,
    relevance,
    rollout,
)
from attnx.ops import attention, attention_lse, attention_map, gradient_map, vecmat
from attnx.pairs import CaptionMaps, WordMaps, gradcam, word_maps
from attnx.trace import Trace

__all__ = [
    "CaptionMaps",
    "Extractor",
    "Handle",
    "TokenLayout",
    "Trace",
    "WordMaps",
    "attention",
    "attention_lse",
    "attention_map",
    "capture",
    "class_maps",
    "cls_map",
    "entropy",
    "entropy_levels",
    "gradcam",
    "gradient_map",
    "gradient_rollout",
    "huggingface",
    "layer_maps",
    "mass_mask",
    "open",
    "patch",
    "pointing_game",
    "relevance",
    "rollout",
    "vecmat",
    "word_maps",
]
__version__ = "0.1.0"
