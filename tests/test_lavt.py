"""LAVT: the model, its checkpoints and its word maps, against the original code and a dense float64 softmax.

ATTNX_LAVT=LAVT-RIS pytest tests/test_lavt.py
"""

import argparse
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from original_lavt import original_lavt, run_original
from small_albef import VOCAB
from test_capture import assert_same_state, state

import attnx
from attnx.extract.lavt_maps import lavt_word_maps, mean_of_stages, pad_captions, sum_pieces
from attnx.models.lavt import Lavt, LavtConfig
from attnx.models.lavt_checkpoint import load_lavt
from attnx.models.tokenizer import Tokenizer
from attnx.trace.adapters import route_to_sdpa

CONFIG = LavtConfig(
    embed_dim=24, depths=(1, 1, 2, 1), heads=(1, 2, 3, 4), window=4, text_depth=1, vocab_size=len(VOCAB),
    max_positions=24,
)  # fmt: skip
LAYERS = [f"layers.{s}.fusion.image_lang_att" for s in range(4)]
GRIDS = [(16, 15), (8, 8), (4, 4), (2, 2)]
CAPTIONS = ["the man skateboarding on a red circle", "a dog"]


def small_lavt(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = Lavt(config, Tokenizer(VOCAB, 20, plain=True)).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if hasattr(module, "relative_position_bias_table"):
            module.relative_position_bias_table.normal_()
    # Sharper weights, so that words differ.
    for stage in model.backbone.layers:
        stage.fusion.image_lang_att.f_key[0].weight.mul_(6)
    return model


def inputs(model, size=(64, 60)):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return images, *pad_captions(model, CAPTIONS)


def split(model):
    """The state dicts of `model` and `bert_model` in a checkpoint of --model lavt."""
    weights = model.state_dict()
    text = {k.removeprefix("text_encoder."): v for k, v in weights.items() if k.startswith("text_encoder.")}
    return {k: v for k, v in weights.items() if not k.startswith("text_encoder.")}, text


def save(path, model, /, *, one=False, **changes):
    """Save what the original's train.py saves; `one` with --model lavt_one."""
    rest, text = split(model)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], amsgrad=True)
    parameter.grad = torch.ones(2)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9)
    mha = "-".join(map(str, model.config.fusion_heads))
    content = {
        "model": model.state_dict() if one else rest, "bert_model": text, "optimizer": optimizer.state_dict(),
        "epoch": 3, "args": argparse.Namespace(mha=mha, swin_type="base", lr=5e-5, device="cuda:0"),
        "lr_scheduler": scheduler.state_dict(),
    }  # fmt: skip
    if one:
        del content["bert_model"]
    content.update(changes)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def expected_map(model, pixels, words, mask):
    """P of an attention from pixels [B, C, N] to words, mean of the heads, in float64: [B, N, T]."""
    block = model.double()
    q, k = block.f_query(pixels.double()), block.f_key(words.double()) * mask[:, None]
    q, k = (t.unflatten(1, (block.heads, -1)) for t in (q, k))
    s = torch.einsum("bhcn,bhct->bhnt", q, k) * pixels.shape[1] ** -0.5
    return s.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).mean(1)


@pytest.mark.parametrize("heads", [(1, 1, 1, 1), (1, 2, 4, 6)])
def test_outputs_and_maps_equal_those_of_the_original(heads):
    config = replace(CONFIG, fusion_heads=heads)
    ours = small_lavt(config)
    theirs, text = original_lavt(config)
    rest, bert = split(ours)
    theirs.load_state_dict(rest)
    text.load_state_dict(bert)
    images, _, ids, mask = inputs(ours)
    plain = run_original(theirs, text, images, ids, mask)
    torch.testing.assert_close(ours(images, ids, mask), plain, atol=1e-5, rtol=1e-5)

    seen, before, softmax = [], state(theirs), F.softmax

    def record(x, dim, **kwargs):
        p = softmax(x, dim=dim, **kwargs)
        # Modules pass _stacklevel; the attention to words calls the function itself.
        if not kwargs:
            seen.append(p)
        return p

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", record)
        again = run_backbone(theirs, text, images, ids, mask)
    assert len(seen) == 4
    with attnx.capture(theirs.backbone, LAYERS) as trace:
        captured = run_backbone(theirs, text, images, ids, mask)
    assert_same_state(before, state(theirs))
    for a, b in zip(captured, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    maps = lavt_word_maps(ours, images, ids, mask)
    for s in range(4):
        own = seen[s].mean(1)
        torch.testing.assert_close(trace[LAYERS[s]], own, atol=1e-5, rtol=0)
        torch.testing.assert_close(maps[s].flatten(2).mT, own, atol=1e-5, rtol=0)


def run_backbone(model, text, images, ids, mask):
    with torch.no_grad():
        words = text(ids, attention_mask=mask.long())[0].permute(0, 2, 1)
        return model.backbone(images, words, mask.long().unsqueeze(-1))


@pytest.mark.parametrize("width", [24, 128])
def test_maps_are_those_of_a_float64_softmax(width):
    # 128 channels: heads of 1024 in the last stage.
    model = small_lavt(replace(CONFIG, embed_dim=width, heads=(1, 2, 2, 4)))
    images, _, ids, mask = inputs(model)
    pixels = {}
    hooks = [
        stage.fusion.image_lang_att.register_forward_pre_hook(lambda m, args, s=s: pixels.update({s: args}))
        for s, stage in enumerate(model.backbone.layers)
    ]
    maps = lavt_word_maps(model, images, ids, mask)
    for hook in hooks:
        hook.remove()
    for s, stage in enumerate(model.backbone.layers):
        assert maps[s].dtype == torch.float32
        assert maps[s].shape == (2, 20, *GRIDS[s])
        p = expected_map(stage.fusion.image_lang_att, *pixels[s])
        torch.testing.assert_close(maps[s].flatten(2).mT.double(), p, atol=5e-6, rtol=0)


def test_padding_has_no_weight_words_sum_their_pieces_and_stages_are_averaged():
    model = small_lavt()
    images, captions, ids, mask = inputs(model)
    maps = lavt_word_maps(model, images, ids, mask)
    for m in maps:
        assert m[1, len(captions[1].ids) :].abs().max() == 0
        torch.testing.assert_close(m.sum(1), torch.ones_like(m[:, 0]), atol=1e-6, rtol=0)
        words = sum_pieces(m[0], captions[0])
        assert captions[0].words[2] == "skateboarding"
        torch.testing.assert_close(words[2], m[0, 3] + m[0, 4] + m[0, 5])
        torch.testing.assert_close(words.sum(0) + m[0, 0] + m[0, len(captions[0].ids) - 1], m[0].sum(0))
    picture = mean_of_stages(maps, (64, 60))
    assert picture.shape == (2, 20, 64, 60)
    torch.testing.assert_close(picture.sum(1), torch.ones(2, 64, 60), atol=1e-6, rtol=0)
    scaled = [F.interpolate(m, (64, 60), mode="bilinear") for m in maps]
    torch.testing.assert_close(picture, sum(scaled) / 4)
    torch.testing.assert_close(lavt_word_maps(model, images, ids, mask, stage=2), maps[2])


def test_padding_and_images_of_a_batch_do_not_change_a_map():
    model = small_lavt()
    images, captions, ids, mask = inputs(model)
    maps = lavt_word_maps(model, images, ids, mask)
    n = len(captions[1].ids)
    alone = lavt_word_maps(model, images[1:], ids[1:, :n], mask[1:, :n])
    for a, m in zip(alone, maps, strict=True):
        torch.testing.assert_close(a[0], m[1, :n], atol=1e-5, rtol=0)


@pytest.mark.parametrize("one", [False, True])
def test_a_checkpoint_of_the_original_loads(tmp_path, one):
    model = small_lavt(replace(CONFIG, text_heads=12, fusion_heads=(1, 2, 4, 6)))
    loaded = load_lavt(save(tmp_path / "lavt.pth", model, one=one), VOCAB)
    assert loaded.model.config == model.config
    assert loaded.size == (480, 480)
    assert loaded.interpolation == "bilinear"
    assert_same_state(dict(loaded.model.state_dict()), dict(model.state_dict()))
    images, _, ids, mask = inputs(model)
    assert torch.equal(loaded.model(images, ids, mask), model(images, ids, mask))


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTNX_TEST_EVIL"],)


def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNX_TEST_EVIL", str(tmp_path / "made"))
    for bad in ({"args": Evil()}, {"args": argparse.Namespace(mha="", hook=Evil())}):
        path = save(tmp_path / "evil.pth", small_lavt(), **bad)
        with pytest.raises(ValueError, match="weights only"):
            load_lavt(path, VOCAB)
    assert not (tmp_path / "made").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    model = small_lavt()
    rest, _ = split(model)
    path = tmp_path / "bad.pth"

    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            load_lavt(save(path, model, **changes), VOCAB)

    fewer = {k: v for k, v in rest.items() if k != "classifier.conv1_1.bias"}
    refused("1 missing: classifier.conv1_1.bias", model=fewer)
    refused("1 unexpected: extra", model={**rest, "extra": torch.zeros(1)})
    refused("expected a text encoder", bert_model=None)
    refused("heads of its attention to words are unknown; pass fusion_heads", args=None)
    refused("args.mha: expected four numbers", args=argparse.Namespace(mha="1-2"))
    refused("stage 0: expected a divisor of 24 channels; got 5", args=argparse.Namespace(mha="5-1-1-1"))
    index = "backbone.layers.0.blocks.0.attn.relative_position_index"
    refused("expected the index of Swin's windows", model={**rest, index: rest[index] + 1})
    refused("expected backbone.patch_embed.proj.weight with 4 dimensions; got none", model={"a": torch.zeros(1)})
    torch.save(rest, path)
    with pytest.raises(ValueError, match="a dict with `model`"):
        load_lavt(path, VOCAB)
    known = load_lavt(save(path, model, args=None), VOCAB, fusion_heads=(1, 1, 1, 1))
    assert known.model.config.fusion_heads == (1, 1, 1, 1)


def test_wrong_arguments_are_refused():
    model = small_lavt()
    images, _, ids, mask = inputs(model)
    for args, match in (
        ((model, images[:, :, :32, :32], ids, mask), "one side above 32 pixels"),
        ((model, images, ids[:1], mask), "ids: expected int64"),
        ((model, images, ids, mask.long()), "mask: expected bool"),
        ((model, images, ids, mask, 4), "stage: expected 0, 1, 2 or 3"),
        ((torch.nn.Linear(1, 1), images, ids, mask), "expected an attnx.models.lavt.Lavt"),
        ((Lavt(CONFIG), images, ids, mask), "expected eval mode"),
    ):
        with pytest.raises(ValueError, match=match):
            lavt_word_maps(*args)


class Layers(torch.nn.Module):
    """The layers of the original's block, with 8 channels and words of 6."""

    num_heads, key_channels, value_channels = 2, 8, 8

    def __init__(self):
        super().__init__()
        self.f_query = torch.nn.Conv1d(8, 8, 1)
        self.f_key, self.f_value = torch.nn.Conv1d(6, 8, 1), torch.nn.Conv1d(6, 8, 1)
        self.W = torch.nn.Conv1d(8, 8, 1)


def original_interface():
    class SpatialImageLanguageAttention(Layers):
        def forward(self, x, l, l_mask):
            b, n, h = x.size(0), x.size(1), self.num_heads
            m = l_mask.permute(0, 2, 1)
            q = self.f_query(x.permute(0, 2, 1)).reshape(b, h, self.key_channels // h, n)
            k = (self.f_key(l) * m).reshape(b, h, self.key_channels // h, -1)
            v = (self.f_value(l) * m).reshape(b, h, self.value_channels // h, -1)
            s = torch.matmul(q.permute(0, 1, 3, 2), k) * self.key_channels**-0.5
            p = F.softmax(s + (1e4 * m.unsqueeze(1) - 1e4), dim=-1)
            out = torch.matmul(p, v.permute(0, 1, 3, 2)).permute(0, 1, 3, 2).contiguous()
            return self.W(out.reshape(b, self.value_channels, n)).permute(0, 2, 1)

    return SpatialImageLanguageAttention().eval()


def another_scale():
    class SpatialImageLanguageAttention(Layers):
        def forward(self, x, l, l_mask):
            b, n, h = x.size(0), x.size(1), self.num_heads
            m = l_mask.permute(0, 2, 1)
            q = self.f_query(x.permute(0, 2, 1)).reshape(b, h, self.key_channels // h, n)
            k = (self.f_key(l) * m).reshape(b, h, self.key_channels // h, -1)
            v = (self.f_value(l) * m).reshape(b, h, self.value_channels // h, -1)
            s = torch.matmul(q.permute(0, 1, 3, 2), k) * self.key_channels**-0.25
            p = F.softmax(s + (1e4 * m.unsqueeze(1) - 1e4), dim=-1)
            out = torch.matmul(p, v.permute(0, 1, 3, 2)).permute(0, 1, 3, 2).contiguous()
            return self.W(out.reshape(b, self.value_channels, n)).permute(0, 2, 1)

    return SpatialImageLanguageAttention().eval()


@pytest.mark.parametrize("keep", [5, 2, 0])
def test_a_block_of_the_originals_interface_is_captured(keep):
    torch.manual_seed(0)
    block, x, words = original_interface(), torch.randn(2, 9, 8), torch.randn(2, 6, 5)
    mask = (torch.arange(5) < keep).long().expand(2, 5)[..., None]
    seen, softmax = [], F.softmax
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "softmax", lambda s, dim: seen.append(softmax(s, dim=dim)) or seen[-1])
        plain = block(x, words, mask)
    before = state(block)
    with attnx.capture(block) as trace:
        out = block(x, words, mask)
    assert_same_state(before, state(block))
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(trace[0], seen[0].mean(1), atol=1e-6, rtol=0)
    if keep == 0:
        torch.testing.assert_close(trace[0], torch.full((2, 9, 5), 0.2))


def test_another_block_of_the_same_name_is_left():
    assert len(route_to_sdpa(original_interface())) == 1
    assert route_to_sdpa(another_scale()) == []
