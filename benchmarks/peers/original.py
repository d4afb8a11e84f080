"""The original ALBEF code, loaded from a checkout, with current torch, timm and transformers.

Its files are unchanged. Names that newer versions moved or removed are provided while the files load: three helpers for
pruning and chunking, and methods of a base class.

Reference:
    https://github.com/salesforce/ALBEF
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
        for name, value in dict(fusion_layer=c.fusion_layer, encoder_width=c.vision_width).items():
            setattr(bert, name, value)
        for name, value in _DROPPED_SETTINGS.items():
            if not hasattr(bert, name):
                setattr(bert, name, value)
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


_DROPPED_SETTINGS = dict(
    position_embedding_type="absolute", add_cross_attention=False, is_decoder=False, chunk_size_feed_forward=0,
    output_attentions=False, output_hidden_states=False, use_return_dict=True, use_cache=False, pruned_heads={},
    gradient_checkpointing=False,
)  # fmt: skip


def load_original(checkout: Path, config: AlbefConfig | None = None) -> Original:
    """The original's model with random weights, in eval mode.

    Raises:
        FileNotFoundError: `checkout` has no models/xbert.py.
    """
    folder = checkout / "models"
    if not (folder / "xbert.py").is_file():
        raise FileNotFoundError(f"checkout: expected one of salesforce/ALBEF; {folder / 'xbert.py'} is not there")
    with _old_names():
        vit, xbert = (_module(folder / f"{name}.py") for name in ("vit", "xbert"))
    base = xbert.BertPreTrainedModel
    for name, method in _DROPPED_METHODS.items():
        setattr(base, name, method)
    return Original(vit, xbert, config or AlbefConfig()).eval()


def _init_weights(self: Any) -> None:
    self.apply(self._init_weights)


def _inverted(self: Any, mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min


def _no_head_mask(self: Any, head_mask: None, layers: int) -> list[None]:
    assert head_mask is None
    return [None] * layers


_DROPPED_METHODS: dict[str, Callable[..., Any]] = {
    "init_weights": _init_weights,
    "invert_attention_mask": _inverted,
    "get_head_mask": _no_head_mask,
}


def _whole(forward: Callable[..., Any], size: int, dim: int, *tensors: Tensor) -> Any:
    assert size == 0
    return forward(*tensors)


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("pruning")


def _decorator(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda function: function


@contextmanager
def _old_names() -> Iterator[None]:
    """Provide the modules and names that the old code imports."""
    import timm.layers
    import timm.models.vision_transformer as vision
    import transformers.modeling_utils as utils
    from transformers.utils import ModelOutput

    docs = ("add_code_sample_docstrings", "add_start_docstrings", "add_start_docstrings_to_model_forward")
    modules = {
        "transformers.file_utils": {
            "ModelOutput": ModelOutput, "replace_return_docstrings": _decorator, **dict.fromkeys(docs, _decorator),
        },
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models.layers": {"trunc_normal_": timm.layers.trunc_normal_, "DropPath": timm.layers.DropPath},
    }  # fmt: skip
    names = {
        "apply_chunking_to_forward": _whole,
        "find_pruneable_heads_and_indices": _unused,
        "prune_linear_layer": _unused,
    }
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    for name, content in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        with ExitStack() as stack:
            for module, added in ((utils, names), (vision, {"_cfg": dict})):
                for name in added.keys() - vars(module).keys():
                    stack.enter_context(mock.patch.object(module, name, added[name], create=True))
            yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def _module(path: Path) -> Any:
    name = f"original_albef_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
