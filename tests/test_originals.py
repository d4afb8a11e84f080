"""Compare with the references' own code on the same weights, if checkouts of it are available.

    ATTNX_ALBEF=ALBEF ATTNX_MM=Transformer-MM-Explainability ATTNX_TE=Transformer-Explainability \\
        pytest tests/test_originals.py

The arithmetic of each is also written out in `test_pairs.py` and `test_relevance.py`, which need no checkout.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from small_albef import CAPTIONS, CONFIG, small_albef, small_images

import attnx

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 1e-5  # of the largest entry


def checkout(variable, of):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"needs a checkout of {of}, named by {variable}")
    return Path(path)


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < CLOSE


@pytest.mark.parametrize("layer", [2, 3])
def test_albefs_save_attention_and_gradcam(layer, monkeypatch):
    folder = checkout("ATTNX_ALBEF", "salesforce/ALBEF")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.peers.original import load_original

    model, original = small_albef(), load_original(folder, CONFIG)
    original.load_state_dict(model.state_dict(), strict=False)
    read = [model.tokenizer(caption) for caption in CAPTIONS]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(caption.ids) for caption in read], batch_first=True)
    mask, images = ids != 0, small_images(3)
    cross = original.cross_attention(layer)
    cross.save_attention = True
    logits = original(images, ids, mask)
    logits[:, 1].sum().backward()
    p, dp = cross.get_attention_map().detach(), cross.get_attn_gradients()
    assert_close(model(images, ids, mask).detach(), logits.detach())
    words, cams = (method(model, images, CAPTIONS, layer) for method in (attnx.word_maps, attnx.gradcam))
    for i, caption in enumerate(read):
        own = (i, slice(None), slice(len(caption.ids)), slice(1, None))
        assert_close(words[i].maps.flatten(1), p[own].mean(0))
        assert_close(cams[i].maps.flatten(1), (p[own] * dp[own].clamp(0)).mean(0))


def test_chefers_vit():
    folder = checkout("ATTNX_TE", "hila-chefer/Transformer-Explainability")
    pytest.importorskip("einops")
    sys.path.insert(0, str(folder))
    try:
        from baselines.ViT.ViT_new import VisionTransformer
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    theirs = VisionTransformer(img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=7, qkv_bias=True).eval()
    ours = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    for norm in (module for module in ours.eval().modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.eps = 1e-5  # theirs
    images = torch.randn(2, 3, 64, 64)
    maps = attnx.class_maps(ours, images, [2, 5])
    for i in range(2):
        for k, target in enumerate((2, 5)):
            theirs(images[i : i + 1], register_hook=True)[0, target].backward()
            R = torch.eye(17)
            for block in theirs.blocks:
                p, dp = block.attn.get_attention_map(), block.attn.get_attn_gradients()
                R = R + (dp * p).clamp(min=0).mean((0, 1)) @ R
            assert_close(maps[i, k].flatten(), R[0, 1:].detach())


def theirs_and_huggingfaces_clip(folder):
    """A small model of their copy of CLIP, and Hugging Face's CLIP with the same weights."""
    package = types.ModuleType("their_clip")
    package.__path__ = [str(folder / "CLIP" / "clip")]
    sys.modules["their_clip"] = package
    spec = importlib.util.find_spec("their_clip.model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, image_resolution=64, vision_layers=3, vision_width=128, vision_patch_size=16)
    text = dict(context_length=20, vocab_size=300, transformer_width=128, transformer_heads=2, transformer_layers=3)
    theirs = module.CLIP(**sizes, **text).float().eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return theirs, huggingfaces_clip(theirs.state_dict())


def huggingfaces_clip(weights):
    import transformers

    both = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2)
    text = dict(both, vocab_size=300, max_position_embeddings=20, eos_token_id=2, bos_token_id=1)
    vision = dict(both, image_size=64, patch_size=16)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.": "vision_model.pre_layrnorm.", "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "token_embedding.": "text_model.embeddings.token_embedding.", "ln_final.": "text_model.final_layer_norm.",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "transformer.resblocks.": "text_model.encoder.layers.", "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight", ".attn.out_proj.": ".self_attn.out_proj.",
        ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
    }  # fmt: skip
    found = {}
    for key, value in weights.items():
        name = next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key)
        for old, new in names.items():
            name = name.replace(old, new) if old.startswith(".") else name
        if ".attn.in_proj_" in name:
            for part, letter in zip(value.chunk(3), "qkv", strict=True):
                found[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
        else:
            found[name] = value.T if key in ("visual.proj", "text_projection") else value
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(found)
    return model


@pytest.mark.parametrize("start", [0, -1])
def test_chefers_clip(start):
    theirs, ours = theirs_and_huggingfaces_clip(checkout("ATTNX_MM", "hila-chefer/Transformer-MM-Explainability"))
    images, texts = torch.randn(3, 3, 64, 64), torch.randint(3, 290, (3, 20))
    texts[:, 10], texts[:, 11:] = 299, 0  # the end of a text is its largest number
    score = theirs(images, texts)[0].diagonal().sum()

    def relevance(blocks):
        blocks = list(blocks)
        n = blocks[0].attn_probs.shape[-1]
        R = torch.eye(n).expand(3, n, n)
        for block in blocks[start:]:
            (dp,) = torch.autograd.grad(score, [block.attn_probs], retain_graph=True)
            weighted = (dp * block.attn_probs).detach().view(3, -1, n, n)
            R = R + weighted.clamp(min=0).mean(1) @ R
        return R

    text = attnx.TokenLayout(1, (1, 19))
    with (
        attnx.capture(ours.vision_model, grad=True) as seen,
        attnx.capture(ours.text_model, grad=True, layout=text) as read,
    ):
        logits = ours(pixel_values=images, input_ids=texts).logits_per_image
        logits.diagonal().sum().backward()
    assert_close(logits.diagonal().sum().detach()[None], score.detach()[None])
    assert_close(attnx.relevance(seen, start).flatten(1), relevance(theirs.visual.transformer.resblocks)[:, 0, 1:])
    assert_close(attnx.relevance(read, start, query="all"), relevance(theirs.transformer.resblocks))
