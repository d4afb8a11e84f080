"""Rollout of LAVT's words against a product of dense float64 matrices. ATTNX_LAVT=LAVT-RIS for the original's code."""

from dataclasses import replace

import pytest
import torch
from original_lavt import original_lavt
from test_lavt import CONFIG, GRIDS, inputs, run_backbone, small_lavt, split

import attnx
from attnx.extract.lavt_maps import expression_maps
from attnx.extract.lavt_rollout import lavt_word_rollout

pytestmark = pytest.mark.long

# Two blocks in the first stage: its second one shifts windows of a padded grid.
SHIFTED = replace(CONFIG, depths=(2, 1, 2, 1))


def blocks_of(config):
    return [f"layers.{s}.blocks.{b}.attn" for s in range(4) for b in range(config.depths[s])]


def traced(model, images, ids, mask, **options):
    with torch.no_grad(), attnx.capture(model.backbone, **options) as trace:
        model.backbone(images, model.encode_text(ids, mask), mask)
    return trace


def dense_window_map(maps, grid, window, shift):
    """[B, N, N] from maps of windows [B * nW, K, K], by loops over padded and rolled positions."""
    (h, w), n = grid, window
    H, W = -(-h // n) * n, -(-w // n) * n
    count, K = (H // n) * (W // n), n * n
    maps = maps.double().unflatten(0, (-1, count))
    dense = torch.zeros(len(maps), h * w, h * w, dtype=torch.float64)
    for k in range(count):
        top, left = k // (W // n) * n, k % (W // n) * n
        places = [((top + i // n + shift) % H, (left + i % n + shift) % W) for i in range(K)]
        real = [i for i, (y, x) in enumerate(places) if y < h and x < w]
        at = [places[i][0] * w + places[i][1] for i in real]
        kept = maps[:, k][:, real][:, :, real]
        dense[:, torch.tensor(at)[:, None], torch.tensor(at)] = kept / kept.sum(-1, keepdim=True)
    return dense


def dense_merge(grid):
    """[N', N]: equal parts of each merged patch to its patches before."""
    (h, w), (rows, columns) = grid, ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    matrix = torch.zeros(rows * columns, h * w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            matrix[y // 2 * columns + x // 2, y * w + x] = 1
    return matrix / matrix.sum(-1, keepdim=True)


def expected(trace, blocks, stage, captions):
    """The rollout of a stage's words, [B, W, N_0] of each caption, in float64."""
    product = torch.eye(GRIDS[0][0] * GRIDS[0][1], dtype=torch.float64)
    before = 0
    for name in blocks:
        s, b = int(name.split(".")[1]), int(name.split(".")[3])
        if s > stage:
            break
        if s > before:
            product, before = dense_merge(GRIDS[before]) @ product, s
        a = dense_window_map(trace[name], GRIDS[s], 4, 2 if b % 2 else 0)
        product = (0.5 * a + 0.5 * torch.eye(a.shape[-1], dtype=torch.float64)) @ product
    p = trace[f"layers.{stage}.fusion.image_lang_att"].double()
    rolled = []
    for i, caption in enumerate(captions):
        own = [[t for t, of in enumerate(caption.word_of) if of == w] for w in range(len(caption.words))]
        columns = torch.stack([p[i][:, pieces].sum(-1) for pieces in own])
        rolled.append(columns / columns.sum(-1, keepdim=True) @ product[i])
    return rolled


def words_of(maps, captions):
    """[W, N_0] of each caption: the sum over the pieces of each word."""
    return [
        torch.stack([m[[t for t, of in enumerate(c.word_of) if of == w]].sum(0) for w in range(len(c.words))]).flatten(
            1
        )
        for m, c in zip(maps, captions, strict=True)
    ]


@pytest.mark.parametrize("config", [CONFIG, replace(SHIFTED, fusion_heads=(1, 2, 4, 6))], ids=["plain", "shifted"])
@pytest.mark.parametrize("stage", range(4))
def test_rollout_is_the_product_of_dense_matrices(stage, config):
    model = small_lavt(config)
    images, captions, ids, mask = inputs(model)
    trace = traced(model, images, ids, mask)
    assert [name for name in trace if "blocks" in name] == blocks_of(config)
    maps = lavt_word_rollout(trace, stage, captions)
    assert maps.dtype == torch.float32
    assert maps.shape == (2, 20, *GRIDS[0])
    for got, want in zip(words_of(maps, captions), expected(trace, blocks_of(config), stage, captions), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.sum(-1), torch.ones(len(got)), rtol=0, atol=1e-5)
    found = expression_maps(model, images, [[c.text] for c in captions], stage, method="rollout")
    for i, (one, caption) in enumerate(zip(found, captions, strict=True)):
        assert one.caption == caption
        assert repr(one).startswith(f"ExpressionMaps({caption.text!r}, [")
        torch.testing.assert_close(one.maps, maps[i, : len(caption.ids)], rtol=0, atol=1e-6)
        torch.testing.assert_close(one.word_maps.flatten(1), words_of(maps, captions)[i], rtol=0, atol=1e-6)


def test_pieces_alone_have_mass_one_and_padding_none():
    model = small_lavt()
    images, captions, ids, mask = inputs(model)
    trace = traced(model, images, ids, mask)
    mass = lavt_word_rollout(trace, 2).sum((-2, -1))
    torch.testing.assert_close(mass, mask.float(), rtol=0, atol=1e-5)
    p = trace["layers.2.fusion.image_lang_att"].mT
    torch.testing.assert_close(
        lavt_word_rollout(trace, 0, residual=1).flatten(2)[1, :4],
        torch.nn.functional.normalize(trace["layers.0.fusion.image_lang_att"].mT[1, :4], p=1, dim=-1),
    )
    # The pieces of a word share the mass of the word in proportion to their weights.
    shares = lavt_word_rollout(trace, 2, captions).sum((-2, -1))[0, 3:6]
    torch.testing.assert_close(shares, p[0, 3:6].sum(-1) / p[0, 3:6].sum(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"heads": "each"}, {"keep": "qk"}])
def test_other_captures_give_the_same(options):
    model = small_lavt(replace(CONFIG, fusion_heads=(1, 2, 4, 6)))
    images, captions, ids, mask = inputs(model)
    want = lavt_word_rollout(traced(model, images, ids, mask), 3, captions)
    got = lavt_word_rollout(traced(model, images, ids, mask, **options), 3, captions)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_no_stage_is_the_mean_of_all_and_a_batch_equals_single_pairs():
    model = small_lavt()
    images, captions, ids, mask = inputs(model)
    trace = traced(model, images, ids, mask)
    want = torch.stack([lavt_word_rollout(trace, s, captions) for s in range(4)]).mean(0)
    found = expression_maps(model, images, [c.text for c in captions], method="rollout")
    for i, one in enumerate(found):
        torch.testing.assert_close(one.maps, want[i, : len(one.caption.ids)], rtol=0, atol=1e-6)
        (alone,) = expression_maps(model, images[i : i + 1], [one.caption.text], method="rollout")
        torch.testing.assert_close(one.maps, alone.maps, rtol=0, atol=1e-6)


def test_bfloat16_is_close_and_keeps_the_mass():
    model = small_lavt()
    images, captions, _, _ = inputs(model)
    texts = [c.text for c in captions]
    want = expression_maps(model, images, texts, 3, method="rollout")
    with torch.autocast("cpu", torch.bfloat16):
        found = expression_maps(model, images, texts, 3, method="rollout")
    for one, exact in zip(found, want, strict=True):
        assert one.word_maps.dtype == torch.float32
        torch.testing.assert_close(one.word_maps.sum((-2, -1)), torch.ones(len(one.words)), rtol=0, atol=1e-5)
        assert (one.word_maps - exact.word_maps).abs().sum((-2, -1)).max() < 0.1


def test_the_originals_code_under_a_capture_gives_the_same():
    ours = small_lavt(SHIFTED)
    theirs, text = original_lavt(SHIFTED)
    rest, bert = split(ours)
    theirs.load_state_dict(rest)
    text.load_state_dict(bert)
    images, captions, ids, mask = inputs(ours)
    with attnx.capture(theirs) as trace:
        run_backbone(theirs, text, images, ids, mask)
    own = traced(ours, images, ids, mask)
    for stage in range(4):
        want = lavt_word_rollout(own, stage, captions)
        torch.testing.assert_close(lavt_word_rollout(trace, stage, captions), want, rtol=0, atol=1e-5)


def test_wrong_arguments_are_refused():
    model = small_lavt()
    images, captions, ids, mask = inputs(model)
    trace = traced(model, images, ids, mask)
    for arguments, match in (
        ((trace, 4), "stage: expected 0, 1, 2 or 3; got 4"),
        ((trace, None), "stage: expected 0, 1, 2 or 3; got None"),
        ((trace, 1, captions[:1]), "captions: expected 2, one for each item; got 1"),
        ((trace.select(blocks_of(CONFIG)), 1), r"expected the attention to words layers\.1\.fusion"),
        ((trace.select("layers.1.*"), 1), r"Swin blocks \(layers\.0\.blocks\.\*\.attn\) of stages 0 to 1"),
        ((traced(model, images, ids, mask, heads="max"), 1), "heads 'mean' or 'each'; got 'max'"),
    ):
        with pytest.raises(ValueError, match=match):
            lavt_word_rollout(*arguments)
    with pytest.raises(ValueError, match="residual: expected 0 to 1; got 2"):
        lavt_word_rollout(trace, 1, residual=2)
    with pytest.raises(ValueError, match="method: expected attention or rollout with LAVT; got 'gradcam'"):
        expression_maps(model, images, ["a dog"] * 2, method="gradcam")
    with pytest.raises(ValueError, match="stage: expected 0, 1, 2 or 3, or None for all; got 4"):
        expression_maps(model, images, ["a dog"] * 2, 4, method="rollout")
    with pytest.raises(ValueError, match=r"expected an attnx\.models\.lavt\.Lavt; got Linear"):
        expression_maps(torch.nn.Linear(1, 1), images, ["a dog"] * 2, method="rollout")
