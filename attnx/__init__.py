"""attnx: the attention maps of any vision transformer, at the price of its attention."""

from importlib import import_module
from types import ModuleType

from attnx import demo, huggingface
from attnx.extract.captions import CaptionMaps, WordMaps
from attnx.extract.class_maps import class_maps
from attnx.extract.extractor import Extractor
from attnx.extract.word_maps import gradcam, word_maps
from attnx.jobs.reader import open
from attnx.methods import (
    branch_rollout,
    cls_map,
    entropy,
    entropy_levels,
    fuse_branches,
    gradient_rollout,
    head_importance,
    layer_maps,
    mass_mask,
    mean_attention_distance,
    pointing_game,
    relevance,
    resize,
    rollout,
    row_entropy,
    token_map,
)
from attnx.models.loaded import Loaded
from attnx.models.loading import load
from attnx.ops.attention_stats import attention_stats
from attnx.ops.functional import attention, attention_lse, attention_map, gradient_map, vecmat
from attnx.ops.row_importance import row_importance
from attnx.page.explore import explore
from attnx.page.page import Page
from attnx.trace.capture import Handle, capture, patch
from attnx.trace.layout import TokenLayout
from attnx.trace.trace import Trace
from attnx.version import VERSION

__all__ = [
    "CaptionMaps",
    "Extractor",
    "Handle",
    "Loaded",
    "Page",
    "TokenLayout",
    "Trace",
    "WordMaps",
    "attention",
    "attention_lse",
    "attention_map",
    "attention_stats",
    "branch_rollout",
    "capture",
    "class_maps",
    "cls_map",
    "entropy",
    "entropy_levels",
    "explore",
    "fuse_branches",
    "gradcam",
    "gradient_map",
    "gradient_rollout",
    "head_importance",
    "huggingface",
    "layer_maps",
    "load",
    "mass_mask",
    "mean_attention_distance",
    "open",
    "patch",
    "picture",
    "pointing_game",
    "relevance",
    "resize",
    "rollout",
    "row_entropy",
    "row_importance",
    "token_map",
    "vecmat",
    "word_maps",
]
__version__ = VERSION

demo.register()


def __getattr__(name: str) -> ModuleType:
    # Pictures need more modules than maps, so they are imported when they are first used.
    if name == "picture":
        return import_module("attnx.picture")
    raise AttributeError(f"module 'attnx' has no attribute {name!r}")
