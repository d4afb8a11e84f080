"""ALBEF's and DINO's own code, from the checkouts in ATTNX_ALBEF and ATTNX_DINO. Without them, tests are skipped."""

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from attnx.models.albef import AlbefConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = AlbefConfig(
    image_size=(48, 48), patch_size=16, vision_width=48, vision_depth=2, vision_heads=3, width=48, depth=10, heads=3,
    vocab_size=60, max_tokens=24, embed_dim=16,
)  # fmt: skip


def checkout(variable: str, of: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"needs a checkout of {of}, named by {variable}")
    return Path(path)


def original_albef(config: AlbefConfig = CONFIG) -> torch.nn.Module:
    """The model of ALBEF's Grad-CAM notebook, with random weights: (images, ids, mask) -> ITM logits."""
    folder = checkout("ATTNX_ALBEF", "salesforce/ALBEF")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.peers.original import load_original
    finally:
        sys.path.remove(str(ROOT))
    return load_original(folder, config)


def original_dino() -> torch.nn.Module:
    """DINO's small vision transformer with random weights. A stub replaces its training module `utils`."""
    folder = checkout("ATTNX_DINO", "facebookresearch/dino")
    with importing(folder, "vision_transformer", utils=stub("utils", trunc_normal_=torch.nn.init.trunc_normal_)):
        code = import_module("vision_transformer")
    return code.VisionTransformer([32], 8, embed_dim=48, depth=3, num_heads=3, qkv_bias=True).eval()


def stub(name: str, **members: Any) -> types.ModuleType:
    """A module with the given members."""
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


@contextmanager
def importing(folder: Path, *own: str, **stubs: types.ModuleType) -> Iterator[None]:
    """A context in which the top-level packages `own` are those of a checkout, and stubs stand in for other modules.

    After it, `sys.modules` has neither.
    """
    before = dict(sys.modules)
    for name in list(sys.modules):
        if name.partition(".")[0] in own:
            del sys.modules[name]
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in own or name in stubs]:
            del sys.modules[name]
            if name in before:
                sys.modules[name] = before[name]
