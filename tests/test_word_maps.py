"""Word maps and Grad-CAM of image and caption, against ALBEF's arithmetic written out in float64."""

from dataclasses import replace

import pytest
import torch
from small_albef import CAPTIONS, CONFIG, Written, small_albef, small_images
from torch import nn

import attnx
from attnx.testing import assert_within_budget


def tokens(model, caption):
    ids = torch.tensor([model.tokenizer(caption).ids])
    return ids, torch.ones_like(ids, dtype=torch.bool)


def written(model, images, caption, layer, dtype=torch.float64, first=0):
    """P [H, T, 1 + N] of a layer, its gradient and the matching logits, for one pair."""
    answer = Written(model, dtype)
    logits = answer.logits(images, *tokens(model, caption), first)
    p = answer.maps[layer]
    (dp,) = torch.autograd.grad(logits[:, 1].sum(), p)
    return p[0].detach(), dp[0], logits.detach()


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 64)])
@pytest.mark.parametrize("layer", [2, 3])
def test_both_are_albefs(layer, size):
    model, images = small_albef(), small_images(3, size)
    maps = {heads: attnx.word_maps(model, images, CAPTIONS, layer, heads) for heads in ("mean", "max", "min")}
    cams = attnx.gradcam(model, images, CAPTIONS, layer)
    grid = (size[0] // 8, size[1] // 8)
    for i, caption in enumerate(CAPTIONS):
        exact = written(model, images[i : i + 1], caption, layer)
        torchs = written(model, images[i : i + 1], caption, layer, torch.float32)
        fused = [
            {"mean": p.mean(0), "max": p.amax(0), "min": p.amin(0), "cam": (dp.clamp(min=0) * p).mean(0)}
            for p, dp, _ in (exact, torchs)
        ]
        found = {**{heads: maps[heads][i] for heads in maps}, "cam": cams[i]}
        for name, ours in found.items():
            assert ours.tokens == model.tokenizer(caption).tokens
            wanted, reference = (one[name][:, 1:].unflatten(-1, grid) for one in fused)
            assert_within_budget(ours.maps, wanted, reference, name, exponent=8)
        assert cams[i].score == pytest.approx(exact[2][0, 1].item(), abs=1e-5)
    ids, mask = tokens(model, CAPTIONS[0])
    exact, torchs = (Written(model, dtype).logits(images[:1], ids, mask) for dtype in (torch.float64, torch.float32))
    with torch.no_grad():
        assert_within_budget(model(images[:1], ids, mask), exact, torchs, "matching logits", exponent=8)


def test_as_many_captions_for_each_image_need_no_owner():
    model, images = small_albef(), small_images(2)
    ids = torch.tensor([model.tokenizer(caption).ids[:4] for caption in (*CAPTIONS, CAPTIONS[0])])
    mask, seen = torch.ones_like(ids, dtype=torch.bool), model.encode_image(images)
    named = model.encode_text(ids, mask, seen, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(model.encode_text(ids, mask, seen), named, rtol=1e-5, atol=1e-6)


def test_mixed_lengths_are_single_runs():
    model, images = small_albef(), small_images(3)
    for method in (attnx.word_maps, attnx.gradcam):
        together = method(model, images, CAPTIONS, 3)
        for i, caption in enumerate(CAPTIONS):
            alone = method(model, images[i : i + 1], [caption], 3)[0]
            torch.testing.assert_close(together[i].maps, alone.maps, rtol=1e-4, atol=1e-8)
            assert together[i].maps.shape == (len(alone.tokens), 4, 4)


def test_one_image_with_many_captions_is_encoded_once():
    model, images = small_albef(), small_images(2)
    encoded = []
    model.visual_encoder.patch_embed.register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    for method in (attnx.word_maps, attnx.gradcam):
        encoded.clear()
        several = method(model, images[:1], list(CAPTIONS), 2)
        assert encoded == [1]
        lists = method(model, images, [[CAPTIONS[0], CAPTIONS[1]], [CAPTIONS[2]]], 2)
        assert encoded == [1, 2]
        for i, caption in enumerate(CAPTIONS):
            alone = method(model, images[:1], [caption], 2)[0].maps
            torch.testing.assert_close(several[i].maps, alone, rtol=1e-4, atol=1e-8)
        second = method(model, images[1:], [CAPTIONS[2]], 2)[0].maps
        torch.testing.assert_close(lists[2].maps, second, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(lists[1].maps, several[1].maps, rtol=1e-4, atol=1e-8)


def test_the_model_is_left_at_the_layer():
    model = small_albef()
    ran = []
    for i, layer in enumerate(model.text_encoder.encoder["layer"]):
        layer.intermediate.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attnx.word_maps(model, small_images(1), ["a dog"], 2)
    assert ran == [0, 1]
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    attnx.word_maps(model, small_images(1), ["a dog"], 3)
    assert ran == [0, 1, 0, 1, 2]


def test_gradcam_leaves_nothing_behind():
    model = small_albef()
    states = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        inside = attnx.gradcam(model, small_images(1), ["a dog"], 3)
    outside = attnx.gradcam(model, small_images(1), ["a dog"], 3)
    assert torch.equal(inside[0].maps, outside[0].maps)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == states
    assert not outside[0].maps.requires_grad


def test_pieces_are_merged_into_words():
    model = small_albef()
    found = attnx.word_maps(model, small_images(1), ["The man Skateboarding, on a X"], 3)[0]
    assert found.tokens == ("[CLS]", "the", "man", "skate", "##board", "##ing", "on", "a", "x", "[SEP]")
    assert found.words == ("the", "man", "skateboarding", "on", "a", "x")
    assert found.word_maps.shape == (6, 4, 4)
    torch.testing.assert_close(found.word_maps[2], found.maps[3:6].mean(0))
    assert torch.equal(found.word_maps[1], found.maps[2])
    torch.testing.assert_close(found.phrase("skateboarding on"), found.word_maps[2:4].mean(0))
    with pytest.raises(ValueError, match="phrase: expected consecutive words of 'the man skateboarding on a x'"):
        found.phrase("man on")


def test_the_class_tokens_weight_is_dropped_and_the_rest_as_it_was():
    model, images = small_albef(), small_images(1)
    found = attnx.word_maps(model, images, ["a dog"], 3)[0].maps
    cls = written(model, images, "a dog", 3)[0].mean(0)[:, 0]
    torch.testing.assert_close(found.sum((1, 2)).double(), 1 - cls, rtol=1e-5, atol=1e-6)


def test_laviss_order():
    cam = attnx.gradcam(small_albef(), small_images(1), ["a red circle"], 2)[0]
    assert cam.lavis.shape == (6, 4, 4)
    assert torch.equal(cam.lavis[0], cam.maps[0])
    torch.testing.assert_close(cam.lavis[1], cam.maps[1:4].sum(0) / 3)
    assert torch.equal(cam.lavis[2:], cam.maps[1:])


def test_vl_dinos_way_past_the_text_layers():
    model, images = small_albef(), small_images(1)
    found = attnx.word_maps(model, images, ["a red circle"], 3, preset="vl-dino")[0].maps
    p = written(model, images, "a red circle", 3, first=2)[0]
    torch.testing.assert_close(found.flatten(1).double(), p.mean(0)[:, 1:], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, attnx.word_maps(model, images, ["a red circle"], 3)[0].maps)


def test_a_caption_that_is_too_long_is_cut_at_a_word_and_that_is_said():
    model = small_albef()
    with pytest.warns(UserWarning, match=r"25 tokens.*takes 24: cut before word 21 of 21"):
        found = attnx.word_maps(model, small_images(1), ["a " * 19 + "skateboarding dog"], 3)[0]
    assert found.words[-1] == "skateboarding"
    assert len(found.tokens) == 24
    with pytest.warns(UserWarning, match="cut before word 21 of 22"):
        found = attnx.word_maps(model, small_images(1), ["a " * 20 + "skateboarding dog"], 3)[0]
    assert found.words == ("a",) * 20
    assert found.caption.cut == 2
    assert found.caption.text == " ".join(found.words)


def test_markup_and_newlines_are_text():
    found = attnx.word_maps(small_albef(), small_images(1), ["<b>a\ndog</b>\n$x$ & the\tman"], 3)[0]
    assert found.caption.text == "<b>a dog< b> $x$ & the man"
    assert found.words == ("<b>a", "dog<", "b>", "$x$", "&", "the", "man")


WRONG = {
    "layer": (dict(layer=1), r"layer: expected a text layer with cross-attention, one of 2, 3; got 1"),
    "empty": (dict(captions=["a", " ?! "]), r"captions: number 1: caption: expected words; got ' \?! '"),
    "none": (dict(captions=[]), "captions: expected a list of texts"),
    "text": (dict(captions="a dog"), "captions: expected a list of texts"),
    "number": (dict(captions=["a"]), "captions: expected one, or a list, for each of 2 images; got 1"),
    "an image without": (dict(captions=[["a"], []]), r"captions: expected a text or a list .* for image 1; got \[\]"),
    "kind": (dict(captions=["a", 3]), "captions: expected a text or a list of them for image 1; got 3"),
    "inner kind": (dict(captions=[["a"], [3]]), "captions: number 1: caption: expected text; got int"),
    "images": (dict(images=torch.ones(2, 3, 30, 32)), "images: expected multiples of the patch of 8 pixels; got 30x32"),
    "dims": (dict(images=torch.ones(3, 32, 32)), r"images: expected \[I, 3, height, width\]; got \[3, 32, 32\]"),
    "array": (dict(images=[1]), "images: expected a tensor"),
    "model": (dict(model=nn.Linear(2, 2)), "model: expected an Albef of attnx.models; got Linear"),
    "training": (dict(model=small_albef().train()), "model: expected eval mode"),
    "tokenizer": (dict(model=small_albef()), "model: expected one with a tokenizer"),
}


@pytest.mark.parametrize("method", [attnx.word_maps, attnx.gradcam])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name, method):
    given, expected = WRONG[name]
    arguments = dict(model=small_albef(), images=small_images(2), captions=["a dog", "a man"], layer=3) | given
    if name == "tokenizer":
        arguments["model"].tokenizer = None
    with pytest.raises(ValueError, match=expected):
        method(**arguments)


def test_heads_and_presets_that_do_not_exist():
    call = small_albef(), small_images(1), ["a dog"], 3
    with pytest.raises(ValueError, match="heads: expected 'mean', 'max' or 'min'"):
        attnx.word_maps(*call, "each")
    with pytest.raises(ValueError, match="heads: expected one of mean"):
        attnx.word_maps(*call, "median")
    with pytest.raises(ValueError, match="preset: expected None or 'vl-dino'; got 'x'"):
        attnx.word_maps(*call, preset="x")


def test_the_layer_is_heard_by_captures_too():
    model, images = small_albef(), small_images(1)
    ids, mask = tokens(model, "a dog")
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images, ids, mask)
        inner = attnx.word_maps(model, images, ["a dog"], 3)[0].maps
    assert [name.rpartition(".")[0] for name in trace][-2:] == [
        "text_encoder.encoder.layer.3.attention", "text_encoder.encoder.layer.3.crossattention"
    ]  # fmt: skip
    torch.testing.assert_close(trace[model.cross_attention(3)][0, :, 1:].unflatten(-1, (4, 4)), inner)


def test_other_widths_of_image_and_text():
    wide = small_albef(config=replace(CONFIG, vision_width=96, width=64, heads=4, mlp_ratio=2))
    found = attnx.gradcam(wide, small_images(2), [["a dog", "a man"], ["the x"]], 2)
    assert [c.maps.shape for c in found] == [(4, 4, 4)] * 3
