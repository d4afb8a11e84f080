"""ALBEF's and DINO's own code, from the checkouts in ATTNX_ALBEF and ATTNX_DINO. Without them, tests are skipped."""

import importlib.util
import os
import sys
import types
from pathlib import Path

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
    path = checkout("ATTNX_DINO", "facebookresearch/dino") / "vision_transformer.py"
    utils = types.ModuleType("utils")
    utils.trunc_normal_ = torch.nn.init.trunc_normal_
    before = sys.modules.get("utils")
    sys.modules["utils"] = utils
    try:
        spec = importlib.util.spec_from_file_location("original_dino", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["utils"]
        if before is not None:
            sys.modules["utils"] = before
    return module.VisionTransformer([32], 8, embed_dim=48, depth=3, num_heads=3, qkv_bias=True).eval()
