"""`attnx.load`: a model by name, and the preparation of its images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import attnx


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_one_way_in(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    loaded = attnx.load("timm:vit_tiny_patch16_224", pretrained=False, image_size=(96, 160))
    assert not loaded.model.training
    assert repr(loaded) == "Loaded('timm:vit_tiny_patch16_224', VisionTransformer, 96x160)"
    one = loaded.prepare(photo)
    assert one.shape == (3, 96, 160)
    assert torch.equal(loaded.prepare(tmp_path / "photo.png"), one)
    assert torch.equal(loaded.prepare(str(tmp_path / "photo.png")), one)
    assert torch.equal(loaded.prepare([photo, tmp_path / "photo.png"]), torch.stack([one, one]))
    assert attnx.Extractor(loaded.model)(loaded.prepare([photo])).shape == (1, 6, 10)
    assert loaded.crop(photo) == (0, 0, 200, 120)


def test_the_models_own_transform(photo: Image.Image) -> None:
    loaded = attnx.load("timm:vit_tiny_patch16_224", pretrained=False)
    own = create_transform(**resolve_model_data_config(loaded.model), is_training=False)
    assert torch.equal(loaded.prepare(photo, "timm"), own(photo))
    left, top, right, bottom = loaded.crop(photo, "timm")
    np.testing.assert_allclose((top, bottom), (120 * 12 / 248, 120 * 236 / 248), rtol=1e-6)
    assert right - left == pytest.approx(bottom - top, rel=0.01)


def test_the_image_processor(photo: Image.Image, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64, image_size=32, patch_size=16
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=True)
    processor.save_pretrained(tmp_path)
    loaded = attnx.load(f"hf:{tmp_path}")
    want = processor(images=photo, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(loaded.prepare(photo, "processor"), want)


def test_models_of_words() -> None:
    assert repr(attnx.load("albef:demo")) == "Loaded('demo', Albef, 96x96)"
    assert repr(attnx.load("demo")) == "Loaded('demo', VisionTransformer, 96x96)"
    for arguments, message in (
        (("albef",), "checkpoint: expected ALBEF's weights as albef:FILE .* pretrained=False for random ones"),
        (("nothing:x",), "model: expected timm:NAME, .*; got 'nothing:x'"),
        (("timm:vit_tny",), r"model: timm has no model 'vit_tny'; did you mean vit_tiny\?|did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            attnx.load(*arguments)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        attnx.load("albef:none.pth")
    with pytest.raises(ValueError, match=r"vocab: expected none for demo, which reads no words; got 'vocab\.txt'"):
        attnx.load("demo", vocab="vocab.txt")


@pytest.mark.parametrize(
    ("name", "guess"),
    [("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"), ("timm/vit_base", "timm:vit_base"), ("HF:a/b", "hf:a/b"),
     ("facebook/dinov2-base", "hf:facebook/dinov2-base")],
)  # fmt: skip
def test_names_without_a_library_get_a_guess(name: str, guess: str) -> None:
    with pytest.raises(ValueError, match=f"; did you mean {guess}\\?$"):
        attnx.load(name)
    with pytest.raises(ValueError, match=r"name: expected timm:NAME.*albef:FILE, lavt:FILE or demo; got None"):
        attnx.load(None)  # type: ignore[arg-type]


def test_models_in_place_of_what_holds_them() -> None:
    loaded = attnx.load("demo")
    images = loaded.prepare([Image.new("RGB", (96, 96))])
    for call in (attnx.Extractor, attnx.patch, lambda model: attnx.class_maps(model, images),
                 lambda model: attnx.capture(model).__enter__()):  # fmt: skip
        with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module; got Loaded; pass its \.model"):
            call(loaded)
        with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module; got str$"):
            call("demo")
    for call in (attnx.Extractor(loaded.model), lambda images: attnx.class_maps(loaded.model, images)):
        with pytest.raises(ValueError, match=r"images: expected .*; got \[3, 96, 96\]; pass images\[None\]"):
            call(images[0])
    with pytest.raises(ValueError, match="options of method 'relevance': expected start, query; got target"):
        attnx.class_maps(loaded.model, images, target=3)
    assert len({loaded, loaded}) == 1


def test_16_bit_pictures_are_those_of_their_files(tmp_path: Path) -> None:
    grey = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    grey.save(tmp_path / "grey.png")
    loaded = attnx.load("demo")
    assert torch.equal(loaded.prepare(Image.open(tmp_path / "grey.png")), loaded.prepare(tmp_path / "grey.png"))


def test_what_cannot_be_prepared(photo: Image.Image, tmp_path: Path) -> None:
    loaded = attnx.load("demo")
    with pytest.raises(ValueError, match="image: expected a PIL image or the path of one; got ndarray"):
        loaded.prepare(np.asarray(photo))
    with pytest.raises(ValueError, match="got an empty list"):
        loaded.prepare([])
    with pytest.raises(ValueError, match="pixels: expected timm, whole or processor; got 'own'"):
        loaded.prepare(photo, "own")
    with pytest.raises(ValueError, match="pixels: processor is for hf: models that ship one"):
        loaded.prepare(photo, "processor")
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(attnx.images.ImageError, match=r"broken\.jpg"):
        loaded.prepare(tmp_path / "broken.jpg")
