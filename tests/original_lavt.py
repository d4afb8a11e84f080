"""LAVT's own code, from the checkout in ATTNX_LAVT. Stubs replace mmcv and mmseg, which only its training needs."""

from importlib import import_module

import torch
from original_code import checkout, importing, stub


def _stubs():
    """Modules that the checkout imports: `mmseg`, its own mmcv code, and one that left timm."""
    from timm import layers

    return {
        "mmseg": stub("mmseg", __path__=[]),
        "mmseg.utils": stub("mmseg.utils", get_root_logger=None),
        "timm.models.layers": layers,
        "lib.mmcv_custom": stub("lib.mmcv_custom", load_checkpoint=None),
    }


def original_lavt(config):
    """The original's model and its text encoder, both with random weights and in eval mode."""
    with importing(checkout("ATTNX_LAVT", "yz93/LAVT-RIS"), "lib", "bert", **_stubs()):
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
