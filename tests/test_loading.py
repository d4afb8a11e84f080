"""Models by name, and weights from files."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from attnx.demo.vit import load_demo_vit
from attnx.models.checkpoint import load_checkpoint, read_weights
from attnx.models.loading import load_model
from attnx.models.registry import IMAGE_MODELS

NAME = "vit_tiny_patch16_224"


def tiny(**options: object) -> nn.Module:
    return timm.create_model(NAME, **{"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 48, **options}).eval()


def differs(model: nn.Module, weights: dict) -> list[str]:
    return [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])]


def test_timm_by_name() -> None:
    torch.manual_seed(0)
    loaded = load_model(f"timm:{NAME}", pretrained=False, image_size=(48, 80))
    assert loaded.size == (48, 80)
    assert not loaded.model.training
    assert tuple(loaded.mean) == (0.5, 0.5, 0.5)
    assert loaded.model(torch.randn(1, 3, 48, 80)).shape == (1, 1000)


def test_huggingface_folder_and_type(tmp_path: Path) -> None:
    import transformers

    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14
    )
    model = transformers.Dinov2WithRegistersModel(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}", image_size=(56, 84))
    assert differs(loaded.model, model.state_dict()) == []
    assert loaded.model(torch.randn(1, 3, 56, 84), **loaded.model_kwargs).last_hidden_state.shape == (1, 29, 48)
    assert load_model(f"hf:{tmp_path}").model_kwargs == {}
    with pytest.raises(ValueError, match="holds no model that transformers can load"):
        (tmp_path / "config.json").write_text("{}")
        load_model(f"hf:{tmp_path}")


def test_the_vision_half_of_clip(tmp_path: Path) -> None:
    import transformers

    half = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        text_config={**half, "vocab_size": 99}, vision_config={**half, "image_size": 48, "patch_size": 16}
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.size == (48, 48)
    assert loaded.model(torch.randn(1, 3, 48, 48)).last_hidden_state.shape == (1, 10, 48)


@pytest.mark.parametrize("wrap", ["plain", "module", "teacher", "nested"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints(tmp_path: Path, wrap: str, suffix: str) -> None:
    weights = tiny().state_dict()
    path = tmp_path / f"weights{suffix}"
    content: dict = {
        "plain": weights,
        "module": {f"module.{k}": v for k, v in weights.items()},
        "teacher": {f"backbone.{k}": v for k, v in weights.items()} | {"head.mlp.0.weight": torch.zeros(2)},
        "nested": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}},
    }[wrap]
    if suffix == ".safetensors":
        if wrap == "nested":
            pytest.skip("a safetensors file holds tensors only")
        save_file(content, path)
    else:
        torch.save({"teacher": content} if wrap == "teacher" else content, path)
    model = tiny()
    load_checkpoint(model, path)
    assert differs(model, weights) == []


def test_checkpoint_of_another_size_is_interpolated(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    model = tiny(img_size=(48, 80))
    load_checkpoint(model, tmp_path / "w.pth")
    assert model.pos_embed.shape == (1, 16, 48)


def test_checkpoint_without_a_classifier(tmp_path: Path) -> None:
    weights = tiny(num_classes=0).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    model = tiny()
    load_checkpoint(model, tmp_path / "w.pth")
    assert weights
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


class Unsafe:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a state dict of tensors; got dict"),
        ([1, 2], "expected a state dict of tensors; got list"),
        (Unsafe(), "expected a torch file of weights only"),
        ({"a.weight": torch.zeros(2)}, r"doesn't fit VisionTransformer: \d+ missing: .*; 1 unexpected: a.weight"),
    ],
)
def test_wrong_checkpoints(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tiny(), tmp_path / "w.pth")


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    torch.save(tiny(embed_dim=96).state_dict(), tmp_path / "w.pth")
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another shape: .*\[1, 1, 96\] for \[1, 1, 48\].* and \d+ more"):
        load_checkpoint(model, tmp_path / "w.pth")
    assert differs(model, before) == []
    (tmp_path / "w.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_checkpoint(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("vit_base", ValueError, "expected timm:NAME, hf:NAME, torchvision:NAME, .* or demo; got 'vit_base'"),
        ("timm:vit_tiny_patch16_22", ValueError, "did you mean vit_tiny_patch16_224"),
    ],
)
def test_unknown_names(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(name)


@pytest.mark.parametrize("name", [f"timm:{NAME}", "hf:nobody/no-such-model"])
def test_no_download(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"could not be downloaded \(.*\); pass checkpoint=FILE"):
        load_model(name)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file"):
        load_model(f"timm:{NAME}", checkpoint=tmp_path / "none.pth")


def test_a_size_that_patches_do_not_cover() -> None:
    with pytest.raises(
        ValueError, match=r"expected multiples of timm:.*'s patch of 16 pixels, such as 96x208; got 100x"
    ):
        load_model(f"timm:{NAME}", pretrained=False, image_size=(100, 202))


def test_a_model_type_has_no_weights() -> None:
    with pytest.raises(ValueError, match="hf:vit is a model type without weights; pass pretrained=False"):
        load_model("hf:vit")


def test_no_download_of_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"the configuration of hf:nobody/none could not be downloaded"):
        load_model("hf:nobody/none", pretrained=False)


def test_how_a_folders_images_are_prepared(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64, image_size=48, patch_size=16
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no image processor"):
        assert tuple(load_model(f"hf:{tmp_path}").mean) == (0.485, 0.456, 0.406)
    transformers.ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=2).save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert (list(loaded.mean), list(loaded.std), loaded.interpolation) == ([0.5] * 3, [0.25] * 3, "bilinear")


def test_a_files_name_may_be_text(tmp_path: Path) -> None:
    weights = timm.create_model(NAME, img_size=48).state_dict()
    path = str(tmp_path / "w.pth")
    torch.save(weights, path)
    assert differs(load_model(f"timm:{NAME}", checkpoint=path, image_size=48).model, weights) == []
    assert set(read_weights(path)) == set(weights)
    load_checkpoint(timm.create_model(NAME, img_size=48), path)
    save_file(weights, tmp_path / "w.safetensors")
    assert set(read_weights(str(tmp_path / "w.safetensors"))) == set(weights)


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_that_is_not_there(tmp_path: Path, name: str, kind: type) -> None:
    path = kind(tmp_path / name)
    for read in (
        lambda: load_model(f"timm:{NAME}", checkpoint=path),
        lambda: load_checkpoint(tiny(), path),
        lambda: read_weights(path),
    ):
        with pytest.raises(FileNotFoundError, match=r"checkpoint: expected a file; .*none\."):
            read()


def test_one_number_is_a_square() -> None:
    loaded = load_model(f"timm:{NAME}", pretrained=False, image_size=48)
    assert loaded.size == (48, 48)
    assert loaded.model(torch.randn(1, 3, 48, 48)).shape == (1, 1000)
    assert load_model("hf:vit", pretrained=False, image_size=48).size == (48, 48)
    assert load_model("demo", image_size=128).size == (128, 128)


WRONG_SIZES = [0, -48, 48.0, "48", True, (48,), (48, 48, 3), (48, 0), (48, 48.0), (48, None)]


@pytest.mark.parametrize("size", WRONG_SIZES, ids=repr)
def test_a_size_that_is_none(size: object) -> None:
    with pytest.raises(ValueError, match=r"image size: expected a positive int, or \(height, width\) of two; got"):
        load_model(f"timm:{NAME}", pretrained=False, image_size=size)


def test_the_folder_of_masks_may_be_text(tmp_path: Path) -> None:
    from attnx.jobs.masks import mask_of

    (tmp_path / "a.png").touch()
    assert mask_of("a.jpg", str(tmp_path)) == tmp_path / "a.png"


def test_a_registered_name_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_MODELS, "mine", lambda pretrained, size: load_demo_vit(pretrained, size))
    loaded = load_model("mine", image_size=128)
    assert loaded.size == (128, 128)
    assert not loaded.model.training
    with pytest.raises(
        ValueError, match=r"model: expected timm:NAME, hf:NAME, .*FOLDER:ENTRY or demo or mine; got 'yours'"
    ):
        load_model("yours")
