"""attnx probe and attnx compare: the values of each head, the tables and figures, resuming, targets and refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from small_job import draw, shards
from test_cli import fails, run

import attnx
from attnx.demo.vit import demo_model
from attnx.images import read_image
from attnx.jobs.probe_summary import QUANTILES, head_table
from attnx.jobs.reader import Maps
from attnx.models.loading import load_model

CPU = ["--device", "cpu", "--model", "demo"]
STATS = ["entropy", "distance", "max", "mass"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("in") / "photos", 10, broken=(3,))


@pytest.fixture(scope="module")
def labels(photos: Path) -> Path:
    """Targets of all images but the first and the last."""
    path = photos.parent / "labels.csv"
    rows = "".join(f"{'./' * (i == 2)}{i:03d}.jpg,{i % 3}\n" for i in range(1, 9)) + "other.jpg,1\n"
    path.write_text(f"key,target\n{rows}")
    return path


@pytest.fixture(scope="module")
def probed(photos: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job with targets."""
    out = tmp_path_factory.mktemp("job") / "out"
    result = run("probe", photos, "--out", out, *CPU, "--targets", labels, "--shard-size", 4, "--batch-size", 3)
    assert result.exit_code == 1
    assert "statistics of 7 images in" in result.output
    assert "1 keys of --targets are of no image, such as 'other.jpg'" in result.output
    return out


def test_the_values_of_each_head_are_those_of_a_capture(photos: Path, probed: Path) -> None:
    rows = list(attnx.open(probed))
    errors = {row.key: row.error for row in rows if row.error is not None}
    assert set(errors) == {"000.jpg", "003.jpg", "009.jpg"}
    assert errors["000.jpg"] == errors["009.jpg"] == "target: expected one in the file of --targets; got none"
    model, loaded = demo_model(), load_model("demo")
    for row in rows:
        if row.error is not None:
            assert row.entropy is row.importance is None
            continue
        x = loaded.prepare(read_image(photos / row.key))[None]
        with attnx.capture(model, heads="each", grad="signed") as trace:
            loss = F.cross_entropy(model(x), torch.tensor([int(row.key[:3]) % 3]))
        trace.backward(loss)
        importance = torch.cat([trace[layer].abs().sum(-1).mean(-1) for layer in trace], 1)
        with torch.no_grad(), attnx.capture(model, heads="each", backend="eager") as trace:
            model(x)
        exact = {
            "entropy": attnx.row_entropy(trace).flatten(),
            "distance": attnx.mean_attention_distance(trace).flatten(),
            "max": torch.cat([trace[layer].amax(-1).mean(-1) for layer in trace], 1),
            "mass": torch.cat([trace[layer][..., 0].mean(-1) for layer in trace], 1),
            "importance": importance,
        }
        for name, values in exact.items():
            ours = getattr(row, name)
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, values.flatten().numpy(), rtol=2e-4, atol=1e-7)
    about = {"heads": 6, "queries": 145, "keys": 145, "prefix": 1, "grid": [12, 12], "patch_size": 8}
    assert Maps(probed).settings["layers"] == {f"blocks.{i}.attn": about for i in range(4)}
    assert Maps(probed).settings["uniform"]["entropy"] == pytest.approx([np.log(145)] * 4)
    assert rows[1].map is None


def test_tables_have_the_mean_deviation_and_quantiles_in_float64(probed: Path) -> None:
    rows = [row for row in attnx.open(probed) if row.error is None]
    with (probed / "probe" / "heads.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [tuple(row.items()) for row in pq.read_table(probed / "probe" / "heads.parquet").to_pylist()] == [
        tuple((name, type_of(name)(value)) for name, value in row.items()) for row in table
    ]
    assert len(table) == 5 * 4 * 6
    for row in table:
        values = np.array([getattr(each, row["stat"]) for each in rows], np.float64)
        values = values[:, int(row["depth"]) * 6 + int(row["head"])]
        assert row["layer"] == f"blocks.{row['depth']}.attn"
        assert row["unit"] == {"entropy": "nats", "distance": "pixels", "importance": "of the score"}.get(
            row["stat"], "share"
        )
        assert int(row["images"]) == 7
        assert float(row["mean"]) == pytest.approx(values.mean(), rel=1e-12)
        assert float(row["std"]) == pytest.approx(values.std(), rel=1e-9)
        for name, share in QUANTILES.items():
            assert float(row[name]) == pytest.approx(np.quantile(values, share), rel=1e-12)


def type_of(column: str) -> type:
    return (
        str
        if column in ("model", "folder", "stat", "unit", "layer")
        else int
        if column in ("depth", "head", "images")
        else float
    )


def test_columns_and_figures(probed: Path) -> None:
    names = pq.read_schema(probed / "part-00000.parquet").names
    assert names == ["key", "text", "width", "height", "crop", "error", *STATS, "importance"]
    figures = {"distance", "entropy", "sinks", "importance", "heads"}
    assert {path.stem for path in (probed / "probe").glob("*.png")} == figures
    for path in (probed / "probe").glob("*.png"):
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.min() < 100 < picture.max()


def test_run_again_it_goes_on_with_the_same_bytes(photos: Path, labels: Path, probed: Path, tmp_path: Path) -> None:
    job = ["probe", photos, *CPU, "--targets", labels, "--batch-size", 3]
    before, figures = shards(probed), (probed / "probe" / "distance.png").read_bytes()
    (probed / "part-00001.parquet").unlink()
    assert "6 rows from earlier runs" in run(*job, "--out", probed).output
    assert shards(probed) == before
    assert (probed / "probe" / "distance.png").read_bytes() == figures
    for rank in (1, 0):
        engine = ["--engine", "ranks", "--rank", rank, "--world", 2, "--shard-size", 4]
        result = run(*job, "--out", tmp_path / "ranks", *engine)
        assert ("no tables yet, since 2 of 3 shards are missing" in result.output) == (rank == 1)
    assert shards(tmp_path / "ranks") == before
    assert (tmp_path / "ranks" / "probe" / "heads.csv").read_bytes() == (probed / "probe" / "heads.csv").read_bytes()
    told = fails(*job, "--out", probed, "--stat", "entropy")
    assert "holds a job with other settings. stats: ['entropy', 'distance'" in told


def test_summary_writes_the_tables_of_the_shards_that_exist(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("probe", photos, "--out", out, *CPU, "--shard-size", 4, "--stat", "entropy").exit_code == 1
    assert {path.name for path in (out / "probe").iterdir()} == {
        "heads.csv", "heads.parquet", "entropy.png", "heads.png",
    }  # fmt: skip
    (out / "part-00002.parquet").unlink()
    result = run("summary", out, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert pq.read_table(tmp_path / "report" / "heads.parquet")["images"].unique().to_pylist() == [7]
    with pytest.raises(ValueError, match=r"to_torch: expected a job with maps; .* has statistics of heads"):
        attnx.open(out).to_torch()


def test_many_images_are_read_in_blocks_of_heads(probed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = head_table(Maps(probed))
    monkeypatch.setattr("attnx.jobs.probe_summary._MOST_BYTES", 8 * 7 * 5)
    for name, columns in head_table(Maps(probed)).stats.items():
        for column, values in columns.items():
            assert np.array_equal(values, whole.stats[name][column])


def test_compare_overlays_models(photos: Path, probed: Path, tmp_path: Path) -> None:
    tiny = ["--model", "timm:vit_tiny_patch16_224", "--no-pretrained", "--image-size", 48, "--device", "cpu"]
    assert run("probe", photos, "--out", tmp_path / "tiny", *tiny, "--stat", "distance").exit_code == 1
    result = run("compare", probed, tmp_path / "tiny", "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "both" / "compare.parquet").to_pylist()
    distances = [row for row in rows if row["stat"] == "distance"]
    assert [row["model"] for row in distances] == ["demo"] * 24 + ["timm:vit_tiny_patch16_224"] * 36
    assert (
        (tmp_path / "both" / "compare.csv")
        .read_text()
        .startswith("model,folder,stat,unit,layer,depth,head,images,mean")
    )
    assert Image.open(tmp_path / "both" / "compare.png").size[0] > 300
    assert "folders: expected different folders; got" in fails("compare", probed, probed)
    other = draw(tmp_path / "other", 2)
    assert run("probe", other, "--out", tmp_path / "few", *CPU, "--stat", "distance").exit_code == 0
    for folder in ("few", "tiny"):
        result = run("compare", probed, tmp_path / folder, "--out", tmp_path / "differ")
        assert "the jobs have different images, so part of the differences may be theirs" in result.output
    models = {row["model"] for row in pq.read_table(tmp_path / "differ" / "compare.parquet").to_pylist()}
    assert models == {"demo", "timm:vit_tiny_patch16_224"}
    assert run("probe", other, "--out", tmp_path / "max", *CPU, "--stat", "max").exit_code == 0
    assert "expected jobs with a statistic in common; got" in fails("compare", tmp_path / "max", tmp_path / "few")
    assert "folders: expected two or more; got 1" in fails("compare", probed)
    maps = tmp_path / "maps"
    assert run("extract", other, "--out", maps, *CPU, "--method", "cls").exit_code == 0
    assert "expected the output of attnx probe" in fails("compare", maps, probed)


def test_layers_without_a_statistic_are_left_out_or_refused(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    photos = draw(tmp_path / "photos", 2)
    job = ["probe", photos, "--model", f"hf:{tmp_path / 'siglip'}", "--device", "cpu", "--pixels", "whole"]
    result = run(*job, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "is left out: it has no distances: expected patches of an image; got 1 query over 16 image" in result.output
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert [layer["heads"] for layer in settings["layers"].values()] == [3, 3]
    assert settings["stats"] == ["entropy", "distance", "max"]  # SigLIP has no prefix tokens
    assert [name for name in settings["left_out"] if "head" in name]
    told = fails(*job, "--out", tmp_path / "head", "--layer", "*head*", "--stat", "distance")
    assert "has no distances" in told
    assert "choose others by --stat or --layer" in told
    assert run(*job, "--out", tmp_path / "head", "--layer", "*head*").exit_code == 0
    assert attnx.open(tmp_path / "head").settings["stats"] == ["entropy", "max"]
    told = fails(*job, "--out", tmp_path / "targets", "--targets", labels_of(tmp_path, "key,target\n000.jpg,1\n"))
    assert "targets: expected a model that gives logits [1, classes]; got" in told


def labels_of(folder: Path, text: str) -> Path:
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na,1\n", "targets: expected the columns 'key' and 'target' in"),
        ("key, target\na,1\n", "got 'key', ' target'"),
        ("", "targets: expected the columns 'key' and 'target' in"),
        ("key,target\n", "targets: expected keys of images, such as '000.jpg'; got none"),
        ("key,target\nphotos/001.jpg,1\n", "targets: expected keys of images, such as '000.jpg'; got 'photos/001.jpg'"),
        ("key,target\n001.jpg,16\n", "targets: expected classes in 0..15; got 16 for '001.jpg'"),
        ("key,target\na.jpg,cat\n", "targets: expected the number of a class, from 0 on, in line 2 of"),
        ("key,target\na.jpg,-1\n", "labels.csv; got '-1'"),
        ("key,target\na.jpg\n", "labels.csv; got ''"),
        ("key,target\na.jpg,1\na.jpg,2\n", "targets: expected every key once; 'a.jpg' is repeated"),
        ("key,target\na.jpg,1,2\n", "targets: expected a key, and no more columns than names, in line 2"),
        ("key,target\n,1\n", "targets: expected a key, and no more columns than names, in line 2"),
    ],
)
def test_targets_that_can_not_be_read(text: str, message: str, photos: Path, tmp_path: Path) -> None:
    told = fails("probe", photos, "--out", tmp_path / "out", *CPU, "--targets", labels_of(tmp_path, text))
    assert message in told
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    job = ["probe", photos, "--out", tmp_path / "out", *CPU]
    assert "stats: expected names among entropy, distance, max, mass; got 'x'" in fails(*job, "--stat", "x")
    assert "patch-size: expected pixels above 0; got 0" in fails(*job, "--patch-size", 0)
    assert "targets: expected a CSV file; got" in fails(*job, "--targets", tmp_path / "missing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    assert "targets: expected a CSV file in UTF-8" in fails(*job, "--targets", tmp_path / "binary.csv")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_errors(tmp_path: Path) -> None:
    from attnx.jobs.columns import MapRow
    from attnx.jobs.packing import Format

    good = np.ones(3, np.float32)
    bad = np.array([1, np.nan, np.inf], np.float32)
    rows = [MapRow("a", entropy=good, max=good), MapRow("b", entropy=good, max=bad), MapRow("c", error="no image")]
    table = Format("float32", stats=("entropy", "max")).table(rows).to_pylist()
    assert [row["error"] for row in table] == [None, "the max is not finite in 2 of 3 heads", "no image"]
    assert [row["entropy"] for row in table] == [[1, 1, 1], None, None]


def test_an_estimate(photos: Path, tmp_path: Path) -> None:
    result = run("probe", photos, "--out", tmp_path / "out", *CPU, "--dry-run", "--batch-size", 2)
    assert "10 images in 1 shards of 1024" in result.output
    assert not (tmp_path / "out").exists()
