"""attnx extract: its messages, resuming, refusals and records."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_job import draw, files, shards
from test_cli import RANDOM, fails, run

import attnx
from attnx.images import read_image

CPU = ["--device", "cpu", "--method", "cls"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw(tmp_path / "photos", 10, broken=(3,))


def test_a_dry_run_tells_and_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    result = run("extract", photos, "--out", tmp_path / "out", *CPU, "--dry-run", "--batch-size", 2, "--shard-size", 3)
    assert result.exit_code == 0, result.output
    assert "10 images in 4 shards of 3; about " in result.output
    assert " minutes at " in result.output
    assert "from the first 10. Nothing was written." in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", ["x", "200%,5%", "0.5,0.5"])
def test_a_wrong_token_is_told_before_the_model_is_loaded(
    token: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnx.jobs.recipe.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert "--token: expected" in fails("extract", photos, "--out", tmp_path / "out", "--token", token)


def test_run_again_it_goes_on(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("extract", photos, "--out", out, *CPU, "--shard-size", 3)
    assert first.exit_code == 1
    assert "maps of 9 images in" in first.output
    assert "1 images have an error: see the error column" in first.output
    assert "waiting for images" in first.output
    before = files(out)
    (out / "part-00001.parquet").unlink()
    again = run("extract", photos, "--out", out, *CPU)
    assert "7 rows from earlier runs" in again.output
    assert files(out) == before
    told = fails("extract", photos, "--out", out, *CPU, "--map-dtype", "uint8", "--dtype", "bfloat16")
    assert "dtype: 'float32' in the job, 'bfloat16' now; map_dtype: 'float16' in the job, 'uint8' now" in told
    draw(photos, 10)
    third = run("extract", photos, "--out", out, *CPU, "--retry-failed")
    assert third.exit_code == 0, third.output
    assert "maps of 10 images in" in third.output
    assert shards(out).keys() == {f"part-{i:05d}.parquet" for i in range(4)}


def test_timms_pixels_unless_others_are_asked_for(tmp_path: Path) -> None:
    """The crop that the pixels show is recorded, too."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (300, 420, 3), dtype=np.uint8)).save(folder / "a.png")
    model = ["--model", RANDOM[1], "--no-pretrained", *CPU]
    assert run("extract", folder, *model, "--out", tmp_path / "timm").exit_code == 0
    assert run("extract", folder, *model, "--out", tmp_path / "whole", "--pixels", "whole").exit_code == 0
    torch.manual_seed(0)
    net = timm.create_model(RANDOM[1].partition(":")[2], pretrained=False).eval()
    config = resolve_model_data_config(net)
    images = create_transform(**config, is_training=False)(read_image(folder / "a.png"))[None]
    with torch.no_grad(), attnx.capture(net, layers=-1, rows=[0]) as trace:
        net(images)
    row = attnx.open(tmp_path / "timm")[0]
    want = attnx.cls_map(trace)[0].numpy()
    np.testing.assert_allclose(row.map, want, rtol=1e-3, atol=1e-3 * want.max())
    # 224 pixels of 347 x 248.
    want_crop = (62 * 420 / 347, 12 * 300 / 248, 286 * 420 / 347, 236 * 300 / 248)
    assert row.crop == pytest.approx(want_crop, rel=1e-5)
    assert attnx.open(tmp_path / "whole")[0].crop == (0, 0, 420, 300)
    kinds = [attnx.open(tmp_path / kind).settings["pixels"]["kind"] for kind in ("timm", "whole")]
    assert kinds == ["timm", "whole"]
    assert "processor is for hf: models" in fails(
        "extract", folder, *model, "--out", tmp_path / "x", "--pixels", "processor"
    )


def test_tables_tars_and_data_sets_end_in_the_same_maps(photos: Path, tmp_path: Path) -> None:
    (photos / "003.jpg").unlink()
    names = sorted(path.name for path in photos.iterdir())
    lines = [json.dumps({"path": f"photos/{name}", "key": name, "caption": f"<i>{name}</i>"}) for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "list.csv").write_text("path,key\n" + "".join(f"photos/{name},{name}\n" for name in names))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = (photos / name).stat().st_size
            tar.addfile(member, io.BytesIO((photos / name).read_bytes()))
    sources = {
        "folder": photos,
        "jsonl": tmp_path / "list.jsonl",
        "csv": tmp_path / "list.csv",
        "tar": tmp_path / "all.tar",
    }
    found = {}
    for kind, source in sources.items():
        result = run("extract", source, "--out", tmp_path / "out" / kind, *CPU)
        assert result.exit_code == 0, result.output
        found[kind] = list(attnx.open(tmp_path / "out" / kind))
    want = np.stack([row.map for row in found["folder"]])
    for kind, rows in found.items():
        assert [row.key.rpartition("/")[2].removesuffix(".jpg") for row in rows] == [
            n.removesuffix(".jpg") for n in names
        ]
        assert np.array_equal(np.stack([row.map for row in rows]), want), kind
    assert found["jsonl"][0].text == "<i>000.jpg</i>"


def test_what_is_no_job_is_said_in_one_line(photos: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out", *CPU]
    twice, nowhere = tmp_path / "twice.csv", tmp_path / "nowhere.csv"
    twice.write_text("path,key\nphotos/000.jpg,a\nphotos/001.jpg,b\nphotos/002.jpg,a\n")
    nowhere.write_text("path\ngone/000.jpg\ngone/001.jpg\n")
    assert "expected every key once; 'a' is in rows 0, 2" in fails("extract", twice, *out)
    assert "none of the first 2 paths of" in fails("extract", nowhere, *out)
    assert "set --root to their folder" in fails("extract", nowhere, *out)
    assert "which does not exist" in fails("extract", tmp_path / "gone", *out)
    assert "expected one of local, ranks, ray; got 'slurm'" in fails("extract", photos, *out, "--engine", "slurm")
    assert "expected --rank and --world, or in the environment" in fails("extract", photos, *out, "--engine", "ranks")
    assert "only for --engine ranks; got --engine local" in fails("extract", photos, *out, "--rank", 0, "--world", 2)
    assert "only for --engine ray; got --engine local" in fails("extract", photos, *out, "--actors", 2)
    several = ["--device", "cpu,cpu", "--engine", "ray"]
    assert "several devices only for --engine local" in fails("extract", photos, *out, *several)
    assert "expected cpu or cuda:N of " in fails("extract", photos, *out, "--device", "cpu,tpu")
    assert "store: expected one of map, rows, full; got 'all'" in fails("extract", photos, *out, "--store", "all")
    assert "only for --store map; got --store rows" in fails("extract", photos, *out, "--store", "rows")
    assert "map-dtype: expected one of float16, float32, uint8" in fails("extract", photos, *out, "--map-dtype", "int8")
    assert "pixels: expected timm, whole or processor" in fails("extract", photos, *out, "--pixels", "crop")
    assert "root: only for tables" in fails("extract", photos, *out, "--root", tmp_path)
    assert "shard-size: expected at least 1, got 0" in fails("extract", photos, *out, "--shard-size", 0)
    assert "decode-timeout: expected seconds above 0" in fails("extract", photos, *out, "--decode-timeout", 0)
    assert not (tmp_path / "out" / "run.json").exists()


def test_ray_that_is_not_there_is_said(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = fails("extract", photos, "--out", tmp_path / "out", "--engine", "ray")
    assert "expected ray, which is not installed; pip install 'attnx[ray]'" in told


def test_a_bomb_is_a_row(photos: Path, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(photos / "bomb.png")
    result = run("extract", photos, "--out", tmp_path / "out", *CPU, "--retry-failed")
    assert result.exit_code == 1
    row = attnx.open(tmp_path / "out")["bomb.png"]
    assert "expected at most 178,956,970 pixels, got 20000 x 20000" in (row.error or "")
