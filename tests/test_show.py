"""`attnx show`: tokens, folders, several models, sheets for papers, arrays."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import attnx
from attnx.cli.main import app
from attnx.demo.scenes import draw_scene
from attnx.extract.place import Place
from attnx.figures import one_image
from attnx.figures import photos as photos_module
from attnx.figures.shown import Request, Shown, main_map
from attnx.figures.style import Style
from attnx.images import read_image
from attnx.models.loaded import Loaded

TIMM = ("--model", "timm:vit_tiny_patch16_224", "--no-pretrained", "--image-size", "64")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_scene(i).image).resize((160, 120)).save(path)
    return tmp_path / "photos"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_arrays_are_those_of_the_methods(photos: Path, tmp_path: Path) -> None:
    run("show", photos / "a.png", "--npz", "--out", tmp_path / "out")
    loaded = attnx.load("demo")
    images = loaded.prepare([photos / "a.png"])
    with torch.inference_mode(), attnx.capture(loaded.model, heads="each") as trace:
        loaded.model(images)
    found = arrays(tmp_path / "out" / "maps.npz")
    assert list(found) == ["map", "heads", "layers", "names", "rollout"]
    want = {"map": attnx.rollout(trace)[0], "heads": attnx.cls_map(trace)[0], "layers": attnx.layer_maps(trace).maps[0]}
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-7)
    assert list(found["names"]) == list(trace)
    np.testing.assert_array_equal(found["rollout"], found["map"])


@pytest.mark.parametrize(
    ("token", "index"), [("80,60", 1 + 6 * 12 + 6), ("50%,50%", 1 + 6 * 12 + 6), ("0", 0), ("-1", 144), ("100%,0%", 12)]
)
def test_the_map_of_a_token(photos: Path, tmp_path: Path, token: str, index: int) -> None:
    result = run("show", photos / "a.png", "--token", token, "--npz", "--out", tmp_path / "out")
    found = arrays(tmp_path / "out" / "maps.npz")
    loaded = attnx.load("demo")
    with torch.inference_mode(), attnx.capture(loaded.model, heads="each") as trace:
        loaded.model(loaded.prepare([photos / "a.png"]))
    want = attnx.token_map(trace, index)[0]
    np.testing.assert_allclose(found["map"], want.mean(0).numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found["heads"], want.numpy(), rtol=1e-4, atol=1e-7)
    layers = attnx.layer_maps(trace, token=index).maps[0]
    np.testing.assert_allclose(found["layers"], layers.numpy(), rtol=1e-4, atol=1e-7)
    assert "rollout" not in found
    assert f"token {token}" in result.output or f"token {index} (the patch in row" in result.output


def test_a_token_of_windows(photos: Path, tmp_path: Path) -> None:
    swin = ("--model", "timm:swin_tiny_patch4_window7_224", "--no-pretrained")
    result = run("show", photos / "a.png", *swin, "--token", "50%,50%", "--out", tmp_path / "out")
    assert "the patch in row 3, column 3) attends to in layers.3.blocks.1.attn; no heads.png" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["overlay.png"]


def test_extract_of_a_token(photos: Path, tmp_path: Path) -> None:
    run("extract", photos, "--model", "demo", "--token", "50%,50%", "--workers", 0, "--out", tmp_path / "maps")
    run("extract", photos, "--model", "demo", "--token", "79", "--layers", 0, "--layers", -1, "--workers", 0,
        "--out", tmp_path / "two")  # fmt: skip
    loaded = attnx.load("demo")
    maps, two = attnx.open(tmp_path / "maps"), attnx.open(tmp_path / "two")
    assert maps.settings["token"] == "50%,50%"
    for one, several in zip(maps, two, strict=True):
        with torch.inference_mode(), attnx.capture(loaded.model) as trace:
            loaded.model(loaded.prepare([photos / one.key]))
        np.testing.assert_allclose(one.map, attnx.token_map(trace, 79)[0].numpy(), rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(several.map[0], attnx.token_map(trace, 79, 0)[0].numpy(), rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(several.map[1], one.map, rtol=1e-6)
    run("extract", photos, "--model", "demo", "--token", "50%,50%", "--workers", 0, "--out", tmp_path / "maps")
    other = ("--token", "5", "--workers", 0, "--out", tmp_path / "maps")
    assert "token" in run("extract", photos, "--model", "demo", *other, code=2).stderr


def test_a_folder_is_a_contact_sheet(photos: Path, tmp_path: Path) -> None:
    result = run("show", photos, "--limit", 2, "--pdf", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.pdf", "contact_sheet.png"]
    assert "2 pictures: a.png, b.png" in result.output
    assert "attnx: only the first 2 images; --limit shows more" in result.stderr
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    result = run("show", photos, "--tile", 0, "--out", tmp_path / "all")
    assert "a.png, b.png, sub/c.png" in result.output
    assert "broken.png" in result.stderr
    with Image.open(tmp_path / "all" / "contact_sheet.png") as sheet:
        assert sheet.width == 8 + 3 * (160 + 8)
    assert "npz: expected one image; got a folder" in run("show", photos, "--npz", code=2).stderr


def test_models_side_by_side(photos: Path, tmp_path: Path) -> None:
    models = ("--model", "demo", *TIMM, "--image-size", "96")
    result = run("show", photos / "a.png", *models, "--svg", "--scale", "shared", "--out", tmp_path / "out")
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*g"))
    assert {"models.png", "models.svg", "demo/overlay.png", "timm-vit_tiny_patch16_224/layers.svg"} <= set(names)
    assert "3 pictures: a.png, demo, timm:vit_tiny_patch16_224" in result.output
    run("show", photos, *models, "--out", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["contact_sheet.png"]
    with Image.open(tmp_path / "folder" / "contact_sheet.png") as sheet, Image.open(tmp_path / "out/models.png") as row:
        assert sheet.width == row.width  # the photo and the two models
        assert sheet.height > 2 * row.height


def test_the_patch_of_a_token_is_framed(photos: Path, tmp_path: Path) -> None:
    run("show", photos / "a.png", "--token", "80,60", "--out", tmp_path / "patch")
    run("show", photos / "a.png", "--token", "79", "--alpha", 0, "--out", tmp_path / "bare")
    with Image.open(photos / "a.png") as photo, Image.open(tmp_path / "bare" / "overlay.png") as drawn:
        changed = (np.asarray(photo.convert("RGB")) != np.asarray(drawn)).any(-1)
    rows, columns = np.nonzero(changed)
    assert 58 <= rows.min() < rows.max() <= 71  # row 6 of 12, of 120 pixels
    assert 78 <= columns.min() < columns.max() <= 95


def test_models_with_a_pooling_layer(photos: Path, tmp_path: Path) -> None:
    siglip = ("--model", "timm:vit_base_patch16_siglip_224", "--no-pretrained", "--image-size", "64")
    result = run("show", photos / "a.png", *siglip, "--token", "5", "--out", tmp_path / "out")
    assert "heads.png" in result.output
    assert "no heads.png" not in result.output


def test_colour_bars_of_sheets(photos: Path, tmp_path: Path) -> None:
    for scale, bars in (("each", 2), ("shared", 1)):
        run("show", photos, "--limit", 2, "--colorbar", "--scale", scale, "--svg", "--out", tmp_path / scale)
        svg = (tmp_path / scale / "contact_sheet.svg").read_text()
        assert svg.count("<image") == 2 + bars
    assert "heads.png" in run("show", photos / "a.png", "--heads", "each", "--out", tmp_path / "heads").output


def test_mistakes_are_one_line(photos: Path, tmp_path: Path) -> None:
    a = photos / "a.png"
    for arguments, message in (
        ((a, "--token", "left"), "token: expected X,Y in pixels such as 320,240, shares such as 50%,25%, or an index"),
        ((a, "--token", "160,0"), "token: expected a place in a picture 160 wide and 120 high; got 160, 0"),
        ((a, "--token", "101%,0%"), "token: expected shares of at most 100%; got '101%,0%'"),
        ((a, "--token", "0.5,0.25"), "token: expected pixels, or shares such as 50%,25%; got '0.5,0.25'"),
        ((a, "--token", "145"), "token: expected an index in -145..144"),
        ((a, "--token", "3", "--method", "cls"), "token: expected --method token with it; got --method cls"),
        ((a, "--method", "token"), "token: expected a token for --method token, such as --token 50%,50%; got none"),
        ((a, "--scale", "all"), "scale: expected one of each, shared; got 'all'"),
        ((a, "--model", "demo", "--model", "demo"), "model: expected different models; got demo, demo"),
        ((a, *TIMM, "--model", "demo", "--checkpoint", a), "checkpoint: expected one --model with it; got 2"),
    ):
        result = run("show", *arguments, "--out", tmp_path / "out", code=2)
        assert result.stderr.startswith("attnx: ")
        assert message in result.stderr
        assert not (tmp_path / "out").exists()
    pixels = run("extract", photos, "--model", "demo", "--token", "3,4", "--out", tmp_path / "out", code=2)
    assert "token: expected shares such as 50%,25%, since pictures have different sizes; got 3,4" in pixels.stderr
    both = run("extract", photos, "--store", "rows", "--token", "3", "--out", tmp_path / "out", code=2)
    assert "token: only for --store map; got --store rows" in both.stderr


def test_places() -> None:
    layout = attnx.TokenLayout(1, (12, 12))
    assert Place.parse("320,240") == Place(None, 320, 240)
    assert Place.parse("12.5%, 99.9%").token(layout, None) == layout.token(11, 1)
    assert Place.parse("100%,100%").token(layout, None) == layout.token(11, 11)
    assert Place.parse("-3").token(layout, None) == -3
    for text in ("", "1,", "1;2", "1%,2", "a,b", "1,2,3", "nan,1", "1e3,2", "-1,2"):
        with pytest.raises(ValueError, match="token: expected X,Y in pixels"):
            Place.parse(text)


def test_one_model_and_one_photo_are_in_memory(photos: Path) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []
    pictures: list[weakref.ref[Image.Image]] = []

    def alone(former: "list[Any]") -> bool:
        gc.collect()
        return all(each() is None for each in former)

    def load(name: str) -> Loaded:
        assert alone(models)
        loaded = attnx.load("demo")
        models.append(weakref.ref(loaded.model))
        return loaded

    def read(path: Path) -> Image.Image:
        assert alone(pictures)
        picture = read_image(path)
        pictures.append(weakref.ref(picture))
        return picture

    def done(name: str, loaded: Loaded, column: list[Shown]) -> None:
        assert loaded.model is models[-1]()
        assert [shown.amap.shape for shown in column] == [(12, 12)] * 2

    names = ["a.png", "b.png"]
    taken = ((name, lambda name=name: read(photos / name), read(photos / name)) for name in names)
    sheet = photos_module.table_of_photos(
        taken, ["first", "second", "third"], load, Request(), Style(), torch.device("cpu"), done
    )
    assert len(models) == 3
    assert len(pictures) == 6
    assert sheet.titles == ("a.png", "first", "second", "third", "b.png", "first", "second", "third")


def counted(monkeypatch: pytest.MonkeyPatch, owners: list[Any], name: str, call: Callable[..., Any]) -> list[Any]:
    """The first argument of each call of a function that the owners have imported."""
    calls: list[Any] = []

    def count(first: Any, *rest: Any, **options: Any) -> Any:
        calls.append(first)
        return call(first, *rest, **options)

    for owner in owners:
        monkeypatch.setattr(owner, name, count)
    return calls


def test_the_map_of_each_model_is_computed_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, [photos_module, one_image], "main_map", main_map)
    run("show", photos / "a.png", "--no-pretrained", "--image-size", "96", "--out", tmp_path / "one")
    assert len(calls) == 1
    run("show", photos / "a.png", "--model", "demo", *TIMM, "--image-size", "96", "--out", tmp_path / "two")
    assert len(calls) == 3
    with Image.open(tmp_path / "one/overlay.png") as one, Image.open(tmp_path / "two/demo/overlay.png") as two:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_a_photo_is_decoded_once_per_model(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "aa.png").write_bytes((photos / "a.png").read_bytes()[:200])
    calls = counted(monkeypatch, [attnx.images], "read_image", read_image)
    result = run("show", photos, "--limit", 2, "--model", "demo", *TIMM, "--image-size", "96", "--out", tmp_path / "o")
    assert [path.name for path in calls] == ["a.png", "aa.png", "b.png", "a.png", "b.png"]
    assert result.stderr.count("aa.png") == 1
    assert result.stderr.count("attnx: only the first 2 images; --limit shows more") == 1


def test_a_folder_without_photos_needs_no_model(photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    result = run("show", photos, "--model", "timm:no_such_model", "--out", tmp_path / "out", code=2)
    assert result.stderr.count("\n") == 4
    assert "image: expected a folder with images that can be read; got " in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_matrix_has_the_size_of_the_pictures_of_its_sheet() -> None:
    shown, picture = Shown(torch.rand(10, 5), "map", "matrix"), Image.new("RGB", (64, 64))
    assert shown.over(picture, Style())[0].size == (384, 768)
    assert shown.over(picture, Style(), side=256)[0].size == (128, 256)


@pytest.mark.parametrize(("tile", "size"), [(64, (32, 64)), (None, (384, 768))])
def test_a_sheet_of_matrices(tile: int | None, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos_module, "main_map", lambda *_: Shown(torch.rand(10, 5), "map", "matrix"))
    picture, style = Image.new("RGB", (100, 100)), Style(tile=tile, scale="shared", colorbar=True)
    sheet = photos_module.table_of_photos(
        [("a", lambda: picture, picture)], ["demo"], attnx.load, Request(), style, torch.device("cpu")
    )
    assert sheet.tiles[0].size == size
    # A matrix has no limits, so nothing is shared.
    assert sheet.shared is None
