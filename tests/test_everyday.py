"""Common calls: each returns the documented result or raises a clear one-line error."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import attnx
from attnx.cli.main import app


def vit(size: tuple[int, int] = (48, 64), **options: object) -> nn.Module:
    torch.manual_seed(0)
    small = dict(embed_dim=48, depth=3, num_heads=3, img_size=size)
    return timm.create_model("vit_tiny_patch16_224", **small, **options).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def test_layer_maps_of_every_head(images: Tensor) -> None:
    model = vit()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(images)
    found = attnx.layer_maps(trace, heads="each")
    assert found.maps.shape == (2, 3, 3, 3, 4)
    assert found.max.shape == (2, 3, 3, 4)
    for i, layer in enumerate(trace):
        assert torch.equal(found.maps[:, i], attnx.cls_map(trace, layer))
    torch.testing.assert_close(found.maps.mean(2), attnx.layer_maps(trace).maps)
    torch.testing.assert_close(found.maps.amax(2), attnx.layer_maps(trace, heads="max").maps)


def test_rollout_has_no_heads_of_its_own(images: Tensor) -> None:
    model = vit()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(images)
    with pytest.raises(ValueError, match="heads: expected mean, max or min; got 'each'"):
        attnx.rollout(trace, heads="each")


def test_cls_maps_of_several_layers(images: Tensor) -> None:
    model = vit()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(images)
    for heads in ("mean", "each"):
        want = [attnx.cls_map(trace, i).mean(1) if heads == "mean" else attnx.cls_map(trace, i) for i in (0, 2)]
        extract = attnx.Extractor(model, method="cls", layers=[0, 2], heads=heads)
        for _ in range(2):
            torch.testing.assert_close(extract(images), torch.stack(want, 1), rtol=1e-4, atol=1e-7)
        one = attnx.Extractor(model, method="cls", layers=[2], heads=heads)(images)
        torch.testing.assert_close(one, want[1], rtol=1e-4, atol=1e-7)


def test_extract_of_two_layers_writes_both(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    command = ["extract", str(tmp_path / "in"), "--model", "demo", "--method", "cls", "--workers", "0"]
    for name, layers in (("both", ["0", "1"]), ("first", ["0"]), ("second", ["1"])):
        given = [option for layer in layers for option in ("--layer", layer)]
        result = CliRunner().invoke(app, [*command, *given, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    both, first, second = (attnx.open(tmp_path / name) for name in ("both", "first", "second"))
    for row, a, b in zip(both, first, second, strict=True):
        assert row.map is not None
        assert row.map.shape[0] == 2
        np.testing.assert_allclose(row.map, np.stack([a.map, b.map]), rtol=2e-3)


def test_numpy_maps_of_a_job_go_into_the_methods(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "in" / "a.png")
    command = ["extract", str(tmp_path / "in"), "--model", "demo", "--workers", "0", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 0
    amap = attnx.open(tmp_path / "out")[0].map
    assert isinstance(amap, np.ndarray)
    assert attnx.mass_mask(amap).shape == amap.shape
    assert attnx.entropy(amap).ndim == 0


def test_extractor_of_a_model_that_reads_texts_too() -> None:
    import transformers

    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    text = dict(small, vocab_size=60, max_position_embeddings=8)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(small, image_size=32, patch_size=16))
    model = transformers.CLIPModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    for call in (lambda _: attnx.Extractor(model), lambda x: attnx.class_maps(model, x)):
        with pytest.raises(ValueError, match=r"CLIPModel takes input_ids and pixel_values; pass its image part \(mo"):
            call(images)
    ids = dict(input_ids=torch.tensor([[5, 6, 7, 2]]).expand(2, -1))
    got = attnx.Extractor(model, layers="vision_model.*", model_kwargs=ids)(images)
    torch.testing.assert_close(got, attnx.Extractor(model.vision_model)(images), rtol=1e-4, atol=1e-7)


def test_gradient_capture_of_a_model_that_was_not_heard() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    x = torch.randn(1, 5, 8, requires_grad=True)
    with pytest.raises(
        ValueError,
        match=r"backward: no attention was captured: the model was not called .* no attention",
    ):
        with attnx.capture(Written(), grad=True) as trace:
            trace.backward(Written()(x).sum())


def test_one_layer_of_another_shape_does_not_end_the_pass() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = timm.layers.Attention(48, 3)
            self.windows = Windows()

        def forward(self, x: Tensor) -> Tensor:
            return self.windows(self.attn(x))

    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(1, (2, 3))[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0].flatten(1, 2)

    model, x = Mixed().eval(), torch.randn(2, 6, 48)
    with torch.no_grad():
        plain = model(x)
        with pytest.warns(UserWarning, match=r"windows: expected .*; got \[2, 1, 2, 3, 3\]"):
            with attnx.capture(model) as trace:
                heard = model(x)
        with (
            pytest.raises(NotImplementedError, match="windows: expected"),
            attnx.capture(model, layers="windows"),
        ):
            model(x)
    torch.testing.assert_close(heard, plain, rtol=1e-4, atol=1e-5)
    assert list(trace) == ["attn"]


def test_a_layer_that_attends_twice_says_so() -> None:
    block = timm.layers.Attention(48, 3)
    model = nn.Sequential(block, block).eval()
    layout = attnx.TokenLayout(0, (2, 3))
    with torch.no_grad(), attnx.capture(model, layout=layout) as trace:
        model(torch.randn(1, 6, 48))
    with pytest.raises(ValueError, match=r"0 attends more than once in a pass \(0#2\)"):
        attnx.rollout(trace)
