"""attnx words: pictures, arrays and shards of captions, messages and exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import fails, run

import attnx
from attnx.demo import albef as pair
from attnx.figures.sheets import captioned
from attnx.images import read_image

CAPTION = "a red circle left of a blue square"
DEMO = ["--model", "demo", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 80)), ("b.jpg", (90, 50))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of the demo's sizes, in the format of pretraining checkpoints."""
    torch.manual_seed(3)
    path = tmp_path / "pair.pth"
    torch.save({"model": pair.demo_albef(pretrained=False).state_dict(), "epoch": 3}, path)
    return path


def write_pairs(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def pairs_of(*captions: tuple[str, str]) -> list[dict[str, str]]:
    return [{"image": image, "caption": caption} for image, caption in captions]


def expected(
    weights: Path, image: Path, caption: str, layer: int = 2, cam: bool = False, **options: str
) -> torch.Tensor:
    loaded = pair.load_demo_albef(weights)
    images = loaded.prepare(read_image(image))[None]
    find = attnx.gradcam if cam else attnx.word_maps
    return find(loaded.model, images, [caption], layer, **options)[0].maps


@pytest.mark.parametrize(
    ("flags", "options"), [([], {}), (["--layer", 3, "--heads", "max"], {"layer": 3, "heads": "max"})]
)
def test_pictures_and_arrays_of_a_caption(photos: Path, weights: Path, tmp_path: Path, flags, options) -> None:
    out = tmp_path / "out"
    result = run("words", photos / "a.png", "A red <b>circle</b>,\nof $x^2$", "--checkpoint", weights, *DEMO, *flags,
                 "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    words = ["a", "red", "<b>circle<", "b>", "of", "$x^2$"]
    names = ["00-a.png", "01-red.png", "02-b_circle.png", "03-b.png", "04-of.png", "05-x_2.png"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "words.npz", "words.png"]
    assert all(str(out / name) in result.output for name in names)
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.size == (80, 60)
    with np.load(out / "words.npz") as arrays:  # allow_pickle is False
        assert arrays["words"].tolist() == words
        assert str(arrays["caption"]) == " ".join(words)
        want = expected(weights, photos / "a.png", "a red <b>circle</b> of $x^2$", **options)
        np.testing.assert_allclose(arrays["token_maps"], want, rtol=1e-5, atol=1e-7)
        word_of = arrays["word_of"]
        for w in range(len(words)):
            np.testing.assert_allclose(arrays["maps"][w], want[word_of == w].mean(0), rtol=1e-5, atol=1e-7)
        assert len(arrays["tokens"]) == len(want) == len(word_of)
        assert np.isnan(arrays["score"])
    assert "match" not in result.output


def test_gradcam_has_a_score(photos: Path, weights: Path, tmp_path: Path) -> None:
    args = [
        "words",
        photos / "b.jpg",
        CAPTION,
        "--checkpoint",
        weights,
        *DEMO,
        "--method",
        "gradcam",
        "--out",
        tmp_path,
    ]
    result = run(*args)
    assert result.exit_code == 0
    with np.load(tmp_path / "words.npz") as arrays:
        assert f'match {arrays["score"]:+.2f}: "{CAPTION}"' in result.output
        want = expected(weights, photos / "b.jpg", CAPTION, cam=True)
        np.testing.assert_allclose(arrays["token_maps"], want, rtol=1e-4, atol=1e-6 * float(want.max()))
        assert np.isfinite(arrays["score"])


def test_a_file_of_pairs(photos: Path, weights: Path, tmp_path: Path) -> None:
    lines = pairs_of(("a.png", CAPTION), ("a.png", "a star"), ("b.jpg", "Two stars!"), ("a.png", "a green star"))
    pairs, out = write_pairs(photos / "pairs.jsonl", *lines), tmp_path / "out"
    result = run(
        "words", "--pairs", pairs, "--checkpoint", weights, *DEMO, "--out", out, "--batch-size", 3, "--pictures"
    )
    assert result.exit_code == 0, result.output
    assert "maps of 4 pairs in" in result.output
    rows = list(attnx.open(out))
    assert [row.key for row in rows] == ["a.png#0", "a.png#1", "b.jpg#2", "a.png#3"]
    assert [row.text for row in rows] == [line["caption"] for line in lines]
    for row in rows:
        want = expected(weights, photos / row.key.partition("#")[0], row.text)
        np.testing.assert_allclose(row.map, want, rtol=2e-3, atol=1e-6)
        assert row.tokens[0] == "[CLS]"
        assert row.tokens[-1] == "[SEP]"
        assert len(row.tokens) == len(row.map) == len(row.word_of)
        assert row.word_of[0] is None
        assert row.word_of[1] == 0
        assert (row.score, row.error) == (None, None)
    assert (rows[2].width, rows[2].height) == (50, 90)
    settings = attnx.open(out).settings
    assert (settings["method"], settings["layer"], settings["model"]) == ("attention", 2, "demo")
    names = ["a-red-circle-left-of-a-blue-square", "a-star", "two-stars", "a-green-star"]
    pictures = out / "pictures"
    assert sorted(p.name for p in pictures.iterdir()) == [f"{i:06d}-{name}.png" for i, name in enumerate(names)]
    # A picture of the former name is kept.
    (pictures / "000001-a-star.png").rename(pictures / "000001.png")
    assert run("words", "--pairs", pairs, "--checkpoint", weights, *DEMO, "--out", out, "--pictures").exit_code == 0
    assert not (pictures / "000001-a-star.png").exists()
    assert len(list(pictures.iterdir())) == 4


def test_pairs_are_rows_of_plain_parquet(photos: Path, weights: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pairs, out = write_pairs(photos / "pairs.jsonl", *pairs_of(("a.png", CAPTION), ("b.jpg", ""))), tmp_path / "out"
    args = ["words", "--pairs", pairs, "--checkpoint", weights, *DEMO, "--method", "gradcam", "--out", out]
    result = run(*args)
    assert result.exit_code == 1
    table = pq.read_table(out / "part-00000.parquet")
    names = ["key", "text", "map", "shape", "scale", "width", "height", "crop", "error", "tokens", "word_of", "score"]
    assert table.column_names == [*names, "cut", "words"]
    assert table["words"].to_pandas().iloc[0].tolist() == CAPTION.split()
    good, bad = table.to_pylist()
    assert good["words"] == CAPTION.split()
    assert bad["words"] is None
    score = f"{good['score']:+.2f}"
    assert f", match: mean {score}, min {score}, max {score};" in result.output.replace(", 1 pairs", ";")
    assert good["tokens"][:3] == ["[CLS]", "a", "red"]
    assert np.isfinite(good["score"])
    assert len(good["map"]) == np.prod(good["shape"])
    told, crop = "caption: expected words; got ''", [0, 0, 50, 90]
    assert [bad[name] for name in names] == ["b.jpg#1", "", None, None, None, 50, 90, crop, told, None, None, None]


def test_an_image_is_encoded_once_for_all_its_captions(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch
) -> None:
    from attnx.models.albef import Albef

    seen: list[int] = []
    encode = Albef.encode_image
    monkeypatch.setattr(Albef, "encode_image", lambda self, images: seen.append(len(images)) or encode(self, images))
    captions = [("a.png", f"a {color} star") for color in ("red", "blue", "green", "red", "blue")]
    pairs = write_pairs(photos / "pairs.jsonl", *pairs_of(*captions, ("b.jpg", "a star")))
    args = ["words", "--pairs", pairs, "--checkpoint", weights, *DEMO, "--out", tmp_path / "out", "--batch-size", 2]
    assert run(*args).exit_code == 0
    assert seen == [1, 1]


def test_what_is_wrong_with_a_pair_is_its_row(photos: Path, weights: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    long = "red " * 40
    lines = [
        {"image": "a.png", "caption": "a star"},
        {"image": "a.png"},
        {"image": "a.png", "caption": ""},
        {"image": "a.png", "caption": " ?! "},
        {"image": "a.png", "caption": 7},
        {"caption": "nobody's"},
        "no json",
        "",
        ["a.png", "a star"],
        {"image": "broken.png", "caption": "a star"},
        {"image": "gone.png", "caption": "a star"},
        {"image": "b.jpg", "caption": long},
        {"image": "b.jpg", "caption": "<script>alert('a')</script>\n[SEP] a\tstar\0"},
        '{"image": "b.jpg", "caption": "a \\ud800 star"}',
        {"image": "b.jpg", "caption": "a star", "id": 12},
        {"image": "b.jpg", "caption": "=" * 600},
    ]
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", *lines), tmp_path / "out"
    result = run("words", "--pairs", pairs, "--root", photos, "--checkpoint", weights, *DEMO, "--out", out)
    assert result.exit_code == 1, result.output
    rows = list(attnx.open(out))
    told = [row.error for row in rows]
    good = [0, 10, 11, 13]
    assert [i for i, error in enumerate(told) if error is None] == good
    wanted = [
        (1, "expected text", "none"), (2, "expected words", "''"), (3, "expected words", "?!"), (4, "line 5", "7"),
        (5, "line 6", "nobody"), (6, "line 7", "Expecting value"), (7, "line 9", "a.png"), (8, "broken.png", "image"),
        (9, "gone.png", "No such file"), (12, "valid Unicode", "ud800"), (14, "first word", "==="),
    ]  # fmt: skip
    for i, *parts in wanted:
        assert parts
        assert all(part in told[i] for part in parts), told[i]
    assert rows[5].key == "line 6"
    assert rows[10].text == long
    assert len(rows[10].tokens) == pair.MAX_TOKENS
    assert "1 captions were cut: they are longer than the model's limit" in result.output
    unknown = sum("[UNK]" in (row.tokens or ()) for row in rows)
    assert unknown > 0
    assert f", {unknown} captions have words that are not in the vocabulary" in result.output
    assert "11 pairs have an error" in result.output
    assert rows[11].tokens.count("[SEP]") == 1  # markup is text


def test_a_caption_that_is_cut_is_said(photos: Path, weights: Path, tmp_path: Path) -> None:
    result = run("words", photos / "a.png", "red " * 40, "--checkpoint", weights, *DEMO, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "attnx: caption: 42 tokens, and the model takes 32: cut before word 31 of 40" in result.stderr
    with np.load(tmp_path / "out" / "words.npz") as arrays:
        assert len(arrays["words"]) == 30


def test_vl_dinos_pass_and_size(photos: Path, weights: Path, tmp_path: Path) -> None:
    args = [
        "words",
        photos / "a.png",
        CAPTION,
        "--checkpoint",
        weights,
        *DEMO,
        "--preset",
        "vl-dino",
        "--out",
        tmp_path,
    ]
    assert run(*args).exit_code == 0
    from attnx.images import to_tensor

    model = pair.load_demo_albef(weights).model
    images = to_tensor(read_image(photos / "a.png"), (96, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]
    want = attnx.word_maps(model, images, [CAPTION], 2, preset="vl-dino")[0].maps
    with np.load(tmp_path / "words.npz") as arrays:
        np.testing.assert_allclose(arrays["token_maps"], want, rtol=1e-5, atol=1e-7)


def test_the_published_sizes(photos: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(pair.VOCAB))
    args = [
        "words",
        photos / "a.png",
        CAPTION,
        "--no-pretrained",
        "--vocab",
        vocab,
        "--image-size",
        "32x48",
        "--device",
        "cpu",
    ]
    assert run(*args, "--out", tmp_path / "out").exit_code == 0
    with np.load(tmp_path / "out" / "words.npz") as arrays:
        assert arrays["maps"].shape == (8, 2, 3)
    assert "one of 6, 7, 8, 9, 10, 11; got 5" in fails(*args, "--layer", 5)


def test_other_sizes_and_dtypes(photos: Path, weights: Path, tmp_path: Path) -> None:
    for method in ("attention", "gradcam"):
        args = ["words", photos / "a.png", CAPTION, "--checkpoint", weights, *DEMO, "--method", method]
        flags = ["--image-size", "64x80", "--dtype", "bfloat16", "--out", tmp_path / method]
        assert run(*args, *flags).exit_code == 0
        with np.load(tmp_path / method / "words.npz") as arrays:
            assert arrays["maps"].shape == (8, 8, 10)
            assert arrays["maps"].dtype == np.float32


def test_mistakes_are_told_before_work(photos: Path, weights: Path, tmp_path: Path) -> None:
    image, out = photos / "a.png", ["--out", tmp_path / "out"]
    demo = [*DEMO, "--checkpoint", weights, *out]
    assert 'expected IMAGE "CAPTION", or --pairs FILE; got neither' in fails("words", *demo)
    assert "got IMAGE" in fails("words", image, *demo)
    pairs = write_pairs(tmp_path / "p.jsonl", *pairs_of(("a.png", "a star")))
    assert "got IMAGE and CAPTION and --pairs" in fails("words", image, "a star", "--pairs", pairs, *demo)
    assert "caption: expected words; got '...'" in fails("words", image, "...", *demo)
    assert "gone.png" in fails("words", photos / "gone.png", "a star", *demo)
    assert "one of 2, 3; got 1" in fails("words", image, "a star", *demo, "--layer", 1)
    assert "expected attention or gradcam; got 'cam'" in fails("words", image, "a star", *demo, "--method", "cam")
    assert "expected mean, max or min; got 'each'" in fails("words", image, "a star", *demo, "--heads", "each")
    assert "expected vl-dino; got 'dino'" in fails("words", image, "a star", *demo, "--preset", "dino")
    assert "expected heads mean" in fails("words", image, "a star", *demo, "--method", "gradcam", "--heads", "max")
    assert "expected albef, lavt or demo; got 'blip'" in fails("words", image, "a star", "--model", "blip", *out)
    assert "expected ALBEF's weights" in fails("words", image, "a star", *out)
    assert "multiples of the patch of 8; got 90x90" in fails("words", image, "a star", *demo, "--image-size", 90)
    assert "expected pixels such as 480" in fails("words", image, "a star", *demo, "--image-size", "big")
    assert "expected one of float32" in fails("words", image, "a star", *demo, "--dtype", "int8")
    assert "gone.txt is none" in fails(
        "words", image, "a star", "--no-pretrained", "--vocab", tmp_path / "gone.txt", *out
    )
    other = tmp_path / "other.pth"
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}}, other)
    told = fails("words", image, "a star", *DEMO, "--checkpoint", other, *out)
    assert "doesn't fit ALBEF" in told
    assert "blocks.0.attn.qkv.weight" in told
    assert "gone.jsonl, which does not exist" in fails("words", "--pairs", tmp_path / "gone.jsonl", *demo)
    assert "is a folder of images" in fails("words", "--pairs", photos, *demo)
    empty = write_pairs(tmp_path / "empty.jsonl", "", "")
    assert "expected at least one row" in fails("words", "--pairs", empty, *demo)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "in UTF-8" in fails("words", "--pairs", binary, *demo)
    assert not (tmp_path / "out").exists()


def test_a_job_leaves_anothers_shards_alone(photos: Path, weights: Path, tmp_path: Path) -> None:
    pairs, out = write_pairs(photos / "p.jsonl", *pairs_of(("a.png", "a star"))), tmp_path / "out"
    args = ["words", "--pairs", pairs, "--checkpoint", weights, *DEMO, "--out", out]
    assert run(*args).exit_code == 0
    assert "1 rows from earlier runs" in run(*args).output
    told = fails(*args, "--layer", 3)
    assert "holds a job with other settings. layer: 2 in the job, 3 now" in told
    assert len(list(attnx.open(out))) == 1


def test_the_caption_is_set_as_it_is() -> None:
    white = Image.new("RGB", (300, 10), "white")
    for text in ("$x^2$", "[bold]a[/bold]", "a <b>b</b>", "word " * 60, "w" * 200):
        picture = np.asarray(captioned(white, text))
        inked = (picture < 128).any((1, 2))
        assert inked.any(), text
        assert picture.shape[1] == 300
        assert (picture[:, [0, -1]] == 255).all()  # no text extends beyond the picture
    assert captioned(white, "a\n\nb\tc").size == captioned(white, "a b c").size
    assert captioned(white, "word " * 60).height > 2 * captioned(white, "word").height
    assert not np.array_equal(captioned(white, "$x^2$"), captioned(white, "x2"))


def test_words_that_are_not_in_the_vocabulary_are_said(photos: Path, weights: Path, tmp_path: Path) -> None:
    args = ("--checkpoint", weights, *DEMO, "--out")
    result = run("words", photos / "a.png", "a red zebra", *args, tmp_path / "one")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if "vocabulary" in line] == [
        "attnx: caption: 1 of 3 words is not in the vocabulary: zebra"
    ]
    result = run("words", photos / "a.png", "zebra gnu", *args, tmp_path / "two")
    told = "2 of 2 words are not in the vocabulary: zebra, gnu; the vocabulary has none of the words, so the maps are"
    assert f"{told} meaningless\n" in result.stderr
    # The rows of a job say so.
    pairs = write_pairs(photos / "pairs.jsonl", *pairs_of(("a.png", "a red zebra"), ("b.jpg", "gnu")))
    result = run("words", "--pairs", pairs, "--pictures", *args, tmp_path / "job")
    assert result.exit_code == 0
    assert "in the vocabulary:" not in result.stderr
    assert "2 captions have words that are not in the vocabulary" in result.output
    assert "UserWarning" not in result.stderr
    assert [row.tokens.count("[UNK]") for row in attnx.open(str(tmp_path / "job"))] == [1, 1]
