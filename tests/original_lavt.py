"""LAVT's own code, from the checkout in ATTNX_LAVT. Stubs replace mmcv and mmseg, which only its training needs."""

import sys
import types
from contextlib import contextmanager
from importlib import import_module

import torch
from original_code import checkout

_OWN = ("lib", "bert")


@contextmanager
def _stubs(folder):
    """Names that the checkout imports: `mmseg`, its own mmcv code, and a module that left timm."""

    def module(name, **members):
        made = types.ModuleType(name)
        made.__dict__.update(members)
        return made

    from timm import layers

    stubs = {
        "mmseg": module("mmseg", __path__=[]),
        "mmseg.utils": module("mmseg.utils", get_root_logger=None),
        "timm.models.layers": layers,
        "lib.mmcv_custom": module("lib.mmcv_custom", load_checkpoint=None),
    }
    before = dict(sys.modules)
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in _OWN or name in stubs]:
            del sys.modules[name]
            if name in before:
                sys.modules[name] = before[name]


def original_lavt(config):
    """The original's model and its text encoder, both with random weights and in eval mode."""
    with _stubs(checkout("ATTNX_LAVT", "yz93/LAVT-RIS")):
        backbone, parts = import_module("lib.backbone"), import_module("lib._utils")
        decoder = import_module("lib.mask_predictor").SimpleDecoding
        bert, options = import_module("bert.modeling_bert"), import_module("bert.configuration_bert")
    swin = backbone.MultiModalSwinTransformer(
        embed_dim=config.embed_dim, depths=list(config.depths), num_heads=list(config.heads),
        window_size=config.window, num_heads_fusion=list(config.fusion_heads), drop_path_rate=0.3,
    )  # fmt: skip
    text = bert.BertModel(
        options.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            num_hidden_layers=config.text_depth,
            num_attention_heads=config.text_heads,
            intermediate_size=4 * config.text_width,
            max_position_embeddings=config.max_positions,
        )
    )
    text.pooler = None
    model = parts.LAVT(swin, decoder(8 * config.embed_dim))
    # The backbone's train() returns None, so eval() can't be chained.
    model.eval()
    text.eval()
    return model, text


def run_original(model, text, images, ids, mask):
    with torch.no_grad():
        words = text(ids, attention_mask=mask.long())[0].permute(0, 2, 1)
        return model(images, words, l_mask=mask.long().unsqueeze(-1))
