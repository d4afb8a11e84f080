"""The page of an image and its caption: words to patches, and patches to words."""

import json
import re

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from test_cli import fails, run

import attnx
from attnx.demo.albef import demo_albef, prepare
from attnx.demo.captioned import draw_pair
from attnx.extract.caption_layers import caption_layers, maps_of_layers, maps_of_stages
from attnx.extract.captions import CaptionMaps
from attnx.extract.lavt_maps import expression_maps
from attnx.models.lavt import Lavt, LavtConfig
from attnx.models.tokenizer import Caption, Tokenizer
from attnx.page.words import words_page

SCENE = draw_pair(5)
PICTURE = Image.fromarray(SCENE.image)
# Several pieces make one word, so that the maps of words differ from those of pieces.
PIECES = Caption("skateboarding dog", (2, 5, 6, 7, 8, 3), ("[CLS]", "skate", "##board", "##ing", "dog", "[SEP]"),
                 ("skateboarding", "dog"), (None, 0, 0, 0, 1, None))  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return attnx.word_maps(demo_albef(), prepare([SCENE.image]), [SCENE.caption], layer=2)[0]


def shade(opened, at):
    """The colour of a word, [r, g, b]."""
    style = opened.page.evaluate("at => document.querySelector(`[data-at='${at}']`).style.backgroundColor", at)
    return [int(n) for n in re.findall(r"\d+", style)]


def pixel(opened, share):
    shown = opened.canvas("#panel0 .map")
    return shown[int(share[1] * shown.shape[0]), int(share[0] * shown.shape[1])]


def near(rgb, share, reach=3):
    """True if a colour belongs to a share of the range, within the steps of the stored values."""
    index = int(256 * share)
    each = colormaps["turbo"](np.arange(index - reach, index + reach + 1).clip(0, 255), bytes=True)[:, :3].astype(int)
    return np.abs(each - np.array(rgb[:3], int)).max(1).min() <= 1


def test_a_word_shows_its_patches(found, browser, tmp_path):
    found.explore(PICTURE).save(tmp_path / "page.html")
    with browser.open(tmp_path / "page.html", "alpha=100&smooth=0") as opened:
        words = opened.page.locator("#caption button")
        assert words.all_inner_texts() == list(found.words)
        for word in (1, 6):
            words.nth(word).hover()
            opened.settle()
            amap = found.word_maps[word].numpy()
            for row, column in ((0, 0), divmod(int(amap.argmax()), 12), (11, 5)):
                share = (amap[row, column] - amap.min()) / (amap.max() - amap.min())
                assert near(pixel(opened, [(column + 0.5) / 12, (row + 0.5) / 12]), share)
            assert opened.text("#panel0 p") == f"{found.words[word]}: what it attends to"


def test_a_patch_shades_the_words_that_attend_to_it(found, browser, tmp_path):
    found.explore(PICTURE).save(tmp_path / "page.html")
    row, column = 8, 9
    values = found.word_maps[:, row, column].numpy()
    with browser.open(tmp_path / "page.html") as opened:
        opened.at((column + 0.5) / 12, (row + 0.5) / 12)
        assert opened.text("#panel0 p") == f"patch ({row}, {column}): who attends to it"
        for word, value in enumerate(values):
            assert near(shade(opened, len(found.tokens) + word), value / values.max())
            title = opened.page.get_attribute(f"[data-at='{len(found.tokens) + word}']", "title")
            assert abs(float(title.rpartition(": ")[2]) - value) <= values.max() / 255


def test_several_words_and_a_dragged_phrase(found, browser, tmp_path):
    found.explore(PICTURE).save(tmp_path / "page.html")
    first = len(found.tokens)
    with browser.open(tmp_path / "page.html", "alpha=100&smooth=0") as opened:
        words = opened.page.locator("#caption button")
        words.nth(1).click()
        words.nth(6).click()
        opened.settle()
        assert f"pick0=q{first + 1}.{first + 6}" in opened.page.url
        amap = found.word_maps[[1, 6]].mean(0).numpy()
        for row, column in ((0, 0), divmod(int(amap.argmax()), 12)):
            share = (amap[row, column] - amap.min()) / (amap.max() - amap.min())
            assert near(pixel(opened, [(column + 0.5) / 12, (row + 0.5) / 12]), share)
        words.nth(1).click()
        opened.settle()
        assert f"pick0=q{first + 6}" in opened.page.url
        opened.press("Escape")
        assert "pick" not in opened.page.url
        words.nth(1).hover()
        opened.page.mouse.down()
        words.nth(2).hover()
        opened.page.mouse.up()
        opened.settle()
        assert f"pick0=q{first + 1}.{first + 2}" in opened.page.url
        assert opened.text("#panel0 p").startswith("blue star: ")


def test_pieces_are_shown_on_request(browser, tmp_path):
    maps = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    CaptionMaps(PIECES, maps, -0.25).explore().save(tmp_path / "page.html")
    with browser.open(tmp_path / "page.html") as opened:
        words = opened.page.locator("#caption button")
        assert words.all_inner_texts() == ["skateboarding", "dog"]
        assert "Match: -0.25" in opened.text("#caption")
        words.nth(0).click()
        opened.at(2.5 / 4, 1.5 / 3)
        mean = maps[1:4].mean(0)
        assert abs(float(opened.text("#reading").rpartition(": ")[2]) - mean[1, 2]) <= mean.max() / 255
        opened.press("w")
        assert opened.page.is_checked("#pieces")
        assert words.all_inner_texts() == list(PIECES.tokens)
        words.nth(3).click()
        opened.at(2.5 / 4, 1.5 / 3)
        assert abs(float(opened.text("#reading").rpartition(": ")[2]) - maps[3, 1, 2]) <= maps[3].max() / 255


HOSTILE = [
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "<!--<script>",
    "مرحبا بالعالم \u202eabc\u202c",
    "w" * 10_000,
    "\u2028${1+1}`\\u0000`$body",
]


def test_hostile_captions_are_text(browser, tmp_path):
    caption = Caption(" ".join(HOSTILE), (2, *range(len(HOSTILE)), 3), ("[CLS]", *HOSTILE, "[SEP]"), tuple(HOSTILE),
                      (None, *range(len(HOSTILE)), None))  # fmt: skip
    CaptionMaps(caption, torch.rand(len(HOSTILE) + 2, 2, 2)).explore(PICTURE).save(tmp_path / "page.html")
    with browser.open(tmp_path / "page.html", viewport={"width": 390, "height": 700}) as opened:
        texts = opened.page.evaluate("[...document.querySelectorAll('#caption button')].map(b => b.firstChild.data)")
        assert texts == HOSTILE
        opened.page.locator("#caption button").nth(0).hover()
        opened.page.locator("#caption button").nth(2).click()
        opened.settle()
        assert opened.page.title() == " ".join(HOSTILE)
        assert opened.page.locator("h1 *, img[src=x], #caption button > :not(small)").count() == 0
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_every_layer_is_that_of_its_own_call():
    model, images = demo_albef(), prepare([SCENE.image])
    found = maps_of_layers(model, images, SCENE.caption)
    assert list(found) == [("attention", 2), ("attention", 3), ("gradcam", 2), ("gradcam", 3)]
    for (method, layer), maps in found.items():
        call = attnx.word_maps if method == "attention" else attnx.gradcam
        wanted = call(model, images, [SCENE.caption], layer=layer)[0]
        torch.testing.assert_close(maps.maps, wanted.maps, atol=2e-7, rtol=0)
        assert maps.score == (None if method == "attention" else pytest.approx(wanted.score, abs=1e-5))
    assert list(maps_of_layers(model, images, SCENE.caption, heads="max")) == [("attention", 2), ("attention", 3)]


def test_every_stage_of_lavt(browser, tmp_path):
    config = LavtConfig(24, (1, 1, 1, 1), (1, 2, 4, 8), 4, text_width=32, text_depth=1, text_heads=2)
    vocab = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"], 20, plain=True)
    torch.manual_seed(0)
    model, images = Lavt(config, vocab).eval(), torch.rand(1, 3, 64, 48)
    found = maps_of_stages(model, images, "a dog")
    assert list(found) == [(m, s) for m in ("attention", "rollout") for s in (0, 1, 2, 3, None)]
    for (method, stage), maps in found.items():
        torch.testing.assert_close(maps.maps, expression_maps(model, images, ["a dog"], stage, method=method)[0].maps)
    page = words_page(caption_layers(model, images, "a dog"), PICTURE, start="attention, mean of the stages")
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html)[1])
    assert data["stops"][data["start"]]["name"] == "attention, mean of the stages"
    assert [side["grid"] for side in data["sides"]][1:] == [[16, 12], [8, 6], [4, 3], [2, 2]]
    page.save(tmp_path / "page.html")
    dog = found["attention", 2].word_maps[1]
    with browser.open(tmp_path / "page.html", "stop=2") as opened:
        opened.page.locator("#caption button").nth(1).click()
        opened.at(1.5 / 3, 2.5 / 4)
        assert abs(float(opened.text("#reading").rpartition(": ")[2]) - dog[2, 1]) <= dog.max() / 255


def test_maps_of_two_captions_are_refused(found):
    other = CaptionMaps(PIECES, torch.rand(6, 12, 12))
    with pytest.raises(ValueError, match="expected maps of one caption; got 2"):
        words_page({"a": found, "b": other})


def test_the_command(browser, tmp_path):
    PICTURE.save(tmp_path / "photo.png")
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    flags = ["--model", "demo", "--method", "gradcam", "--layer", 3, "--page", "--out", out]
    done = run("words", photo, SCENE.caption, *flags)
    assert done.exit_code == 0, done.output
    assert f"{out / 'words.html'}  an interactive page" in done.output
    with browser.open(out / "words.html") as opened:
        assert opened.text("#stopName") == "4 of 4: Grad-CAM, layer 3"
        opened.page.locator("#overview button").nth(0).click()
        opened.settle()
        assert opened.text("#stopName") == "1 of 4: attention, layer 2"
    assert "attnx browse" in fails("words", "--pairs", photo, "--model", "demo", "--page")
