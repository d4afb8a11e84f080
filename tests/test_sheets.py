"""Colour bars, shared scales, rows of jobs, and sheets as PNG, PDF and SVG."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

import attnx
from attnx.jobs.columns import MapRow

rng = np.random.default_rng(0)


def photo(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_pictures_are_imported_when_they_are_used() -> None:
    assert attnx.picture.overlay(photo(), torch.rand(3, 4)).size == (80, 60)
    with pytest.raises(AttributeError, match="module 'attnx' has no attribute 'pictures'"):
        attnx.pictures  # noqa: B018


def test_limits_are_the_ends_of_the_colours() -> None:
    image, amap = photo(), torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    found = attnx.picture.overlay(image, amap, alpha=1, interpolation="nearest", limits=(0, 8))
    colours = colormaps["turbo"](np.array([0, 1 / 8, 2 / 8, 4 / 8]), bytes=True)[:, :3]
    corners = pixels(found)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(corners, colours)
    outside = attnx.picture.overlay(image, amap, alpha=1, interpolation="nearest", limits=(1, 2))
    np.testing.assert_array_equal(pixels(outside)[0, 0], colormaps["turbo"](0.0, bytes=True)[:3])
    np.testing.assert_array_equal(pixels(outside)[-1, -1], colormaps["turbo"](1.0, bytes=True)[:3])
    with pytest.raises(ValueError, match=r"limits: expected \(low, high\) with low <= high, got \(2, 1\)"):
        attnx.picture.overlay(image, amap, limits=(2, 1))


def test_a_colour_bar_has_the_colours_and_leaves_the_picture() -> None:
    image, amap = photo(200, 80), torch.rand(3, 4)
    plain = attnx.picture.overlay(image, amap)
    found = attnx.picture.overlay(image, amap, colorbar=True)
    assert found.height == 200
    np.testing.assert_array_equal(pixels(found)[:, :80], pixels(plain))
    bar = pixels(found)[:, 80 + 2 * 5 + 3]
    np.testing.assert_array_equal(bar[[0, -1]], colormaps["turbo"](np.array([1.0, 0.0]), bytes=True)[:, :3])
    constant = attnx.picture.overlay(image, torch.ones(2, 2), colorbar=True)
    assert constant.width > 80


def test_a_patch_is_framed() -> None:
    image, amap = photo(60, 80), torch.rand(3, 4)
    plain = pixels(attnx.picture.overlay(image, amap))
    found = pixels(attnx.picture.overlay(image, amap, patch=(1, 2)))
    changed = (found != plain).any(-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (19, 40, 39, 60)  # the patch, and a line around it
    assert not changed[24:36, 44:56].any()
    with pytest.raises(ValueError, match=r"patch: expected \(row, column\) in a grid of 3 x 4, got \(3, 0\)"):
        attnx.picture.overlay(image, amap, patch=(3, 0))


def test_titles_are_no_formulas(tmp_path: Path) -> None:
    sheet = attnx.picture.Sheet((photo(),), ("a$_$b$.jpg",), 1)
    sheet.save(tmp_path / "sheet.svg")
    assert ">a$_$b$.jpg</text>" in (tmp_path / "sheet.svg").read_text()


def row(amap: np.ndarray, crop: tuple[float, ...], width: int, height: int) -> MapRow:
    return MapRow("a.jpg", map=amap, crop=crop, width=width, height=height)


def test_a_row_covers_its_crop() -> None:
    image, amap = photo(60, 80), rng.random((3, 3), dtype=np.float32)
    found = attnx.picture.overlay(image, row(amap, (20, 0, 80, 60), 80, 60))
    inside = attnx.picture.overlay(image.crop((20, 0, 80, 60)), amap)
    np.testing.assert_allclose(pixels(found)[:, 20:], pixels(inside), atol=1)
    np.testing.assert_array_equal(pixels(found)[:, :20], pixels(image)[:, :20])
    # The same row over a photo of half the size.
    half = image.resize((40, 30))
    small = attnx.picture.overlay(half, row(amap, (20, 0, 80, 60), 80, 60))
    np.testing.assert_array_equal(pixels(small)[:, :10], pixels(half)[:, :10])
    assert (pixels(small)[:, 10:] != pixels(half)[:, 10:]).any()


def test_rows_that_do_not_fit() -> None:
    amap = rng.random((3, 3), dtype=np.float32)
    whole = (0, 0, 80, 60)
    with pytest.raises(ValueError, match=r"image: expected the photo of a.jpg, 80 x 60, got 60 x 60"):
        attnx.picture.overlay(photo(60, 60), row(amap, whole, 80, 60))
    with pytest.raises(ValueError, match=r"row: expected a map \[h, w\] of a.jpg, got float32 \[2, 3, 3\]"):
        attnx.picture.overlay(photo(), row(np.stack([amap, amap]), whole, 80, 60))
    with pytest.raises(ValueError, match=r"row: expected a map \[h, w\] of a.jpg, got none"):
        attnx.picture.overlay(photo(), MapRow("a.jpg", error="broken"))


def test_a_row_of_a_job(tmp_path: Path) -> None:
    from attnx.demo.run import run_demo

    run_demo(tmp_path, scenes=2)
    maps = attnx.open(tmp_path / "rollout")
    scene = Image.open(tmp_path / "scenes" / maps[0].key)
    found = attnx.picture.overlay(scene, maps[0])
    np.testing.assert_array_equal(pixels(found), pixels(attnx.picture.overlay(scene, maps[0].map)))


@pytest.mark.parametrize("scale", ["each", "shared"])
def test_scales_of_a_sheet(scale: str) -> None:
    image, maps = photo(), torch.stack([torch.rand(3, 4), 10 * torch.rand(3, 4)])
    sheet = attnx.picture.heads_grid(image, maps, scale=scale, colorbar=True, tile=None, interpolation="nearest")
    assert sheet.titles == ("head 0", "head 1")
    each = [(float(amap.min()), float(amap.max())) for amap in maps]
    shared = min(low for low, _ in each), max(high for _, high in each)
    if scale == "each":
        np.testing.assert_allclose(sheet.limits, each, rtol=1e-6)
        assert sheet.shared is None
    else:
        np.testing.assert_allclose(sheet.shared, shared, rtol=1e-6)
        assert sheet.limits == ()
    for tile, amap, limits in zip(sheet.tiles, maps, each if scale == "each" else [shared] * 2, strict=True):
        style = dict(interpolation="nearest", alpha=0.6, limits=limits)
        np.testing.assert_allclose(pixels(tile), pixels(attnx.picture.overlay(image, amap, **style)), atol=1)
    plain = attnx.picture.heads_grid(image, maps, scale=scale, tile=None)
    assert plain.limits == ()
    assert plain.shared is None
    assert sheet.image.width > plain.image.width
    assert sheet.image.height == plain.image.height or scale == "each"
    with pytest.raises(ValueError, match="scale: expected each or shared, got 'all'"):
        attnx.picture.heads_grid(image, maps, scale="all")


@pytest.mark.parametrize("scale", ["each", "shared"])
def test_sheets_for_papers(scale: str, tmp_path: Path) -> None:
    maps, names = torch.rand(5, 3, 4), [f"blocks.{i}.attn" for i in range(5)]
    sheet = attnx.picture.layers_figure(photo(), names, maps, torch.rand(3, 4), scale=scale, colorbar=True)
    for name in ("figure.pdf", "figure.svg", "figure.png"):
        sheet.save(tmp_path / name)
        first = (tmp_path / name).read_bytes()
        sheet.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == first  # no date inside
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    svg = (tmp_path / "figure.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"blocks.0.attn", "max", "mean", "rollout"} <= set(texts)
    assert svg.count("<image") == 9 + (9 if scale == "each" else 1)  # pictures and colour bars
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == sheet.image.size
    assert sheet._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .png, .pdf or .svg, got '.*figure.jpg'"):
        sheet.save(tmp_path / "figure.jpg")
    with pytest.raises(OSError, match="none"):
        sheet.save(tmp_path / "none" / "figure.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.pdf", "figure.png", "figure.svg"]


def test_one_picture_has_its_own_colour_bar(tmp_path: Path) -> None:
    image, maps = photo(200, 80), torch.rand(1, 3, 4)
    each, shared = (
        attnx.picture.heads_grid(image, maps, scale=scale, colorbar=True, tile=None) for scale in ("each", "shared")
    )
    assert len(each.limits) == 1
    assert each.shared is None
    # The bar is as high as the picture, under the title; a shared one is as high as the sheet.
    ends = colormaps["turbo"](np.array([1.0, 0.0]), bytes=True)[:, :3]
    column = pixels(each.image)[:, 8 + 80 + 2 * 5 + 3]
    top = each.image.height - 8 - 200
    np.testing.assert_array_equal(column[[top, top + 199]], ends)
    np.testing.assert_array_equal(column[top - 1], 255)
    assert (pixels(shared.image)[0] == ends[0]).all(-1).any()
    paths = each.save_all(tmp_path, "one", ("pdf", "svg"))
    assert [path.name for path in paths] == ["one.png", "one.pdf", "one.svg"]
    shared.save_all(tmp_path, "shared", ("svg",))
    widths = [re.search(r'width="([0-9.]+)pt"', (tmp_path / f"{name}.svg").read_text()) for name in ("one", "shared")]
    assert [float(width[1]) for width in widths if width] == pytest.approx([6.75 * 72, (6.75 + 0.6) * 72])
    assert (tmp_path / "one.svg").read_text().count("<image") == 2
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


def test_limits_belong_to_pictures() -> None:
    with pytest.raises(ValueError, match=r"limits: expected none, or 2, one per picture, got 1"):
        attnx.picture.Sheet((photo(), photo()), ("a", "b"), 2, ((0, 1),))


def test_titles_of_vectors_are_short_and_printable(tmp_path: Path) -> None:
    sheet = attnx.picture.Sheet((photo(), photo()), ("a" * 20 + "b" * 20, "a\x07b"), 2)
    sheet.save(tmp_path / "sheet.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "sheet.svg").read_text())
    assert texts == ["a" * 14 + "…" + "b" * 13, r"a\x07b"]
