"""The command line: results, messages and exit codes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import attnx
from attnx.cli.main import app
from attnx.images import read_image
from attnx.models.loading import load_model

RANDOM = ["--model", "timm:vit_tiny_patch16_224", "--no-pretrained", "--image-size", "48x64", "--device", "cpu"]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def fails(*args: object) -> str:
    """The last line on standard error of a command that exits with code 2."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    return lines[-1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 80)), ("b.jpg", (90, 50)), ("sub/c.png", (40, 40))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_help_teaches() -> None:
    text = run("--help").output
    assert all(word in text for word in ("demo", "show", "extract", "Exit codes"))
    assert "--no-pretrained" in run("extract", "--help").output


def test_demo(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path, "--scenes", 6)
    assert result.exit_code == 0, result.output
    assert "6 unseen scenes" in result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 6
    assert set(results["pointing_game"]) == {"rollout", "cls", "random"}
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 192
    assert len(list(attnx.open(tmp_path / "rollout"))) == 6
    assert f"open {tmp_path / 'explore.html'} and {tmp_path / 'browse' / 'index.html'} in a browser" in result.output
    for page in ("explore.html", "browse/index.html"):
        assert "Content-Security-Policy" in (tmp_path / page).read_text()
    # A second demo replaces the first. Files of other jobs are not changed.
    assert run("demo", "--out", tmp_path, "--scenes", 4).exit_code == 0
    assert len(list(attnx.open(tmp_path / "cls"))) == 4
    extracted = tmp_path / "x" / "rollout"
    assert run("extract", tmp_path / "scenes", "--out", extracted).exit_code == 0
    assert "holds a job with other settings" in fails("demo", "--out", tmp_path / "x")
    assert len(list(attnx.open(extracted))) == 4
    assert "scenes: expected at least 1" in fails("demo", "--out", tmp_path / "x", "--scenes", 0)


@pytest.mark.parametrize(
    ("method", "options", "shape"),
    [("rollout", [], (3, 4)), ("cls", [], (3, 4)), ("cls", ["--heads", "each"], (3, 3, 4)), ("layers", [], (12, 3, 4))],
)
def test_extract_is_the_api(photos: Path, tmp_path: Path, method: str, options: list, shape: tuple) -> None:
    out = tmp_path / "maps"
    result = run(
        "extract", photos, "--out", out, "--method", method, *RANDOM, *options, "--batch-size", 2, "--pixels", "whole"
    )
    assert result.exit_code == 0, result.output
    assert "maps of 3 images in" in result.output
    rows = list(attnx.open(out))
    assert [(r.key, r.width, r.height) for r in rows] == [("a.png", 80, 60), ("b.jpg", 50, 90), ("sub/c.png", 40, 40)]
    torch.manual_seed(0)
    loaded = load_model("timm:vit_tiny_patch16_224", pretrained=False, image_size=(48, 64))
    heads = "each" if "each" in options else "mean"
    for row in rows:
        with torch.no_grad(), attnx.capture(loaded.model, heads=heads) as trace:
            loaded.model(loaded.prepare(read_image(photos / row.key))[None])
        want = {"rollout": attnx.rollout, "cls": attnx.cls_map, "layers": lambda t: attnx.layer_maps(t).maps}[method]
        assert row.map is not None
        assert row.map.shape == shape
        np.testing.assert_allclose(row.map, want(trace)[0].numpy(), rtol=2e-3, atol=1e-6)
    settings = attnx.open(out).settings
    assert (settings["model"], settings["method"], settings["pixels"]["size"]) == (RANDOM[1], method, [48, 64])


def reference(maps: list[torch.Tensor]) -> torch.Tensor:
    """Abnar & Zuidema's product of eager per-head maps [B, H, N, N], in float64: [B, N, N]."""
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for each in maps:
        mixed = each.double().mean(1) + torch.eye(each.shape[-1], dtype=torch.float64)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


@pytest.mark.parametrize("family", ["ViT", "Dinov2WithRegisters"])
def test_extract_is_eager_attention_and_the_papers_arithmetic(family: str, photos: Path, tmp_path: Path) -> None:
    """Uses the photos in the folder ATTNX_PHOTOS if it is set."""
    import transformers

    small = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 64}
    config = getattr(transformers, f"{family}Config")(**small, image_size=48, patch_size=8)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "model")
    model = f"hf:{tmp_path / 'model'}"
    source = Path(os.environ.get("ATTNX_PHOTOS", photos))
    result = run("extract", source, "--model", model, "--out", tmp_path / "maps", "--device", "cpu")
    assert result.exit_code == 0, result.output
    loaded = load_model(model)
    loaded.model.set_attn_implementation("eager")
    for row in attnx.open(tmp_path / "maps"):
        image = loaded.prepare(read_image(source / row.key))[None]
        with torch.no_grad():
            maps = loaded.model(image, output_attentions=True).attentions
        want = reference(list(maps))[0, 0, -36:].view(6, 6)
        assert row.map is not None
        np.testing.assert_allclose(row.map, want.numpy(), rtol=1e-3, atol=1e-7)


def test_extract_records_what_it_cannot_read(photos: Path, tmp_path: Path) -> None:
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:300])
    (photos / "d.jpg").write_text("no image")
    result = run("extract", photos, "--out", tmp_path / "maps", *RANDOM)
    assert result.exit_code == 1
    assert "maps of 2 images in" in result.output
    assert "2 images have an error" in result.output
    errors = {r.key: r.error for r in attnx.open(tmp_path / "maps")}
    assert errors["a.png"] is None
    assert "b.jpg" in (errors["b.jpg"] or "")
    assert errors["d.jpg"]


@pytest.mark.parametrize("method", ["rollout", "cls", "layers"])
def test_show(photos: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "pictures"
    layers = ["--layers", "blocks.0", "--layers", -1]
    result = run("show", photos / "b.jpg", "--out", out, "--method", method, *RANDOM, *layers)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == ["heads.png", "layers.png", "masks.png", "overlay.png"]
    with Image.open(out / "overlay.png") as overlay:
        assert overlay.size == (50, 90)


def test_show_without_class_token_says_what_is_missing(photos: Path, tmp_path: Path) -> None:
    import transformers

    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    config = transformers.SiglipVisionConfig(**small, image_size=48, patch_size=16, vision_use_head=False)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    model = ["--model", f"hf:{tmp_path / 'siglip'}"]
    result = run("show", photos / "a.png", "--out", tmp_path / "out", *model)
    assert result.exit_code == 0, result.output
    assert "no heads.png, masks.png and layers.png: the model has no class token" in result.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["overlay.png"]
    line = fails("extract", photos, "--method", "cls", "--out", tmp_path / "maps", *model)
    assert "the model has no class token" in line
    assert not list((tmp_path / "maps").glob("part*"))


def test_checkpoint(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), pretrained=False)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    arguments = ["--model", "timm:vit_tiny_patch16_224", "--image-size", "48x64", "--checkpoint"]
    result = run("extract", photos, "--out", tmp_path / "maps", *arguments, tmp_path / "w.pth")
    assert result.exit_code == 0, result.output
    torch.save({"blocks.0.weight": torch.zeros(3)}, tmp_path / "bad.pth")
    line = fails("extract", photos, "--out", tmp_path / "other", *arguments, tmp_path / "bad.pth")
    assert "missing: cls_token" in line
    assert "unexpected: blocks.0.weight" in line


def test_mistakes_are_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "maps"]
    for arguments, said in [
        (["extract", tmp_path / "none", *out], f"{tmp_path / 'none'}, which does not exist"),
        (["extract", tmp_path / "empty", *out], f"{tmp_path / 'empty'}"),
        (["extract", photos, "--model", "vit", *out], "got 'vit'"),
        (["extract", photos, "--checkpoint", tmp_path / "no.pth", *out], "expected a file"),
        (
            ["extract", photos, "--method", "magic", *out],
            "expected one of rollout, cls, layers, token; got 'magic'",
        ),
        (["extract", photos, "--heads", "sum", *out], "heads: expected one of mean, max, min, each; got 'sum'"),
        (["extract", photos, "--heads", "each", *out], "--heads each is for methods"),
        (["extract", photos, "--layers", "block.9", *out], "'block.9' matches no module"),
        (["extract", photos, "--dtype", "int8", *out], "dtype: expected one of float32, bfloat16, float16; got 'int8'"),
        (["extract", photos, "--device", "gpu7", *out], "device: expected one that torch can use here; got 'gpu7'"),
        (
            ["extract", photos, "--image-size", "4x5x6", *out],
            "expected pixels such as 480, or HEIGHTxWIDTH",
        ),
        (["extract", photos, "--residual", "2", *out], "expected residual in [0, 1]"),
        (["extract", photos, "--start", "9", *out], "start: expected a layer index in 0..3; got 9"),
        (["extract", photos, "--out", tmp_path / "file"], f"{tmp_path / 'file'}"),
        (["extract", photos, "--batch-size", "0", *out], "batch-size"),
        (["show", tmp_path / "file", *out], f"{tmp_path / 'file'}"),
        (["show", photos / "a.png", "--cmap", "mud", *out], "cmap: expected turbo"),
        (["show", photos / "a.png", "--alpha", "2", *out], "alpha: expected 0..1, got 2"),
        (["show", photos / "a.png", "--mass", "2", *out], "mass: expected a share in [0, 1]; got 2"),
        (["show", photos / "a.png", "--out", tmp_path / "file"], f"{tmp_path / 'file'}"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in " ".join(result.stderr.split()), (arguments, result.stderr)
    assert not (tmp_path / "maps").exists() or not list((tmp_path / "maps").glob("part*"))
