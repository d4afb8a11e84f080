"""The original ALBEF code, loaded from a checkout, with current torch, timm and transformers.

Its files are unchanged. What newer versions of transformers removed is provided: helpers that the files import, and
settings and methods of base classes.

Reference:
    https://github.com/salesforce/ALBEF
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from attnx.models.albef import AlbefConfig


class Original(nn.Module):
    """The model of ALBEF's Grad-CAM notebook, with the projections: names as in its checkpoints."""

    def __init__(self, vit: Any, xbert: Any, config: AlbefConfig) -> None:
        super().__init__()
        c = config
        self.visual_encoder = vit.VisionTransformer(
            img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.vision_width, depth=c.vision_depth,
            num_heads=c.vision_heads, mlp_ratio=c.mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        bert = xbert.BertConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
            intermediate_size=c.mlp_ratio * c.width, max_position_embeddings=c.max_tokens, layer_norm_eps=1e-12,
        )  # fmt: skip
        # Set after construction, because newer configurations store unknown arguments elsewhere.
        vars(bert).update(_DROPPED_SETTINGS, fusion_layer=c.fusion_layer, encoder_width=c.vision_width)
        self.text_encoder = xbert.BertModel(bert, add_pooling_layer=False)
        self.vision_proj = nn.Linear(c.vision_width, c.embed_dim)
        self.text_proj = nn.Linear(c.width, c.embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(c.width, 2)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, height, width], [B, T] ids and mask -> [B, 2] logits of (no match, match)."""
        image = self.visual_encoder(images)
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        words = self.text_encoder(
            ids, attention_mask=mask.long(), encoder_hidden_states=image, encoder_attention_mask=seen, return_dict=True
        )
        return self.itm_head(words.last_hidden_state[:, 0])

    def cross_attention(self, layer: int) -> Any:
        """The module whose `save_attention`, `get_attention_map` and `get_attn_gradients` the notebook uses."""
        return self.text_encoder.encoder.layer[layer].crossattention.self


_DROPPED_SETTINGS = dict(position_embedding_type="absolute", pruned_heads={}, gradient_checkpointing=False)


def load_original(checkout: Path, config: AlbefConfig | None = None) -> Original:
    """The original's model with random weights, in eval mode.

    Raises:
        FileNotFoundError: `checkout` has no models/xbert.py.
    """
    folder = checkout / "models"
    if not (folder / "xbert.py").is_file():
        raise FileNotFoundError(f"checkout: expected one of salesforce/ALBEF; {folder / 'xbert.py'} is not there")
    vit, xbert = _module(folder / "vit.py"), _module(folder / "xbert.py")
    for name, method in _DROPPED_METHODS.items():
        setattr(xbert.BertPreTrainedModel, name, method)
    return Original(vit, xbert, config or AlbefConfig()).eval()


def _whole(forward: Callable[..., Any], size: int, dim: int, *tensors: Tensor) -> Any:
    assert size == 0
    return forward(*tensors)


def _undocumented(**options: Any) -> Callable[[Any], Any]:
    return lambda function: function


_PROVIDED = {
    "transformers.modeling_utils.apply_chunking_to_forward": _whole,
    "transformers.modeling_utils.find_pruneable_heads_and_indices": None,
    "transformers.modeling_utils.prune_linear_layer": None,
    "transformers.file_utils.add_code_sample_docstrings": _undocumented,
}
_DROPPED_METHODS: dict[str, Callable[..., Any]] = {
    "init_weights": lambda self: self.apply(self._init_weights),
    "invert_attention_mask": lambda self, mask: (1.0 - mask[:, None, None, :].float()) * torch.finfo().min,
    "get_head_mask": lambda self, head_mask, layers: [None] * layers,
}


def _module(path: Path) -> Any:
    name = f"original_albef_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with ExitStack() as stack:
        for old, new in _PROVIDED.items():
            stack.enter_context(mock.patch(old, new, create=True))
        spec.loader.exec_module(module)
    return module
