"""Traces in files, on other devices, as arrays and as tables."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.crossvit import CrossVit
from torch import nn

import attnx
from attnx.trace.moving import on_device
from attnx.trace.qk_record import QKRecord


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=3, num_heads=3, img_size=(64, 96)).eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(2, 2, 1, 1)).eval()


def crossvit() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(img_size=(64, 96), patch_size=(8, 16), embed_dim=(16, 24), num_heads=(2, 3))
    return CrossVit(**sizes, depth=((1, 2, 0),), mlp_ratio=(2.0, 2.0, 1.0)).eval()


def siglip() -> nn.Module:
    torch.manual_seed(0)
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**small, image_size=32, patch_size=16)).eval()


MODELS = {
    "vit": (vit, (64, 96)),
    "swin": (swin, (56, 84)),
    "crossvit": (crossvit, (64, 96)),
    "siglip": (siglip, (32, 32)),
}
METHODS: dict[str, Callable[[attnx.Trace], Any]] = {
    "rollout": attnx.rollout,
    "cls": attnx.cls_map,
    "layers": lambda trace: attnx.layer_maps(trace).maps,
    "token": lambda trace: attnx.token_map(trace, 5, 0, to=True),
    "item": lambda trace: attnx.rollout(trace.item(1)),
    "some": lambda trace: attnx.rollout(trace.select([0, 1])),
    "branches": lambda trace: attnx.branch_rollout(trace)[1],
    "layout": lambda trace: trace.layout,
    "sides": lambda trace: trace.all_sides(),
    "repr": repr,
    "moved": lambda trace: attnx.rollout(trace.to("cpu")),
}


def outcome(method: Callable[[attnx.Trace], Any], trace: attnx.Trace) -> Any:
    """The result of a method, or its error."""
    try:
        return method(trace)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"keep": "qk"}, {"heads": "each", "rows": [0, -1]}], ids=str)
def test_methods_of_a_loaded_trace_give_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    build, size = MODELS[name]
    model, images = build(), torch.randn(2, 3, *size)
    with torch.no_grad(), attnx.capture(model, **options) as trace:
        model(images)
    trace.save(tmp_path / "trace.safetensors")
    loaded = attnx.Trace.load(tmp_path / "trace.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["trace.safetensors"]
    for layer in trace:
        assert torch.equal(loaded[layer], trace[layer])
        assert type(loaded.kept(layer)) is type(trace.kept(layer))
    for method in METHODS.values():
        want, found = outcome(method, trace), outcome(method, loaded)
        assert torch.equal(found, want) if isinstance(want, torch.Tensor) else found == want
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == (tmp_path / "trace.safetensors").read_bytes()


def test_statistics_and_distances_of_a_loaded_trace(tmp_path: Path) -> None:
    for build, size in ((vit, (64, 96)), (swin, (56, 84))):
        model = build()
        with torch.no_grad(), attnx.capture(model, keep="stats", stats=["entropy", "distance", "mass"]) as trace:
            model(torch.randn(2, 3, *size))
        trace.save(tmp_path / "trace.safetensors")
        loaded = attnx.Trace.load(tmp_path / "trace.safetensors")
        for layer, stats in trace.stats.items():
            assert list(loaded.stats[layer]) == list(stats)
            assert loaded.stats[layer].missing == stats.missing
            for name in stats:
                torch.testing.assert_close(loaded.stats[layer][name], stats[name], rtol=0, atol=0, equal_nan=True)
        if build is vit:
            assert torch.equal(attnx.mean_attention_distance(loaded), attnx.mean_attention_distance(trace))
        with pytest.raises(RuntimeError, match="no map was stored"):
            loaded[0]


def test_a_gradient_trace_is_saved_after_its_backward_pass(tmp_path: Path) -> None:
    model = vit()
    with attnx.capture(model, grad=True) as trace:
        logits = model(torch.randn(1, 3, 64, 96))
    path = tmp_path / "trace.safetensors"
    with pytest.raises(ValueError, match="save: no gradient reached this layer"):
        trace.save(path)
    assert not list(tmp_path.iterdir())
    trace.backward(logits[:, 3].sum())
    trace.save(path)
    assert torch.equal(attnx.relevance(attnx.Trace.load(path)), attnx.relevance(trace))
    moved = trace.to("cpu")
    assert torch.equal(attnx.relevance(moved), attnx.relevance(trace))
    assert moved.nbytes == sum(amap.nbytes for amap in trace.values()) < trace.nbytes
    # Nothing of the model's tensors stays in memory.
    tensors = [weakref.ref(tensor) for layer in trace for tensor in trace.kept(layer).held]
    del trace, logits
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


def test_a_broadcast_mask_is_stored_small(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(2, 1, 1, 300).expand(2, 4, 300, 300)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = torch.randn(2, 4, 300, 8)
    model = Padded()
    with torch.no_grad(), attnx.capture(model, keep="qk") as trace:
        model(x)
    trace.save(tmp_path / "trace.safetensors")
    assert (tmp_path / "trace.safetensors").stat().st_size < 2.5 * x.nbytes
    loaded = attnx.Trace.load(tmp_path / "trace.safetensors")
    assert isinstance(loaded.kept(0), QKRecord)
    assert torch.equal(loaded[0], trace[0])


class Masked(nn.Module):
    """Three layers with one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x


def test_a_mask_of_all_layers_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, mask, path = Masked().eval(), torch.randn(256, 256), tmp_path / "trace.safetensors"
    with torch.no_grad(), attnx.capture(model, keep="qk") as trace:
        model(torch.randn(1, 256, 8), mask)
    trace.save(path)
    assert mask.nbytes < path.stat().st_size < 1.5 * mask.nbytes
    loaded = attnx.Trace.load(path)
    assert len({loaded.kept(layer).bias.data_ptr() for layer in loaded}) == 1
    assert all(torch.equal(loaded[layer], trace[layer]) for layer in trace)


def test_a_mask_that_was_written_to_is_neither_saved_nor_moved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, mask = Masked().eval(), torch.randn(16, 16)
    with torch.no_grad(), attnx.capture(model, keep="qk") as trace:
        model(torch.randn(2, 16, 8), mask)
    item = trace.item(0)
    mask += 1
    with pytest.raises(ValueError, match="save: q, k or the mask of a layer was modified in place"):
        trace.save(tmp_path / "trace.safetensors")
    assert not list(tmp_path.iterdir())
    for read in (lambda: trace.to("cpu"), lambda: trace.item(0), lambda: item[0]):
        with pytest.raises(RuntimeError, match="q, k or the mask of a layer was modified in place"):
            read()


def test_another_device_may_not_have_the_backend(tmp_path: Path) -> None:
    model, images, path = vit(), torch.randn(1, 3, 64, 96), tmp_path / "trace.safetensors"
    with torch.no_grad(), attnx.capture(model, keep="qk", backend="eager") as trace:
        model(images)
    record = trace.kept(0)
    assert isinstance(record, QKRecord)
    assert on_device(record, torch.device("cpu")).backend == "eager"
    assert on_device(record, torch.device("meta")).backend == "auto"
    trace.save(path)
    loaded = attnx.Trace.load(path)
    assert loaded.kept(0).backend == "auto"
    torch.testing.assert_close(loaded[0], trace[0], rtol=1e-5, atol=1e-7)


def test_queries_that_are_expanded_are_stored_whole(tmp_path: Path) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.randn(1, 2, 3, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(self.q.expand(len(x), -1, -1, -1), x, x)

    model = Pool()
    with torch.no_grad(), attnx.capture(model, keep="qk") as trace:
        model(torch.randn(4, 2, 10, 8))
    trace.save(tmp_path / "trace.safetensors")
    loaded = attnx.Trace.load(tmp_path / "trace.safetensors")
    assert loaded.kept(0).shape == (4, 3, 10)
    assert torch.equal(loaded[0], trace[0])


def test_selected_layers_stay_in_a_row(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleList([timm.layers.Attention(48, 3)])
            self.b = nn.ModuleList([timm.layers.Attention(48, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b[0](x + self.a[0](x))

    model = Two().eval()
    layout = attnx.TokenLayout(1, (3, 3))
    with torch.no_grad(), attnx.capture(model, layout=layout) as trace:
        model(torch.randn(2, 10, 48))
    chosen = trace.select(["a.0", "b.0"])
    want = attnx.rollout(chosen)
    chosen.save(tmp_path / "trace.safetensors")
    for other in (chosen.to("cpu"), attnx.Trace.load(tmp_path / "trace.safetensors"), chosen.mapped(torch.clone)):
        torch.testing.assert_close(attnx.rollout(other), want)
    torch.testing.assert_close(attnx.rollout(chosen.item(1)), want[1:])


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    model, images = vit(), torch.randn(1, 3, 64, 96)
    with torch.no_grad(), attnx.capture(model, calls="all") as trace:
        for _ in range(2):
            model(images)
    with pytest.raises(ValueError, match=r"save: expected a trace of one pass; got 2; save each of trace\.calls"):
        trace.save(tmp_path / "trace.safetensors")
    trace.calls[1].save(tmp_path / "last.safetensors")
    with pytest.raises(FileNotFoundError):
        attnx.Trace.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text: expected a file of Trace\.save; it is no safetensors file"):
        attnx.Trace.load(tmp_path / "text")
    for about in ("{}", "no JSON", '{"given": 3}'):
        save_file({"a": torch.zeros(2)}, tmp_path / "damaged", metadata={"attnx trace 1": about})
        with pytest.raises(ValueError, match=r"damaged: expected a file of Trace\.save; it is damaged"):
            attnx.Trace.load(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError, match=r"expected a file in a folder that exists; .*nowhere does not"):
        trace.calls[1].save(tmp_path / "nowhere" / "trace.safetensors")
    with pytest.raises(ValueError, match=r"device: expected a device such as 'cpu' or 'cuda'; got torch\.float16"):
        trace.calls[1].to(torch.float16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer: expected one name or index; got \[0, 1\]; trace.select"):
        attnx.cls_map(trace, layer=[0, 1])  # type: ignore[arg-type]
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"expected a file of Trace\.save \(attnx trace 1\); got other tensors"):
        attnx.Trace.load(tmp_path / "other.safetensors")


def test_arrays() -> None:
    model = vit()
    with torch.inference_mode(), attnx.capture(model, keep="qk") as trace:
        model(torch.randn(2, 3, 64, 96))
    arrays = trace.to_numpy()
    assert list(arrays) == list(trace)
    for layer, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, trace[layer].numpy())
        array[:] = 0  # its own memory


def test_a_trace_as_text_and_as_a_table() -> None:
    model = vit()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(2, 3, 64, 96))
    assert repr(trace) == "Trace(3 layers: [2, 25, 25], heads='mean')"
    table = trace._repr_html_()
    assert table.count("<tr>") == 4
    assert table.count('<img src="data:image/png;base64,') == 3
    windowed = swin()
    with torch.no_grad(), attnx.capture(windowed) as windows:
        windowed(torch.randn(1, 3, 56, 84))
    assert len(repr(windows)) < 200
    assert "<img" not in windows._repr_html_()
    assert repr(attnx.Trace(model, "mean", None, None)) == "Trace(no layers, heads='mean')"
