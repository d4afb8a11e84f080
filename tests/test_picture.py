"""Pictures of maps, pixel by pixel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from attnx.figures import picture, sheets

rng = np.random.default_rng(0)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def scores(*shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.random(shape, dtype=np.float32))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def resized(amap: torch.Tensor, size: tuple[int, int], mode: str) -> np.ndarray:
    if mode == "nearest":  # the cell at each pixel's centre; torch's "nearest-exact" rounds where that is a border
        middles = [(np.arange(n) + 0.5) * cells / n for n, cells in zip(size, amap.shape, strict=True)]
        return amap.numpy()[np.ix_(*(places.astype(int) for places in middles))]
    batch = amap[None, None]
    return torch.nn.functional.interpolate(batch, size=size, mode=mode, align_corners=False)[0, 0].numpy()


SIZES = [((14, 14), (224, 224)), ((3, 5), (48, 80)), ((7, 4), (33, 61)), ((12, 10), (5, 7)), ((1, 1), (6, 9))]


@pytest.mark.filterwarnings("ignore:size. taken as")
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_heat_is_torch_interpolate(grid, size, mode):
    amap = scores(*grid)
    got = picture.heat(amap, size, interpolation=mode, normalize=None)
    assert got.dtype == np.float32
    assert got.shape == size
    np.testing.assert_allclose(got, resized(amap, size, mode), rtol=1e-5, atol=1e-6)


def test_nearest_repeats_every_cell():
    amap = rng.random((3, 5), dtype=np.float32)
    got = picture.heat(amap, (24, 40), interpolation="nearest", normalize=None)
    np.testing.assert_array_equal(got, amap.repeat(8, 0).repeat(8, 1))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_minmax_stretches_to_the_whole_range(scale):
    amap = (scores(6, 9) + 5) * scale
    got = picture.heat(amap, (31, 50))
    want = resized(amap, (31, 50), "bilinear")
    assert got.min() == 0
    assert got.max() == 1
    np.testing.assert_allclose(got, (want - want.min()) / (want.max() - want.min()), atol=1e-5)


def test_max_divides_and_drops_what_is_negative():
    amap = torch.tensor([[-1.0, 0.0], [1.0, 4.0]])
    got = picture.heat(amap, (2, 2), normalize="max")
    np.testing.assert_array_equal(got, np.float32([[0, 0], [0.25, 1]]))
    assert not picture.heat(-amap.abs(), (2, 2), normalize="max").any()
    np.testing.assert_array_equal(picture.heat(torch.full((2, 2), 3.0), (4, 4), normalize="max"), 1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1 / 196, 1e20])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("grid", [(14, 14), (7, 9)])
def test_constant_map_gives_zeros(value, mode, grid):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = picture.heat(np.full(grid, value), (48, 80), interpolation=mode)
    np.testing.assert_array_equal(got, np.zeros((48, 80), np.float32))


def test_constant_map_leaves_rounding_noise_when_resized():
    # Without this, the test above would not cover noise.
    assert np.ptp(resized(torch.full((14, 14), 0.1), (48, 80), "bilinear")) > 0


def test_low_contrast_is_not_taken_for_constant():
    amap = np.full((4, 4), 1 / 196)
    amap[1, 2] *= 1.001
    got = picture.heat(amap, (4, 4))
    assert got[1, 2] == 1
    assert got.sum() == 1


KINDS = {
    "float64": lambda a: torch.tensor(a, dtype=torch.float64),
    "bfloat16": lambda a: torch.tensor(a).bfloat16(),
    "float16": lambda a: torch.tensor(a).half(),
    "needs grad": lambda a: torch.tensor(a, requires_grad=True),
    "strided": lambda a: torch.tensor(a).t().contiguous().t(),
    "integers": lambda a: torch.tensor(a * 4).long(),
    "numpy": lambda a: a,
    "numpy float16": lambda a: a.astype(np.float16),
    "flipped": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "big endian": lambda a: a.astype(">f4"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_dtype_and_layout(kind):
    exact = np.float32([[0, 0.25, 0.5], [1, 0.75, 0.5]])
    got = picture.heat(KINDS[kind](exact), (8, 12))
    np.testing.assert_allclose(got, picture.heat(torch.tensor(exact), (8, 12)), atol=1e-6)


def test_bool_and_read_only_maps_are_left_alone():
    amap = np.eye(3, dtype=np.float32)
    amap.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = picture.heat(amap, (6, 6), interpolation="nearest")
    np.testing.assert_array_equal(got, picture.heat(amap > 0, (6, 6), interpolation="nearest"))
    np.testing.assert_array_equal(amap, np.eye(3))


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (1, 40)])
def test_overlay_ends_of_alpha(size):
    image, amap = noise(*size), scores(3, 5)
    np.testing.assert_array_equal(pixels(picture.overlay(image, amap, alpha=0)), pixels(image))
    for name in ("turbo", "jet", "viridis"):
        colours = colormaps[name](picture.heat(amap, image), bytes=True)[..., :3]
        np.testing.assert_array_equal(pixels(picture.overlay(image, amap, alpha=1, cmap=name)), colours)


def test_overlay_blends_and_leaves_its_image_alone():
    image, amap = noise(21, 34), scores(4, 4)
    before = pixels(image)
    got = picture.overlay(image, amap, alpha=0.25, interpolation="nearest")
    colours = pixels(picture.overlay(image, amap, alpha=1, interpolation="nearest"))
    assert got.size == image.size == (34, 21)
    assert np.abs(pixels(got) - (0.75 * before + 0.25 * colours)).max() <= 1
    np.testing.assert_array_equal(pixels(image), before)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_peak_lands_on_its_cell(mode):
    amap = np.zeros((3, 5))
    amap[0, 4] = 1
    got = pixels(picture.overlay(noise(24, 40), amap, alpha=1, cmap="gray", interpolation=mode))[..., 0]
    rows, columns = np.nonzero(got == got.max())
    assert rows.max() < 8
    assert columns.min() >= 32
    assert got[:, :24].max() == 0
    assert got[16:].max() == 0


def test_images_of_other_kinds():
    array, amap = np.asarray(noise(9, 16)), scores(3, 4)
    want = pixels(picture.overlay(Image.fromarray(array), amap))
    np.testing.assert_array_equal(pixels(picture.overlay(array, amap)), want)
    assert picture.overlay(Image.new("L", (16, 9)), amap).size == (16, 9)
    assert picture.overlay(Image.new("RGBA", (16, 9)), amap).mode == "RGB"


def cells(sheet: Image.Image, columns: int, rows: int, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures of a sheet, all of one size, without gaps and titles."""
    width, height = size
    gap = max(8, max(width, 64) // 20)
    down = (sheet.height - gap) / rows
    assert down == int(down)
    assert sheet.width == gap + columns * (max(width, 64) + gap)
    inset = (max(width, 64) - width) // 2
    corners = [
        (gap + inset + column * (max(width, 64) + gap), int((row + 1) * down) - height)
        for row in range(rows)
        for column in range(columns)
    ]
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(pixels(left), pixels(right))


def blank(image: Image.Image) -> bool:
    return bool((pixels(image) == 255).all())


@pytest.mark.parametrize("size", [(70, 40), (30, 50)])
def test_contact_sheet_keeps_every_pixel(size):
    images = [noise(size[1], size[0]) for _ in range(5)]
    for titles in (None, ["one", "two", "three", "four", "five"]):
        got = cells(sheets.contact_sheet(images, titles, columns=3), 3, 2, size)
        assert all(same(a, b) for a, b in zip(got[:5], images, strict=True))
        assert blank(got[5])


def test_contact_sheet_of_different_sizes():
    images = [noise(20, 100), noise(60, 30), noise(10, 10)]
    sheet = sheets.contact_sheet(images, None, columns=2)
    assert sheet.size == (8 + 108 + 108, 8 + 68 + 18)
    assert same(sheet.crop((8, 8, 108, 28)), images[0])
    assert same(sheet.crop((116 + 35, 8, 116 + 65, 68)), images[1])
    assert same(sheet.crop((8 + 45, 76, 8 + 55, 86)), images[2])
    inked = (pixels(sheet) != 255).any(-1).sum()
    assert inked <= 100 * 20 + 60 * 30 + 10 * 10


def test_contact_sheet_fits_pictures_to_a_tile():
    sheet = sheets.contact_sheet([noise(50, 200), noise(20, 10)], None, columns=2, tile=80)
    assert sheet.size == (8 + 88 + 88, 8 + 88)
    painted = (pixels(sheet) != 255).any(-1)
    assert painted[:, :92].sum(0).max() == 20
    assert painted[:, 92:].sum(1).max() == 40


def test_contact_sheet_is_no_wider_than_its_pictures():
    assert sheets.contact_sheet([noise(9, 90)], None, columns=7).width == 8 + 98


def test_titles_are_drawn_above_and_cut_to_fit():
    images = [Image.new("RGB", (90, 30), "white")] * 3
    plain = sheets.contact_sheet(images, None, columns=3)
    titles = ["", "model.encoder.layers.11.self_attention", "short"]
    sheet = sheets.contact_sheet(images, titles, columns=3)
    assert sheet.height > plain.height
    assert blank(plain)
    ink = (pixels(sheet) < 200).any(-1)
    down, across = np.nonzero(ink)
    assert down.max() < sheet.height - 8 - 30
    assert not ink[:, :106].any()
    long, short = across[across < 204], across[across >= 204]
    assert long.min() >= 106
    assert long.max() < 196
    assert short.min() >= 204
    assert short.max() < 294
    assert np.ptp(long) > 60 > np.ptp(short) > 10
    assert abs((short.min() + short.max()) / 2 - 249) <= 2


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn, in order."""
    texts, draw = [], ImageDraw.ImageDraw.text

    def text(self, at, content, *args, **options):
        texts.append(content)
        return draw(self, at, content, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def test_shortened_titles_keep_both_ends(drawn):
    titles = ["attn", "model.encoder.layers.11.self_attention", "two\n  lines", "a" * 300 + "b" * 300]
    sheets.contact_sheet([Image.new("RGB", (90, 30))] * 4, titles, columns=4)
    assert drawn[::2] == ["attn", "two lines"]
    for short, title in zip(drawn[1::2], titles[1::2], strict=True):
        start, end = short.split("…")
        assert start
        assert end
        assert title.startswith(start)
        assert title.endswith(end)
        assert abs(len(start) - len(end)) <= 1


def test_heads_grid_is_one_overlay_a_head():
    image, maps = noise(48, 80), scores(6, 3, 5)
    got = cells(sheets.heads_grid(image, maps, tile=None).image, 3, 2, image.size)
    for tile, amap in zip(got, maps, strict=True):
        assert same(tile, picture.overlay(image, amap, interpolation="nearest", alpha=0.6))
    style = {"interpolation": "bilinear", "cmap": "viridis", "alpha": 1.0}
    got = cells(sheets.heads_grid(image, maps, tile=None, columns=2, **style).image, 2, 3, image.size)
    for tile, amap in zip(got, maps, strict=True):
        assert same(tile, picture.overlay(image, amap, **style))


@pytest.mark.parametrize("tile", [32, 160])
def test_heads_grid_sets_the_longer_side(tile):
    sheet = sheets.heads_grid(noise(40, 80), torch.ones(2, 3, 3), tile=tile, alpha=1, cmap="gray").image
    black = cells(sheet, 2, 1, (tile, tile // 2))
    assert not any(pixels(part).any() for part in black)
    assert (pixels(sheet) == 0).all(-1).sum() < 1.1 * len(black) * tile * tile // 2


def test_layers_figure_is_layers_then_summary():
    image, maps, rollout = noise(40, 72), scores(4, 3, 5), scores(3, 5)
    sheet = sheets.layers_figure(image, list("abcd"), maps, rollout, tile=None).image
    want = [*maps, maps.amax(0), maps.amin(0), maps.mean(0), rollout]
    got = cells(sheet, 4, 2, image.size)
    assert all(same(tile, picture.overlay(image, amap)) for tile, amap in zip(got, want, strict=True))


def test_layers_figure_without_rollout_and_with_style():
    image, maps = noise(40, 72), rng.random((6, 3, 5))
    style = {"interpolation": "nearest", "cmap": "jet", "alpha": 1.0}
    got = cells(sheets.layers_figure(image, "abcdef", maps, None, tile=None, **style).image, 3, 3, image.size)
    want = [*maps, maps.max(0), maps.min(0), maps.mean(0)]
    for tile, amap in zip(got, want, strict=True):
        assert same(tile, picture.overlay(image, amap, **style))


@pytest.mark.parametrize(
    ("heads", "columns"),
    [(1, 1), (3, 3), (6, 3), (12, 4)],
)
def test_automatic_columns_of_heads(heads, columns):
    image, maps = noise(40, 72), rng.random((heads, 3, 5))
    chosen = sheets.heads_grid(image, maps, tile=None).image
    assert same(chosen, sheets.heads_grid(image, maps, tile=None, columns=columns).image)


@pytest.mark.parametrize(("layers", "columns"), [(12, 4), (6, 6), (11, 4)])
def test_automatic_columns_of_layers(layers, columns):
    image, maps, names = noise(40, 72), rng.random((layers, 3, 5)), [""] * layers
    chosen = sheets.layers_figure(image, names, maps, maps[0], tile=None).image
    assert same(chosen, sheets.layers_figure(image, names, maps, maps[0], tile=None, columns=columns).image)


def test_contour_follows_the_border():
    image, mask = noise(48, 80), np.zeros((3, 5), bool)
    mask[1, 1:3] = True
    got, red = pixels(picture.mask_contour(image, mask, color=(255, 0, 0))), np.array([255, 0, 0])
    inside = mask.repeat(16, 0).repeat(16, 1)
    border = np.zeros_like(inside)
    border[15:33, 15:49] = True
    border[17:31, 17:47] = False
    np.testing.assert_array_equal(got[~inside & ~border], pixels(image)[~inside & ~border])
    assert np.abs(got[inside & ~border] - (pixels(image)[inside & ~border] + red) / 2).max() <= 1
    assert (got[border] == red).all()


def test_contour_grows_with_the_image():
    mask = np.zeros((2, 2), bool)
    mask[:, 1] = True
    got = pixels(picture.mask_contour(Image.new("RGB", (960, 720)), mask, color="#00ff00", alpha=0))
    assert ((got[:, :, 1] == 255).sum(1) == 6).all()
    assert (got[:, 477:483, 1] == 255).all()


def test_contour_of_nothing_of_all_and_solid():
    image = noise(20, 30)
    assert same(picture.mask_contour(image, np.zeros((2, 3), bool)), image)
    assert same(picture.mask_contour(image, torch.ones(2, 3, dtype=torch.bool), alpha=0), image)
    solid = picture.mask_contour(image, np.ones((2, 3), bool), alpha=1, color="blue")
    assert same(solid, Image.new("RGB", image.size, "blue"))


def test_save_writes_and_replaces(tmp_path):
    first, second, path = noise(5, 8), noise(9, 4), tmp_path / "a.png"
    picture.save(first, path)
    picture.save(second, str(path))
    with Image.open(path) as read:
        assert read.format == "PNG"
        assert same(read, second)
    assert os.listdir(tmp_path) == ["a.png"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    first, path = noise(5, 8), tmp_path / "a.png"
    picture.save(first, path)

    def half(self, file, **_):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match=f"No space left.*{re.escape(str(path))}"):
        picture.save(noise(9, 4), path)
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        picture.save(noise(9, 4), path)
    assert os.listdir(tmp_path) == ["a.png"]
    with Image.open(path) as read:
        assert same(read, first)


def test_save_is_one_rename_in_the_same_folder(tmp_path, monkeypatch):
    moves, replace, path = [], os.replace, tmp_path / "a.png"

    def watched(source, target):
        assert not path.exists()
        with Image.open(source) as whole:
            whole.load()
        moves.append((Path(source).parent, Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    picture.save(noise(5, 8), path)
    assert moves == [(tmp_path, path)]


@pytest.mark.parametrize("refused", [PermissionError(13, "Permission denied"), OSError(30, "Read-only")])
def test_save_into_a_folder_that_takes_nothing(tmp_path, monkeypatch, refused):
    def closed(*_):
        raise refused

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(type(refused), match=f"{refused.strerror}.*{re.escape(str(tmp_path / 'a.png'))}"):
        picture.save(noise(5, 8), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_save_to_places_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, error in {
        tmp_path / "missing" / "a.png": FileNotFoundError,
        tmp_path / "file" / "a.png": NotADirectoryError,
        tmp_path / "folder.png": IsADirectoryError,
    }.items():
        with pytest.raises(error, match=re.escape(str(path))):
            picture.save(noise(5, 8), path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


IMAGE, MAP, MAPS, MASK = noise(12, 16), np.eye(3), np.ones((2, 3, 3)), np.eye(3, dtype=bool)
SOME_BAD = np.array([[1, np.nan], [np.inf, -np.inf]])
ERRORS = {
    "map of 3 axes": (
        lambda: picture.heat(MAPS, (4, 4)),
        r"amap: expected real \[h, w\].*float64 \[2, 3, 3\]",
    ),
    "empty map": (
        lambda: picture.heat(torch.empty(0, 3), (4, 4)),
        r"amap: .*not empty, got float32 \[0, 3\]",
    ),
    "complex map": (lambda: picture.heat(MAP * 1j, (4, 4)), "amap: expected real .* got complex128"),
    "text": (lambda: picture.heat(np.array([["a"]]), (4, 4)), "amap: expected real"),
    "NaN": (lambda: picture.heat(SOME_BAD, (4, 4)), "amap: expected finite values, got 3 of 4 NaN or inf"),
    "NaN, nearest": (lambda: picture.overlay(IMAGE, SOME_BAD, interpolation="nearest"), "3 of 4"),
    "beyond 0..1": (
        lambda: picture.heat(MAP * 2, (4, 4), normalize=None),
        r"amap: expected 0\.\.1 .* got 0\.\.2",
    ),
    "size": (lambda: picture.heat(MAP, (4, 0)), r"size: expected \(H, W\).*got \(4, 0\)"),
    "size of 3": (lambda: picture.heat(MAP, (4, 4, 4)), r"size: expected \(H, W\).*got \(4, 4, 4\)"),
    "normalize": (lambda: picture.heat(MAP, (4, 4), normalize="sum"), "normalize: expected minmax.*'sum'"),
    "interpolation": (
        lambda: picture.overlay(IMAGE, MAP, interpolation="cubic"),
        "interpolation: expected bilinear or nearest, got 'cubic'",
    ),
    "cmap": (
        lambda: picture.overlay(IMAGE, MAP, cmap="tubro"),
        "cmap: expected turbo, jet, viridis .*got 'tubro'",
    ),
    "alpha": (lambda: picture.overlay(IMAGE, MAP, alpha=1.5), r"alpha: expected 0\.\.1, got 1\.5"),
    "alpha NaN": (lambda: picture.overlay(IMAGE, MAP, alpha=float("nan")), "alpha: .*got nan"),
    "mask alpha": (lambda: picture.mask_contour(IMAGE, MASK, alpha=-0.1), "alpha: .*got -0.1"),
    "float image": (lambda: picture.overlay(np.ones((4, 4, 3)), MAP), r"image: .*got float64 \[4, 4, 3\]"),
    "image, channels first": (
        lambda: picture.overlay(np.ones((3, 4, 4), np.uint8), MAP),
        r"image: expected a PIL.Image, a path or uint8 \[H, W, 3\], got uint8 \[3, 4, 4\]",
    ),
    "no image": (lambda: picture.overlay(None, MAP), "image: .*got object"),
    "heads of 2 axes": (lambda: sheets.heads_grid(IMAGE, MAP).image, r"maps: expected real \[maps, h, w\]"),
    "no heads": (lambda: sheets.heads_grid(IMAGE, MAPS[:0]).image, r"maps: .*not empty, got float64 \[0, 3, 3\]"),
    "NaN in heads": (lambda: sheets.heads_grid(IMAGE, SOME_BAD[None]).image, "maps: .*3 of 4"),
    "names": (
        lambda: sheets.layers_figure(IMAGE, ["a"], MAPS, None).image,
        "names: expected 2, one for each .*got 1",
    ),
    "rollout": (lambda: sheets.layers_figure(IMAGE, "ab", MAPS, MAPS).image, r"rollout: expected real \[h, w\]"),
    "NaN in rollout": (lambda: sheets.layers_figure(IMAGE, "ab", MAPS, SOME_BAD).image, "rollout: .*3 of 4"),
    "columns of layers": (
        lambda: sheets.layers_figure(IMAGE, "ab", MAPS, None, columns=0).image,
        "columns: .*got 0",
    ),
    "tile": (lambda: sheets.heads_grid(IMAGE, MAPS, tile=0).image, "tile: expected at least 1, got 0"),
    "mask of floats": (lambda: picture.mask_contour(IMAGE, MAP), "mask: expected bool .*got float64"),
    "mask of 3 axes": (lambda: picture.mask_contour(IMAGE, MASK[None]), r"mask: .*got bool \[1, 3, 3\]"),
    "color": (lambda: picture.mask_contour(IMAGE, MASK, color="rde"), "color: expected a name.*'rde'"),
    "color of 2": (lambda: picture.mask_contour(IMAGE, MASK, color=(1, 2)), r"color: .*got \(1, 2\)"),
    "no images": (
        lambda: sheets.contact_sheet([], None, columns=2),
        "images: expected at least one, got none",
    ),
    "columns": (
        lambda: sheets.contact_sheet([IMAGE], None, columns=0),
        "columns: expected at least 1, got 0",
    ),
    "titles": (lambda: sheets.contact_sheet([IMAGE], ["a", "b"], columns=1), "titles: expected 1, .*got 2"),
    "not a png": (
        lambda: picture.save(IMAGE, "a.jpg"),
        "path: expected a name that ends in .png, got 'a.jpg'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_what_came(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_module_loads_no_matplotlib():
    code = "import sys, attnx.figures.picture; print({'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30)])
def test_heat_takes_the_image_for_its_size(height, width):
    image, amap = noise(height, width), scores(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (image, image.convert("L"), np.asarray(image)):
            got = picture.heat(amap, size)
            assert got.shape == (height, width)
        assert picture.overlay(image, amap).size == (width, height)
        picture.mask_contour(image, amap > 0.5)
        assert sheets.heads_grid(image, amap[None]).image.mode == "RGB"
    if height > width:
        np.testing.assert_array_equal(got, picture.heat(amap, (height, width)))


@pytest.mark.parametrize(("grid", "size"), [((3, 5), (50, 30)), ((5, 3), (30, 50))])
def test_a_size_that_turns_the_map_is_said(grid, size):
    amap = scores(*grid)
    with pytest.warns(UserWarning, match=r"taken as \(height, width\) = .*PIL's `size` is \(width, height\)") as told:
        assert picture.heat(amap, size).shape == size
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.heat(amap, size[::-1])
        picture.heat(amap, (40, 40))
        picture.heat(scores(4, 4), size)


@pytest.mark.parametrize("size", [40, "40", None, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)], ids=str)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"(size|image): expected"):
        picture.heat(scores(3, 3), size)


def test_a_long_title_is_measured_a_few_times(drawn, monkeypatch):
    measured, getlength = [], ImageFont.FreeTypeFont.getlength

    def spy(self, text, *args, **options):
        measured.append(text)
        return getlength(self, text, *args, **options)

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", spy)
    sheets.contact_sheet([noise(20, 90)], ["a" * 3000 + "b" * 3000], columns=1)
    assert re.fullmatch("a+…b+", drawn[0])
    assert len(measured) < 20
