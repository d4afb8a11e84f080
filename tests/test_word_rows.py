"""Rows of `attnx words --pairs`: their words and the maps of the words; models by name and file."""

import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_cli import fails, run
from test_words_command import CAPTION, DEMO, pairs_of, photos, weights, write_pairs

import attnx
from attnx.demo import albef as pair
from attnx.figures.words import _pair_name
from attnx.images import read_image
from attnx.jobs.columns import MapRow
from attnx.jobs.rows import rows_of
from attnx.models.loading import default_layer, load_word_model, word_model

__all__ = ["photos", "weights"]


@pytest.fixture
def job(photos: Path, weights: Path, tmp_path: Path) -> Path:
    lines = pairs_of(("a.png", CAPTION), ("b.jpg", "A zebra, a star"), ("a.png", "?"))
    pairs = write_pairs(photos / "pairs.jsonl", *lines)
    done = run("words", "--pairs", pairs, "--checkpoint", weights, *DEMO, "--out", tmp_path / "job")
    assert done.exit_code == 1
    return tmp_path / "job"


def test_rows_have_the_words_and_their_maps(job: Path, photos: Path, weights: Path) -> None:
    rows = list(attnx.open(job))
    assert [row.words for row in rows] == [tuple(CAPTION.split()), ("a", "zebra", "a", "star"), None]
    loaded = pair.load_demo_albef(weights)
    for row, name in zip(rows[:2], ("a.png", "b.jpg"), strict=True):
        images = loaded.prepare(read_image(photos / name))[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            (want,) = attnx.word_maps(loaded.model, images, [row.text], 2)
        assert want.unknown == (("zebra",) if name == "b.jpg" else ())
        assert row.word_maps.dtype == np.float32
        np.testing.assert_allclose(row.word_maps, want.word_maps, rtol=2e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"a.png#2 has the error: caption: expected words"):
        _ = rows[2].word_maps
    with pytest.raises(ValueError, match=r"expected a row of attnx words; a.png has no words"):
        _ = MapRow("a.png", map=np.zeros((2, 2), np.float32)).word_maps
    with pytest.raises(ValueError, match=r"expected a row with a map; a.png has none"):
        _ = MapRow("a.png", words=("a",), word_of=(None, 0, None)).word_maps


def test_words_of_several_pieces(tmp_path: Path) -> None:
    row = MapRow(
        "a", map=np.arange(8, dtype=np.float16).reshape(4, 1, 2), words=("skateboard", "a"), word_of=(None, 0, 0, 1)
    )
    assert row.word_maps.tolist() == [[[3, 4]], [[6, 7]]]
    added = MapRow("a", map=row.map, words=row.words, word_of=row.word_of, sums_pieces=True)
    assert added.word_maps.tolist() == [[[6, 8]], [[6, 7]]]


def test_words_of_shards_without_the_column_are_joined(job: Path) -> None:
    table = pq.read_table(job / "part-00000.parquet").drop(["words"])
    rows = list(rows_of(table.to_batches()[0], job / "part-00000.parquet", {"stage": None}))
    assert [row.words for row in rows] == [tuple(CAPTION.split()), ("a", "[UNK]", "a", "star"), None]
    assert rows[0].sums_pieces
    index = table.column_names.index("tokens")
    pieces = [["[CLS]", "skate", "##board", ",", "a", "[SEP]"], None, None]
    table = table.set_column(index, "tokens", [pieces])
    owners = table.column_names.index("word_of")
    table = table.set_column(owners, "word_of", [[[None, 0, 0, 0, 1, None], None, None]])
    rows = list(rows_of(table.to_batches()[0], job / "part-00000.parquet", {}))
    assert [row.words for row in rows] == [("skateboard,", "a"), None, None]
    assert not rows[0].sums_pieces


def test_names_of_pictures() -> None:
    assert _pair_name(7, ("a", "red", "circle")) == "000007-a-red-circle.png"
    assert _pair_name(7, ("ein", "ñ", "b/c")) == "000007-ein-b_c.png"
    assert _pair_name(7, ("ñ",)) == "000007.png"
    assert _pair_name(7, ("a" * 29, "b" * 30, "c")) == f"000007-{'a' * 29}-{'b' * 30}.png"
    assert _pair_name(7, ("a" * 30, "b" * 30, "c")) == f"000007-{'a' * 30}.png"


def test_models_by_name_and_file(weights: Path, tmp_path: Path) -> None:
    assert word_model("albef:x.pth") == ("albef", "x.pth")
    assert word_model("lavt:a:b") == ("lavt", "a:b")
    assert word_model("albef:demo", weights) == ("demo", weights)
    assert word_model("demo:x") == ("demo:x", None)
    assert (default_layer("albef:demo"), default_layer("albef:x")) == (2, 8)
    ours, demo = load_word_model("albef:demo"), load_word_model("demo")
    assert ours.name == "demo"
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), demo.model.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match="expected a file"):
        load_word_model(f"albef:{tmp_path / 'gone.pth'}")
    with pytest.raises(ValueError, match="expected one; got albef:x and checkpoint='y'"):
        load_word_model("albef:x", checkpoint="y")
    with pytest.raises(ValueError, match=r"albef, lavt or demo; got 'demo:x'"):
        load_word_model("demo:x")


def test_a_file_in_the_models_name_is_the_same_job(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnx.models import albef_checkpoint

    # The demo's sizes in place of the published ones.
    load = albef_checkpoint.load_albef
    monkeypatch.setattr(
        albef_checkpoint, "load_albef", lambda file, vocab, size: load(file, pair.VOCAB, size, pair.demo_albef_config())
    )
    monkeypatch.chdir(tmp_path)
    pairs, out = write_pairs(photos / "p.jsonl", *pairs_of(("a.png", "a star"))), tmp_path / "out"
    args = ["words", "--pairs", pairs, "--device", "cpu", "--layer", 2, "--out", out]
    first = run(*args, "--model", "albef", "--checkpoint", weights.name)
    assert first.exit_code == 0, first.output
    again = run(*args, "--model", f"albef:{weights.name}")
    assert again.exit_code == 0, again.output
    assert "1 rows from earlier runs" in again.output
    assert f"model albef (weights of {weights})" in again.output
    (row,) = attnx.open(out)
    assert row.word_maps.shape == (2, 12, 12)
    told = fails(*args, "--model", f"albef:{weights.name}", "--checkpoint", weights)
    assert "checkpoint: expected one; got albef:pair.pth and --checkpoint" in told
