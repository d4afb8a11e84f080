"""LAVT's words: `attnx.word_maps`, `attnx words --model lavt:CHECKPOINT`, and the tokens of expressions."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_albef import VOCAB, small_albef, small_images
from test_cli import fails, run
from test_lavt import CAPTIONS, CONFIG, save, small_lavt

import attnx
from attnx.extract.captions import CaptionMaps, WordMaps
from attnx.extract.lavt_maps import expression_maps, lavt_word_maps, mean_of_stages, pad_captions, sum_pieces
from attnx.figures.one_image import Style
from attnx.figures.words import words_sheet
from attnx.jobs.reader import Maps
from attnx.models.lavt_checkpoint import load_lavt
from attnx.models.tokenizer import Tokenizer

CAPTION = CAPTIONS[0]


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))


@pytest.fixture
def files(tmp_path, picture):
    """An image, a checkpoint in the format of the original's train.py, and a vocabulary."""
    picture.save(tmp_path / "a.png")
    save(tmp_path / "lavt.pth", small_lavt(replace(CONFIG, text_heads=12)))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    return tmp_path


@pytest.mark.parametrize("stage", [0, 2, None])
def test_maps_of_words_are_those_of_the_stages(stage):
    model, images = small_lavt(), torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    found = attnx.word_maps(model, images, CAPTION, stage=stage)
    (caption,), ids, mask = pad_captions(model, [CAPTION])
    stages = lavt_word_maps(model, images, ids, mask)
    want = mean_of_stages(stages, (16, 24)) if stage is None else stages[stage]
    assert isinstance(found, CaptionMaps)
    assert found.words == tuple(CAPTION.split())
    torch.testing.assert_close(found.maps, want[0, : len(caption.ids)], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.word_maps, sum_pieces(want[0], caption), atol=1e-5, rtol=0)
    # "skateboarding" has three pieces, which are added.
    torch.testing.assert_close(found.word_maps[2], found.maps[3:6].sum(0))
    torch.testing.assert_close(found.maps.sum(0), torch.ones_like(found.maps[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.phrase("Red circle"), found.word_maps[-2:].sum(0))
    with pytest.raises(ValueError, match="expected consecutive words of"):
        found.phrase("circle red")


def test_images_with_several_captions_equal_single_pairs():
    model, images = small_lavt(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = attnx.word_maps(model, images, [["a dog", CAPTION], ["the man"]], stage=1)
    assert isinstance(found, WordMaps)
    for one, (i, caption) in zip(found, ((0, "a dog"), (0, CAPTION), (1, "the man")), strict=True):
        alone = attnx.word_maps(model, images[i : i + 1], caption, stage=1)
        assert one.caption == alone.caption
        torch.testing.assert_close(one.maps, alone.maps, atol=1e-5, rtol=0)


def test_a_picture_is_prepared_as_by_the_loader(files, picture):
    loaded = load_lavt(files / "lavt.pth", VOCAB, (64, 96))
    want = attnx.word_maps(loaded.model, loaded.prepare(picture)[None], CAPTION)
    assert want.maps.shape[1:] == (16, 24)
    assert torch.equal(attnx.word_maps(loaded.model, picture, CAPTION).maps, want.maps)
    assert torch.equal(attnx.word_maps(loaded.model, picture, [CAPTION])[0].maps, want.maps)
    albef = small_albef()
    assert attnx.word_maps(albef, picture, "a dog", 3).maps.shape == (4, 4, 4)


def test_options_of_the_other_model_are_refused():
    images = torch.randn(1, 3, 64, 64)
    for options in ({"layer": 8}, {"heads": "max"}, {"preset": "vl-dino"}):
        with pytest.raises(ValueError, match="LAVT has no layer, heads or preset"):
            attnx.word_maps(small_lavt(), images, CAPTION, **options)
    with pytest.raises(ValueError, match="stage: expected 0, 1, 2 or 3, or None for all; got 4"):
        attnx.word_maps(small_lavt(), images, CAPTION, stage=4)
    with pytest.raises(ValueError, match="stage: expected None, since only LAVT has stages; got 0"):
        attnx.word_maps(small_albef(), small_images(1), ["a dog"], 3, stage=0)
    with pytest.raises(ValueError, match="captions: number 1: caption: expected words"):
        attnx.word_maps(small_lavt(), images, ["a dog", " "])
    with pytest.raises(ValueError, match=r"images: expected a tensor .*, or a PIL image; got str"):
        attnx.word_maps(small_lavt(), "a.png", CAPTION)
    with pytest.raises(ValueError, match=r"expected an Albef of attnx.models; got Lavt"):
        attnx.gradcam(small_lavt(), images, ["a dog"])


@pytest.mark.parametrize("flags", [["--stage", 1], [], ["--dtype", "bfloat16"]])
def test_the_command_draws_the_maps(files, picture, flags):
    args = ["--vocab", files / "vocab.txt", "--image-size", "64x96", "--device", "cpu", "--out", files / "out"]
    result = run("words", files / "a.png", "a dog, x", "--model", f"lavt:{files / 'lavt.pth'}", *args, *flags)
    assert result.exit_code == 0, result.output
    names = ["00-a.png", "01-dog.png", "02-x.png", "words.npz", "words.png"]
    assert sorted(p.name for p in (files / "out").iterdir()) == names
    model = load_lavt(files / "lavt.pth", VOCAB, (64, 96)).model
    with pytest.warns(UserWarning, match="1 of 3 words is not in the vocabulary: dog,"):
        want = attnx.word_maps(model, picture, "a dog, x", stage=1 if "--stage" in flags else None)
    with np.load(files / "out" / "words.npz") as arrays:
        tolerance = 2e-2 if "bfloat16" in flags else 1e-6
        np.testing.assert_allclose(arrays["maps"], want.word_maps, atol=tolerance)
        assert arrays["words"].tolist() == ["a", "dog,", "x"]
        assert arrays["tokens"].tolist() == ["[CLS]", "a", "dog", "[UNK]", "x", "[SEP]"]


@pytest.mark.parametrize("flags", [["--stage", 2], []])
def test_the_command_draws_the_rollout(files, picture, flags):
    args = ["--vocab", files / "vocab.txt", "--image-size", "64x96", "--device", "cpu", "--out", files / "out"]
    model = f"lavt:{files / 'lavt.pth'}"
    result = run("words", files / "a.png", "a dog", "--model", model, "--method", "rollout", *args, *flags)
    assert result.exit_code == 0, result.output
    loaded = load_lavt(files / "lavt.pth", VOCAB, (64, 96))
    images = loaded.prepare(picture)[None]
    (want,) = expression_maps(loaded.model, images, ["a dog"], 2 if flags else None, method="rollout")
    with np.load(files / "out" / "words.npz") as arrays:
        assert arrays["maps"].shape == (2, 16, 24)
        np.testing.assert_allclose(arrays["maps"], want.word_maps, atol=1e-6)
        np.testing.assert_allclose(arrays["maps"].sum((1, 2)), 1, atol=1e-5)


def test_mistakes_are_one_line(files):
    out, vocab, image = files / "out", ["--vocab", files / "vocab.txt"], files / "a.png"
    model = f"lavt:{files / 'lavt.pth'}"

    def told(*flags, model=model, vocab=vocab):
        return fails("words", image, "a dog", "--model", model, *vocab, "--device", "cpu", "--out", out, *flags)

    assert "lavt:FILE" in told(model="lavt")
    assert "expected a file; " in told(model=f"lavt:{files / 'gone.pth'}")
    assert "expected one; got lavt:" in told("--checkpoint", files / "lavt.pth")
    assert "gone.txt is none" in told(vocab=["--vocab", files / "gone.txt"])
    (files / "large.txt").write_text("\n".join([*VOCAB, "more"]))
    assert "vocab: expected at most 26 word pieces" in told(vocab=["--vocab", files / "large.txt"])
    assert "expected a torch file of weights only" in told(model=f"lavt:{image}")
    torch.save({"model": {"a": torch.zeros(1)}, "bert_model": {}, "args": None}, files / "other.pth")
    assert "heads of its attention to words are unknown" in told(model=f"lavt:{files / 'other.pth'}")
    save(files / "extra.pth", small_lavt(), bert_model={"extra": torch.zeros(1)})
    assert "embeddings.word_embeddings.weight with 2 dimensions; got none" in told(model=f"lavt:{files / 'extra.pth'}")
    for flags, message in (
        (["--layer", 8], "layer: expected none with LAVT; got 8"),
        (["--method", "gradcam"], "method: expected attention or rollout with LAVT; got 'gradcam'"),
        (["--heads", "max"], "heads: expected mean with LAVT; got 'max'"),
        (["--preset", "vl-dino"], "preset: expected none with LAVT; got 'vl-dino'"),
        (["--stage", 4, "--image-size", 64], "stage: expected 0, 1, 2 or 3"),
        (["--image-size", 32], "one side above 32 pixels"),
    ):
        assert message in told(*flags)
    assert "stage: expected --model lavt:CHECKPOINT" in told("--stage", 1, model="demo")
    only = "method: expected attention or gradcam, since only LAVT has rollout; got 'rollout'"
    assert only in told("--method", "rollout", model="demo")
    assert not out.exists()


@pytest.mark.parametrize(("flags", "options"), [([], {}), (["--method", "rollout", "--stage", "2"], {"stage": 2})])
def test_a_batch_job(files, picture, flags, options):
    captions = ["a dog", "a", "dog, x", "?"]
    lines = [json.dumps({"image": "a.png", "caption": caption}) for caption in captions]
    (files / "pairs.jsonl").write_text("\n".join(lines))
    model = f"lavt:{files / 'lavt.pth'}"
    args = ["--vocab", files / "vocab.txt", "--image-size", "64x96", "--device", "cpu", "--map-dtype", "float32"]
    args += ["--out", files / "job", "--pictures", *flags]
    result = run("words", "--pairs", files / "pairs.jsonl", "--model", model, *args)
    assert result.exit_code == 0, result.output
    loaded = load_lavt(files / "lavt.pth", VOCAB, (64, 96))
    images = loaded.prepare(picture)[None]
    method = "rollout" if flags else "attention"
    rows = list(Maps(files / "job"))
    assert len(rows) == len(captions)
    for row, caption in zip(rows, captions, strict=True):
        (want,) = expression_maps(loaded.model, images, [caption], method=method, **options)
        assert row.tokens == want.tokens
        np.testing.assert_allclose(row.map, want.maps, atol=1e-5)
        assert row.words == want.words
        np.testing.assert_allclose(row.word_maps, want.word_maps, atol=2e-5)
    assert len(list((files / "job" / "pictures").iterdir())) == len(captions)
    settings = json.loads((files / "job" / "run.json").read_text())["settings"]
    assert settings["stage"] == options.get("stage")
    assert "layer" not in settings
    # The sum over the pieces is the map of a word, also in the pictures.
    sheet = Image.open(files / "job" / "pictures" / "000002-dog-x.png")
    (want,) = expression_maps(loaded.model, images, [captions[2]], method=method, **options)
    drawn = words_sheet(picture, replace(want, maps=torch.from_numpy(rows[2].map)), Style())
    assert np.array_equal(np.asarray(sheet), np.asarray(drawn.convert("RGB")))


def test_expressions_are_read_as_by_bert(tmp_path):
    from transformers import BertTokenizer

    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(VOCAB))
    with pytest.warns(UserWarning, match="words is not in the vocabulary: <b>:"):
        read = Tokenizer(vocab, 20, plain=True)("  The MAN/dog & <b>: Skateboarding ")
    assert list(read.ids) == BertTokenizer(str(vocab))("  The MAN/dog & <b>: Skateboarding ")["input_ids"]
    assert read.words == ("The", "MAN/dog", "&", "<b>:", "Skateboarding")
    assert Tokenizer(VOCAB, 20)("The man/dog").tokens == ("[CLS]", "the", "man", "dog", "[SEP]")
    assert Tokenizer(VOCAB, 20).fingerprint() != Tokenizer(VOCAB, 20, plain=True).fingerprint()
    with pytest.raises(ValueError, match="caption: expected words"):
        Tokenizer(VOCAB, plain=True)("\x00")


@pytest.mark.parametrize(
    ("limit", "words", "cut", "warning"),
    [
        (7, 4, 0, r"cut before \[SEP\]"),
        (6, 3, 1, "cut before word 4 of 4"),
        (5, 3, 1, "cut in word 3 of 4"),
        (3, 2, 2, "cut before word 3 of 4"),
    ],
)
def test_long_expressions_are_cut_as_by_the_original(limit, words, cut, warning):
    text = "the man skateboarding on"
    whole = Tokenizer(VOCAB, 9, plain=True)(text)
    with pytest.warns(UserWarning, match=warning):
        read = Tokenizer(VOCAB, limit, plain=True)(text)
    assert read.ids == whole.ids[:limit]
    assert len(read.words) == words
    assert read.cut == cut
    assert text.startswith(read.text)
    assert read.words[:2] == ("the", "man")


@pytest.mark.skipif(
    "ATTNX_TEST_DATA" not in os.environ,
    reason="set ATTNX_TEST_DATA to a folder with bert-base-uncased-vocab.txt and captions.jsonl",
)
def test_captions_with_punctuation_are_read_as_by_bert():
    from transformers import BertTokenizer

    data = Path(os.environ["ATTNX_TEST_DATA"])
    path = str(data / "bert-base-uncased-vocab.txt")
    ours, berts = Tokenizer(path, 20, plain=True), BertTokenizer(path)
    captions = [json.loads(line)["caption"] for line in (data / "captions.jsonl").read_text().splitlines()]
    captions += ["Man's t-shirt (left).", 'the "2nd" guy, w/ café #3!', "a/b\tc\nd...", "naïve  Ürün — x"]
    assert len(captions) > 50
    for caption in captions:
        ids = berts.encode(caption, add_special_tokens=True)
        if len(ids) > 20:
            with pytest.warns(UserWarning, match="the model takes 20"):
                read = ours(caption)
        else:
            read = ours(caption)
        assert list(read.ids) == ids[:20]
