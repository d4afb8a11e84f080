"""ALBEF's checkpoints: every published kind loads, and checkpoints of other models are refused."""

import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_albef import CONFIG, VOCAB, small_albef, small_images

import attnx
from attnx.models.albef_checkpoint import load_albef
from attnx.models.tokenizer import Tokenizer, pre_caption


@pytest.fixture
def bert_data():
    """A folder with bert-base-uncased-vocab.txt and captions.jsonl. They are not part of the repository."""
    folder = os.environ.get("ATTNX_TEST_DATA")
    if folder is None:
        pytest.skip("set ATTNX_TEST_DATA to a folder with bert-base-uncased-vocab.txt and captions.jsonl")
    return Path(folder)


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    return path


def published(kind, model):
    """A state dict as the original code saves it, including the entries that maps do not need."""
    own = dict(model.state_dict())
    text = {key: value for key, value in own.items() if key.startswith("text_encoder.")}
    rest = {key: value for key, value in own.items() if key not in text}
    noise = {key.replace(".", "_m.", 1): value + 1 for key, value in own.items() if key.startswith("visual_encoder.")}
    noise |= {"image_queue": torch.ones(16, 8), "text_queue": torch.ones(16, 8), "queue_ptr": torch.zeros(1)}
    text["text_encoder.embeddings.position_ids"] = torch.arange(CONFIG.max_tokens)[None]
    if kind == "pretraining":
        text = {key.replace("text_encoder.", "text_encoder.bert.", 1): value for key, value in text.items()}
        text["text_encoder.cls.predictions.bias"] = torch.ones(len(VOCAB))
    elif kind == "vqa":
        rest = {key: value for key, value in rest.items() if key.startswith("visual_encoder.")}
        noise["text_decoder.bert.encoder.layer.0.output.dense.weight"] = torch.ones(3, 3)
    elif kind == "retrieval":
        noise["idx_queue"] = torch.ones(1, 8)
        noise["vision_proj_m.weight"] = torch.ones(16, 48)
    state = {**text, **rest, **noise}
    return state if kind == "refcoco" else {"model": state, "epoch": 3, "config": {"temp": 0.07}}


@pytest.mark.parametrize("kind", ["pretraining", "retrieval", "refcoco", "vqa"])
def test_published_kinds(kind, tmp_path, vocab):
    model, path = small_albef(3), tmp_path / "ALBEF.pth"
    torch.save(published(kind, model), path)
    loaded = load_albef(path, vocab, config=CONFIG)
    assert loaded.size == (32, 32)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    images, captions = small_images(2), ["a red circle", "a dog"]
    ours, wanted = (attnx.word_maps(m, images, captions, 3) for m in (loaded.model, model))
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one.maps, other.maps)
    if kind == "vqa":
        assert loaded.model.temp is None
        with pytest.raises(ValueError, match="matching head"):
            attnx.gradcam(loaded.model, images, captions, 3)
        with pytest.raises(ValueError, match="matching head"):
            loaded.model(images, torch.tensor([[2, 3]] * 2), torch.ones(2, 2, dtype=torch.bool))
    else:
        assert torch.equal(attnx.gradcam(loaded.model, images, captions, 3)[0].maps,
                           attnx.gradcam(model, images, captions, 3)[0].maps)  # fmt: skip


def test_safetensors_and_random_weights(tmp_path, vocab):
    model, path = small_albef(3), tmp_path / "albef.safetensors"
    save_file(model.state_dict(), path)
    loaded = load_albef(path, vocab, config=CONFIG).model
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert load_albef(None, vocab, (48, 32), CONFIG).size == (48, 32)


@pytest.mark.parametrize("size", [(48, 48), (24, 64)])
def test_positions_are_interpolated_as_the_original_does(size, tmp_path, vocab):
    model, path = small_albef(3), tmp_path / "ALBEF.pth"
    torch.save(published("retrieval", model), path)
    loaded = load_albef(path, vocab, size, CONFIG)
    assert loaded.size == size
    own = loaded.model.state_dict()["visual_encoder.pos_embed"]
    grid = size[0] // 8, size[1] // 8
    assert own.shape == (1, 1 + grid[0] * grid[1], 48)
    # Position embeddings that are resized at load or in the forward pass give the same result.
    images = small_images(1, size)
    torch.testing.assert_close(loaded.model.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-5)
    larger = replace(CONFIG, image_size=(48, 48))
    torch.save(small_albef(config=larger).state_dict(), path)
    assert load_albef(path, vocab, config=CONFIG).size == (48, 48)  # the checkpoint's own


def test_images_are_prepared_as_albefs(tmp_path, vocab):
    import numpy as np
    from PIL import Image

    loaded = load_albef(None, vocab, (32, 48), CONFIG)
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    resized = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    wanted = (resized - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    np.testing.assert_allclose(loaded.prepare(image).permute(1, 2, 0).numpy(), wanted, atol=1e-5)


def wrong_checkpoint(name, model):
    state = published("refcoco", model)
    if name == "another model":
        import timm

        return timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    if name == "a missing layer":
        del state["text_encoder.encoder.layer.3.crossattention.self.query.weight"]
    elif name == "a stranger":
        state["text_encoder.pooler.dense.weight"] = torch.ones(2)
    elif name == "another shape":
        state["itm_head.weight"] = torch.ones(3, 32)
    elif name == "positions":
        state["visual_encoder.pos_embed"] = torch.ones(1, 14, 48)
    return state


WRONG = {
    "another model": "doesn't fit ALBEF: .*missing: visual_encoder.*unexpected: .*blocks.0",
    "a missing layer": "1 missing: text_encoder.encoder.layer.3.crossattention.self.query.weight$",
    "a stranger": "1 unexpected: text_encoder.pooler.dense.weight$",
    "another shape": r"1 of another shape: itm_head.weight \[3, 32\] for \[2, 32\]$",
    "positions": r"of another shape: visual_encoder.pos_embed \[1, 14, 48\] for",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_does_not_fit_is_named(name, tmp_path, vocab):
    path = tmp_path / "ALBEF.pth"
    torch.save(wrong_checkpoint(name, small_albef()), path)
    with pytest.raises(ValueError, match=WRONG[name]):
        load_albef(path, vocab, config=CONFIG)


class Hostile:
    def __reduce__(self):
        return print, ("ran",)


def test_a_checkpoint_runs_no_code(tmp_path, vocab, capsys):
    path = tmp_path / "ALBEF.pth"
    torch.save({"model": {"x": Hostile()}}, path)
    with pytest.raises(ValueError, match="expected a torch file of weights only"):
        load_albef(path, vocab, config=CONFIG)
    assert not capsys.readouterr().out


def test_files_that_are_not_there_and_sizes_that_do_not_fit(tmp_path, vocab):
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file"):
        load_albef(tmp_path / "none.pth", vocab)
    with pytest.raises(FileNotFoundError, match="vocab: expected a file"):
        load_albef(None, tmp_path / "none.txt", config=CONFIG)
    with pytest.raises(ValueError, match="image size: expected multiples of the patch of 8; got 30x32"):
        load_albef(None, vocab, (30, 32), CONFIG)
    vocab.write_text("a\nb\n")
    with pytest.raises(ValueError, match=re.escape("[PAD], [UNK], [CLS], [SEP], [MASK] not among them")):
        load_albef(None, vocab, config=CONFIG)


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A Man, riding: (two) Horses!", "a man riding two horses"),
        ("T-shirt / trousers", "t shirt trousers"),
        ('it\'s  a   "dog"\n', "its a dog"),
        ("the <person> waits", "the person waits"),
        ("two\nlines", "two lines"),
    ],
)
def test_albefs_caption_rules(caption, wanted):
    assert pre_caption(caption) == wanted
    assert pre_caption(caption, 2) == " ".join(wanted.split()[:2])


def test_tokens_are_those_of_transformers_bert_tokenizer(bert_data):
    from transformers import BertTokenizer

    path = bert_data / "bert-base-uncased-vocab.txt"
    ours, berts = Tokenizer(path), BertTokenizer(str(path))
    captions = [json.loads(line)["caption"] for line in (bert_data / "captions.jsonl").read_text().splitlines()]
    assert len(captions) > 40
    for caption in captions:
        read = ours(caption)
        assert list(read.ids) == berts(read.text)["input_ids"]
        assert " ".join(read.words) == read.text


def test_the_hubs_vocabulary(tmp_path, vocab, monkeypatch):
    from transformers import BertTokenizer

    from attnx.models import tokenizer as words

    BertTokenizer(str(vocab)).save_pretrained(tmp_path / "hub")
    monkeypatch.setattr(words, "HUB", str(tmp_path / "hub"))
    hubs, ours = Tokenizer(), Tokenizer(vocab)
    assert hubs.size == ours.size == len(VOCAB)
    assert hubs("The man skateboarding") == ours("The man skateboarding")
    monkeypatch.setattr(words, "HUB", "no such name/at/all")
    with pytest.raises(ConnectionError, match=r"vocabulary of .* could not be downloaded.*vocab='vocab.txt'"):
        Tokenizer()


def test_files_names_may_be_text_and_one_number_is_a_square(tmp_path, vocab):
    model, path = small_albef(3), tmp_path / "ALBEF.pth"
    torch.save(published("retrieval", model), path)
    loaded = load_albef(str(path), vocab=str(vocab), config=CONFIG)
    assert loaded.name == load_albef(path, vocab, config=CONFIG).name == f"albef:{path}"
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items())
    assert load_albef(str(path), str(vocab), 48, CONFIG).size == (48, 48)
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file"):
        load_albef(str(tmp_path / "none.pth"), vocab)
    for size in (0, "48", (48,), 48.0):
        with pytest.raises(ValueError, match="image size: expected a positive int"):
            load_albef(None, vocab, size, CONFIG)
    with pytest.raises(ValueError, match="image size: expected multiples of the patch of 8; got 30x30"):
        load_albef(None, vocab, 30, CONFIG)


def test_words_that_are_not_in_the_vocabulary_are_named():
    tokenizer = Tokenizer(VOCAB, CONFIG.max_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer("The man skateboarding on a red circle")
    with pytest.warns(UserWarning, match="caption") as told:
        read = tokenizer("a zebra left of the Gnu, the zebra")
    assert [str(one.message) for one in told] == ["caption: 3 of 8 words are not in the vocabulary: zebra, gnu"]
    assert read.unknown == ("zebra", "gnu")
    assert read.tokens.count("[UNK]") == 3
    with pytest.warns(
        UserWarning,
        match=r"2 of 2 words .*: zebra, gnu; the vocabulary has none of the words, so the maps are meaningless$",
    ):
        tokenizer("zebra gnu")
    with pytest.warns(UserWarning, match=r"15 of 15 words .*: w0, .*, w9 and 5 more; the vocabulary has none"):
        tokenizer(" ".join(f"w{i}" for i in range(15)))
    with pytest.warns(UserWarning, match="caption") as told:
        tokenizer("zebra\nz\x1b[2Jgnu\u200b dog")
    assert all(c.isprintable() for c in str(told[0].message))


def test_words_that_are_cut_are_not_named_as_unknown():
    with pytest.warns(UserWarning, match="caption") as told:
        Tokenizer(VOCAB, 6)("a red zebra dog gnu")
    assert "cut before word 5 of 5" in str(told[0].message)
    assert str(told[1].message) == "caption: 1 of 4 words is not in the vocabulary: zebra"
