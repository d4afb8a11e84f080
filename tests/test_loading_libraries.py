"""Models of torchvision, open_clip and torch.hub folders by name."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_job import draw
from test_cli import fails, run
from torch import Tensor

import attnx
from attnx import Extractor
from attnx.models.loaded import Loaded
from attnx.models.loading import load_model
from attnx.models.pixels import Pixels

torchvision = pytest.importorskip("torchvision")
open_clip = pytest.importorskip("open_clip")

# Small enough to be built in a fraction of a second.
CLIP = "ViT-S-32-alt"
HUBCONF = """
dependencies = ["torch"]
import torch
from pieces import Tiny

def tiny(*, pretrained=True, width=48):
    model = Tiny(width)
    if pretrained:
        torch.nn.init.ones_(model.cls_token)
    return model

def always():
    return Tiny(48)

def number(pretrained=True):
    return 3

def broken(pretrained=True):
    raise KeyError("no such size")

def offline(pretrained=True):
    from urllib.error import URLError
    raise URLError("no route")
"""
PIECES = """
import torch, timm

class Tiny(timm.models.VisionTransformer):
    def __init__(self, width):
        super().__init__(img_size=64, patch_size=16, embed_dim=width, depth=2, num_heads=3, num_classes=0)
        self.pretrained_cfg = {}
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "pieces.py").write_text(PIECES)
    return folder


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def prepared(pixels: Pixels, image: Image.Image) -> Tensor:
    """The input of the model in a job."""
    return pixels.normalise(torch.from_numpy(np.array(pixels(image)[0]))[None])[0]


def loaded_as(name: str, transform: Any, size: tuple[int, int]) -> Loaded:
    """A `Loaded` with the preprocessing of `load_torchvision`, without the model."""
    from attnx.models.torchvision import crop_share

    share = crop_share(transform.crop_size[0], transform.resize_size[0])
    return Loaded(
        f"torchvision:{name}", torch.nn.Identity(), size, transform.mean, transform.std,
        transform.interpolation.value, crop_pct=share,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(300, 420), (333, 101), (224, 224)])
def test_torchvisions_own_preparation(shape: tuple[int, int]) -> None:
    loaded = load_model("torchvision:vit_b_32", pretrained=False)
    transform = torchvision.models.ViT_B_32_Weights.DEFAULT.transforms()
    image = picture(*shape)
    torch.testing.assert_close(prepared(loaded.pixels("timm"), image), transform(image), rtol=0, atol=1e-6)


def test_every_torchvision_model_has_its_crop() -> None:
    """The resized side is torchvision's, although the crop is stored as a share of it."""
    names = torchvision.models.list_models(module=torchvision.models)
    seen = set()
    for name in names:
        transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        crop = transform.crop_size[0]
        key = (crop, transform.resize_size[0], transform.interpolation)
        if key not in seen:
            seen.add(key)
            pixels, image = loaded_as(name, transform, (crop, crop)).pixels("timm"), picture(97, 150)
            torch.testing.assert_close(prepared(pixels, image), transform(image), rtol=0, atol=1e-6)
    assert len(seen) > 10


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(300, 420), (333, 101)])
def test_open_clips_own_preparation(mode: str, shape: tuple[int, int]) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from attnx.models.open_clip import _prepared

    config = PreprocessCfg(size=(224, 224), resize_mode=mode, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    tower = torch.nn.Identity()
    tower.preprocess_cfg = vars(config)
    transform, image = image_transform_v2(config, is_train=False), picture(*shape)
    pixels = _prepared("open_clip:x", tower, None).pixels("timm")
    torch.testing.assert_close(prepared(pixels, image), transform(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["torchvision:vit_b_32", f"open_clip:{CLIP}"])
@pytest.mark.parametrize("size", [None, 96])
def test_maps(name: str, size: int | None) -> None:
    torch.manual_seed(0)
    loaded = load_model(name, pretrained=False, image_size=size)
    side = (size or loaded.size[0]) // 32
    images = torch.randn(1, 3, *loaded.size)
    for method in ("cls", "rollout"):
        assert Extractor(loaded.model, method)(images).shape == (1, side, side)
    with torch.no_grad(), attnx.capture(loaded.model) as trace:
        loaded.model(images)
    assert trace.layout == attnx.TokenLayout(prefix=1, grid=(side, side), cls=True)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.long
def test_a_torchvision_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    want = torchvision.models.get_model("vit_b_32", weights=None, image_size=64).state_dict()
    torch.save(want, tmp_path / "w.pth")
    got = load_model("torchvision:vit_b_32", checkpoint=tmp_path / "w.pth", image_size=64).model.state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(ValueError, match=r"doesn't fit VisionTransformer: .*pos_embedding"):
        load_model("torchvision:vit_b_32", checkpoint=tmp_path / "w.pth", image_size=96)


def test_torchvisions_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read with weights_only=True. Position embeddings are interpolated to another size."""
    torch.manual_seed(1)
    own = torchvision.models.get_model("vit_b_32", weights=None)
    asked = {}

    def get_state_dict(self: Any, **options: Any) -> dict[str, Tensor]:
        asked.update(options, weights=self)
        return own.state_dict()

    kind = torchvision.models.ViT_B_32_Weights
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    got = load_model("torchvision:vit_b_32").model
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in got.state_dict().items())
    assert (asked["weights"], asked["weights_only"], asked["check_hash"]) == (kind.DEFAULT, True, True)
    assert load_model("torchvision:vit_b_32", image_size=96).model.encoder.pos_embedding.shape == (1, 10, 768)


@pytest.mark.long
def test_an_open_clip_checkpoint(tmp_path: Path) -> None:
    """A file of the whole model, or of the image tower; position embeddings are interpolated."""
    torch.manual_seed(1)
    clip = open_clip.create_model(CLIP, pretrained=None)
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path / "clip.pt")
    torch.save(clip.visual.state_dict(), tmp_path / "visual.pt")
    want = clip.visual.state_dict()
    for file in ("clip.pt", "visual.pt"):
        got = load_model(f"open_clip:{CLIP}", checkpoint=tmp_path / file).model.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    resized = load_model(f"open_clip:{CLIP}", checkpoint=tmp_path / "clip.pt", image_size=96).model
    same = open_clip.create_model(CLIP, pretrained=str(tmp_path / "clip.pt"), force_image_size=96).visual
    assert torch.equal(resized.positional_embedding, same.positional_embedding)
    torch.save({"visual.class_embedding": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt doesn't fit VisionTransformer: \d+ missing"):
        load_model(f"open_clip:{CLIP}", checkpoint=tmp_path / "other.pt")


def test_quickgelu_is_that_of_the_weights() -> None:
    def activation(name: str) -> str:
        return type(load_model(name, pretrained=False).model.transformer.resblocks[0].mlp.gelu).__name__

    assert activation("open_clip:ViT-B-32/openai") == "QuickGELU"
    assert activation("open_clip:ViT-B-32/laion2b_s34b_b79k") == "GELU"


def test_open_clip_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    load_model(f"open_clip:{CLIP}", pretrained=False)
    assert (root.level, list(root.handlers)) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:vit_b_23", "torchvision has no model 'vit_b_23'; did you mean vit_b_32"),
        ("torchvision:fasterrcnn_resnet50_fpn", "is not for classification of images"),
        ("torchvision:", "model: expected timm:NAME, hf:NAME, torchvision:NAME"),
        ("open_clip:ViT-B-23", "open_clip has no model 'ViT-B-23'; did you mean ViT-B-32"),
        ("open_clip:ViT-B-32/laion3b", "open_clip:ViT-B-32: expected one of openai, .*; got 'laion3b'"),
        ("open_clip:ViT-B-32", "expected open_clip:ViT-B-32/PRETRAINED, with PRETRAINED one of openai"),
        ("open_clip:hf-hub:org/repo", "open_clip has no model"),
        ("torchhub:facebookresearch/dinov2:dinov2_vits14", "expected a folder on this machine with a hubconf.py"),
        ("torchhub:x", "expected torchhub:FOLDER:ENTRY; got torchhub:x"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        load_model(name)


@pytest.mark.parametrize("library", ["torchvision", "open_clip"])
def test_a_library_that_cannot_be_imported(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As torchvision built for another torch, whose import raises RuntimeError."""
    monkeypatch.delitem(sys.modules, library)

    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == library:
            raise RuntimeError("operator torchvision::nms does not exist")

    finder = type("Finder", (), {"find_spec": staticmethod(find_spec)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    picture(40, 50).save(tmp_path / "a.png")
    told = fails("show", tmp_path / "a.png", "--model", f"{library}:x", "--out", tmp_path / "out")
    assert f"{library} can't be imported (operator torchvision::nms does not exist); pip install" in told


def test_a_hub_folder(hub: Path, tmp_path: Path) -> None:
    path = list(sys.path)
    own = load_model(f"torchhub:{hub}:tiny")
    assert torch.equal(own.model.cls_token, torch.ones_like(own.model.cls_token))
    assert own.size == (64, 64)
    random = load_model(f"torchhub:{hub}:tiny", pretrained=False)
    assert not torch.equal(random.model.cls_token, own.model.cls_token)
    torch.save(random.model.state_dict(), tmp_path / "w.pth")
    again = load_model(f"torchhub:{hub}:tiny", checkpoint=tmp_path / "w.pth")
    assert torch.equal(again.model.cls_token, random.model.cls_token)
    assert Extractor(own.model, "rollout")(torch.randn(1, 3, 64, 64)).shape == (1, 4, 4)
    for pretrained in (False, True):
        with pytest.warns(UserWarning, match="has no argument pretrained"):
            load_model(f"torchhub:{hub}:always", pretrained=pretrained)
    assert sys.path == path


def test_hub_folders_with_modules_of_one_name(tmp_path: Path) -> None:
    for folder, width in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sizes_of_model.py").write_text(f"WIDTH = {width}")
        (tmp_path / folder / "hubconf.py").write_text(
            "from torch import nn\n\ndef tiny(pretrained=True):\n"
            "    from sizes_of_model import WIDTH\n    return nn.Linear(WIDTH, 1)\n"
        )
    for folder, width in (("a", 3), ("b", 5), ("a", 3)):
        assert load_model(f"torchhub:{tmp_path / folder}:tiny").model.in_features == width


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("tinny", ValueError, "has no entry 'tinny'; did you mean tiny"),
        ("number", ValueError, "expected an nn.Module; got int"),
        ("broken", ValueError, "fails: KeyError: 'no such size'"),
        ("offline", ConnectionError, r"could not be downloaded \(.*no route.*\); pass checkpoint=FILE"),
    ],
)
def test_a_hub_entry_that_fails(hub: Path, entry: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(f"torchhub:{hub}:{entry}")


def test_hub_code_that_does_not_run(hub: Path) -> None:
    (hub / "hubconf.py").write_text("import no_such_package")
    with pytest.raises(ValueError, match="fails: ModuleNotFoundError: No module named 'no_such_package'"):
        load_model(f"torchhub:{hub}:tiny")
    (hub / "hubconf.py").write_text("raise SystemExit(0)")
    with pytest.raises(ValueError, match="fails: SystemExit: it exits"):
        load_model(f"torchhub:{hub}:tiny")
    (hub / "hubconf.py").unlink()
    with pytest.raises(ValueError, match=r"expected a folder on this machine with a hubconf.py; got '.*hub'"):
        load_model(f"torchhub:{hub}:tiny")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchvision:vit_b_32", marks=pytest.mark.slow),
        pytest.param("torchhub:hub:tiny", marks=pytest.mark.long),
    ],
)
def test_a_job_in_worker_processes(name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two worker processes; a relative folder is stored as an absolute one, so that the job can go on elsewhere."""
    draw(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    options = ["--no-pretrained", "--image-size", 64, "--method", "cls", "--shard-size", 2, "--device", "cpu,cpu"]
    result = run("extract", "photos", "--model", name, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    maps = attnx.open(tmp_path / "out")
    assert maps.settings["model"] == name.replace("hub:tiny", f"{hub}:tiny")
    assert [row.error for row in maps] == [None] * 3
    side = 4 if "hub:" in name else 2
    assert {row.map.shape for row in maps} == {(side, side)}
    monkeypatch.chdir("/")
    again = run("extract", tmp_path / "photos", "--model", maps.settings["model"], "--out", tmp_path / "out", *options)
    assert again.exit_code == 0, again.output
    assert "3 rows from earlier runs" in again.output
