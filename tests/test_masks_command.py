"""attnx masks: sizes, values, resuming, refusals, and the same bytes from any number of processes."""

import json
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_job import draw, made_job
from test_cli import fails, run

import attnx
from attnx.images import ImageError, read_image, upright_size
from attnx.jobs.columns import MapRow
from attnx.jobs.mask_files import Masks
from attnx.jobs.mask_images import mask_image
from attnx.jobs.packing import Format
from attnx.jobs.reader import Maps
from attnx.jobs.shards import write_part

COUNT = 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = draw(tmp_path_factory.mktemp("photos"), COUNT, broken=(2,))
    (folder / "sub").mkdir()
    (folder / "006.jpg").rename(folder / "sub" / "006.jpg")
    return folder


@pytest.fixture(scope="module")
def out(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_job(photos, tmp_path_factory.mktemp("out"), 3, pixels="timm", heads="each")


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def job_of(keys: Sequence[str], folder: Path) -> Path:
    """A folder with one shard of the rows with these keys."""
    folder.mkdir()
    rows = [MapRow(key, map=np.ones((2, 2), np.float32), width=4, height=4, crop=(0, 0, 4, 4)) for key in keys]
    write_part(Format("float32").table(rows), folder / "part-00000.parquet", {"model": "demo"})
    return folder


def test_heat_is_the_map_in_its_crop(out: Path, tmp_path: Path) -> None:
    result = run("masks", out, "--out", tmp_path / "m", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"6 masks in {tmp_path / 'm'}, 0 there before, 1 rows without a map"
    assert sorted(written(tmp_path / "m")) == [f"{i:03d}.png" for i in (0, 1, 3, 4, 5)] + ["sub/006.png"]
    for row in attnx.open(out):
        if row.map is None:
            continue
        with Image.open((tmp_path / "m" / row.key).with_suffix(".png")) as image:
            assert (image.mode, image.size) == ("L", (row.width, row.height))
            mask = np.asarray(image).astype(float)
        left, top, right, bottom = map(round, row.crop)
        if (left, top, right, bottom) != row.crop:
            continue
        amap = torch.from_numpy(row.map).mean(0)
        full = F.interpolate(amap[None, None], size=(bottom - top, right - left), mode="bilinear")[0, 0]
        expected = np.zeros((row.height, row.width))
        expected[top:bottom, left:right] = full.numpy() / full.max().item() * 255
        assert mask.max() == 255
        assert np.abs(mask - expected).max() <= 0.51


def test_values_of_a_small_map() -> None:
    amap = np.array([[[0, 1], [2, 5]], [[0, 1], [2, 5]]], np.float32)
    row = MapRow("a", map=amap, width=6, height=6, crop=(1, 0, 5, 4))
    mask = np.asarray(mask_image(row, "mass", 0.6))
    expected = np.zeros((6, 6))
    expected[2:4, 3:5] = 255
    assert np.array_equal(mask, expected)
    heat = np.asarray(mask_image(row, "heat", 0.6))
    assert heat[3, 4] == 255
    assert heat[0, 1] == 0
    assert not heat[4:].any()
    assert not heat[:, 0].any()
    assert not heat[:, 5].any()
    zero = MapRow("a", map=np.zeros((2, 2), np.float32), width=6, height=6, crop=(1, 0, 5, 4))
    assert not np.asarray(mask_image(zero, "heat", 0.6)).any()
    outside = MapRow("a", map=amap, width=6, height=4, crop=(0, -1, 6, 5))
    assert mask_image(outside, "heat", 0.6).size == (6, 4)
    with pytest.raises(ValueError, match="at most"):
        mask_image(MapRow("a", map=amap, width=10**6, height=10**6, crop=(0, 0, 1, 1)), "heat", 0.6)


@pytest.mark.parametrize("mass", [0.3, 0.9])
def test_mass_is_mass_mask(out: Path, tmp_path: Path, mass: float) -> None:
    assert run("masks", out, "--out", tmp_path, "--kind", "mass", "--keep", mass, "--workers", 0).exit_code == 0
    row = attnx.open(out)[0]
    inside = attnx.mass_mask(torch.from_numpy(row.map).mean(0), mass).numpy()
    mask = np.asarray(Image.open(tmp_path / "000.png"))
    assert set(np.unique(mask)) == {0, 255}
    left, top, right, bottom = row.crop
    for y in range(row.height):
        for x in range(row.width):
            at = (y + 0.5 - top) / (bottom - top) * inside.shape[0], (x + 0.5 - left) / (right - left) * inside.shape[1]
            seen = left <= x + 0.5 < right and top <= y + 0.5 < bottom
            assert mask[y, x] == (255 if seen and inside[int(at[0]), int(at[1])] else 0)


def test_processes_write_the_same_bytes(out: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        assert run("masks", out, "--out", tmp_path / str(workers), "--workers", workers).exit_code == 0
    assert written(tmp_path / "0") == written(tmp_path / "2")
    assert (tmp_path / "0" / "masks.json").read_bytes() == (tmp_path / "2" / "masks.json").read_bytes()


def test_a_run_continues(out: Path, tmp_path: Path) -> None:
    run("masks", out, "--out", tmp_path, "--workers", 0)
    before = written(tmp_path)
    for name in list(before)[::2]:
        (tmp_path / name).unlink()
    kept = tmp_path / list(before)[1]
    age = kept.stat().st_mtime_ns
    result = run("masks", out, "--out", tmp_path, "--workers", 0)
    assert result.output.strip() == f"3 masks in {tmp_path}, 3 there before, 1 rows without a map"
    assert written(tmp_path) == before
    assert kept.stat().st_mtime_ns == age
    assert not list(tmp_path.rglob(".*"))


def test_a_run_without_missing_masks_reads_no_map(
    out: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("masks", out, "--out", tmp_path, "--workers", 0)
    groups_of, read = Maps.groups_of, []

    def counted(self: Maps, shard: int, errors_only: bool = False) -> object:
        read.extend([] if errors_only else [shard])
        return groups_of(self, shard, errors_only)

    monkeypatch.setattr(Maps, "groups_of", counted)
    for share in ((), ("--root", photos)):
        result = run("masks", out, "--out", tmp_path, "--workers", 0, *share)
        assert result.output.strip() == f"0 masks in {tmp_path}, 6 there before, 1 rows without a map"
    assert read == []
    (tmp_path / "004.png").unlink()
    assert (
        f"1 masks in {tmp_path}, 5 there before, 1 rows" in run("masks", out, "--out", tmp_path, "--workers", 0).output
    )
    assert read == [1]


def test_other_settings_are_refused(out: Path, photos: Path, tmp_path: Path) -> None:
    run("masks", out, "--out", tmp_path / "m", "--workers", 0)
    told = fails("masks", out, "--out", tmp_path / "m", "--kind", "mass")
    assert "kind: 'heat' there, 'mass' now" in told
    assert told.endswith("choose another folder")
    other = made_job(photos, tmp_path / "other", 3)
    assert "has masks of other settings (job: " in fails("masks", other, "--out", tmp_path / "m")
    assert "has other files, such as" in fails("masks", out, "--out", photos)
    (tmp_path / "m" / "masks.json").write_text("{")
    assert "is not a file of attnx masks" in fails("masks", out, "--out", tmp_path / "m")
    assert "mass: only with --kind mass" in fails("masks", out, "--out", tmp_path / "n", "--mass", 0.5)
    assert "mass: expected a share" in fails("masks", out, "--out", tmp_path / "n", "--kind", "mass", "--mass", "nan")
    assert "kind: expected one of heat, mass" in fails("masks", out, "--out", tmp_path / "n", "--kind", "x")
    assert not (tmp_path / "n").exists()


def test_jobs_without_maps_over_patches_are_refused(photos: Path, tmp_path: Path) -> None:
    whole = made_job(draw(tmp_path / "one", 1), tmp_path / "whole", 1, store="full")
    assert "has whole maps" in fails("masks", whole, "--out", tmp_path / "m")
    for name, what in (("stats", "statistics of heads"), ("vocab", "maps of words")):
        folder = job_of(["a.jpg"], tmp_path / name)
        row = MapRow("a", map=np.ones((2, 2), np.float32))
        write_part(Format("float32").table([row]), folder / "part-00000.parquet", {name: []})
        assert f"has {what}" in fails("masks", folder, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_two_keys_with_one_mask(tmp_path: Path) -> None:
    folder = job_of(["a.jpg", "b.jpg", "a.png"], tmp_path / "job")
    told = fails("masks", folder, "--out", tmp_path / "m")
    assert "'a.jpg' and 'a.png' have the same; --full-names names them apart" in told
    assert not (tmp_path / "m").exists()
    assert run("masks", folder, "--out", tmp_path / "m", "--full-names", "--workers", 0).exit_code == 0
    assert sorted(written(tmp_path / "m")) == ["a.jpg.png", "a.png.png", "b.jpg.png"]
    assert "full_names: True there, False now" in fails(
        "masks", job_of(["a.jpg"], tmp_path / "x"), "--out", tmp_path / "m"
    )


def test_keys_that_leave_the_folder_are_errors(tmp_path: Path) -> None:
    hostile = ["../x.jpg", "/tmp/attnx-hostile.jpg", "a/../../y.jpg", "x" * 300, "a\0b", ".."]
    folder = job_of([*hostile, "good.jpg"], tmp_path / "job")
    result = run("masks", folder, "--out", tmp_path / "m", "--workers", 0)
    assert result.exit_code == 1
    assert f"1 masks in {tmp_path / 'm'}, 0 there before, 0 rows without a map, 6 errors" in result.output
    assert "expected a key that is a path below" in result.stderr
    assert [*written(tmp_path)] == ["m/good.png"]
    assert not Path("/tmp/attnx-hostile.png").exists()


def test_photos_of_another_size_are_errors(out: Path, photos: Path, tmp_path: Path) -> None:
    result = run("masks", out, "--out", tmp_path / "m", "--root", photos, "--workers", 0)
    assert result.exit_code == 0, result.output
    moved = draw(tmp_path / "moved", 3)
    Image.new("RGB", (9, 9)).save(moved / "000.jpg")
    result = run("masks", out, "--out", tmp_path / "n", "--root", moved, "--workers", 0)
    assert result.exit_code == 1
    assert re.search(r"000\.jpg: expected a photo of 50 x 40 pixels; got 9 x 9", result.stderr)
    assert [*written(tmp_path / "n")] == ["001.png"]
    assert "expected a folder of photos" in fails("masks", out, "--out", tmp_path / "o", "--root", moved / "000.jpg")


def test_the_upright_size_is_that_of_the_header(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png"):
        Image.new("RGB", (8, 6)).save(tmp_path / f"a.{suffix}", exif=exif)
        assert upright_size(tmp_path / f"a.{suffix}") == (6, 8)
        Image.new("RGB", (8, 6)).save(tmp_path / f"b.{suffix}")
        assert upright_size(tmp_path / f"b.{suffix}") == (8, 6)
    (tmp_path / "c.jpg").write_text("no image")
    told = []
    for read in (upright_size, read_image):
        with pytest.raises(ImageError, match="can't be read as an image") as error:
            read(tmp_path / "c.jpg")
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [0, *range(1, 10)])
def test_the_upright_size_is_that_of_the_picture(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (8, 6)).save(path, exif=exif)
    assert upright_size(path) == read_image(path).size == ((6, 8) if 5 <= orientation <= 8 else (8, 6))


def exif_block(kind: int, value: bytes) -> bytes:
    """EXIF with an orientation of a TIFF type, in 4 bytes."""
    return b"MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0112, kind, 1, value, 0)


def test_an_orientation_that_is_no_number_counts_as_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 6)).save(path, exif=b"Exif\0\0" + exif_block(2, b"x\0\0\0"))
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == "x"
    assert upright_size(path) == read_image(path).size == (8, 6)


@pytest.mark.parametrize(
    ("kind", "data", "turned"),
    [
        (b"eXIf", exif_block(3, b"\0\6\0\0"), True),
        (b"eXIf", exif_block(3, b"\0\3\0\0"), False),
        (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>', True),
        (b"tEXt", b"Comment\0six", False),
    ],
)
def test_an_orientation_after_the_pixels_of_a_png(tmp_path: Path, kind: bytes, data: bytes, turned: bool) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6)).save(path)
    content, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content + chunk + end)
    assert upright_size(path) == read_image(path).size == ((6, 8) if turned else (8, 6))
    if kind == b"eXIf":
        with pytest.raises(ImageError, match="expected at most 47 pixels"):
            upright_size(path, 47)


def test_the_settings_name_the_job(out: Path, tmp_path: Path) -> None:
    run("masks", out, "--out", tmp_path, "--kind", "mass", "--workers", 0)
    stored = json.loads((tmp_path / "masks.json").read_text())
    assert stored == Masks(attnx.open(out), tmp_path, "mass").settings()
    assert (stored["kind"], stored["mass"], stored["model"]) == ("mass", 0.6, "demo")
