"""Rollout and relevance through windows and patch mergings, against products of dense matrices in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from families_timm import FAMILIES, sharpen, torchvision_swin
from torch import Tensor, nn

import attnx
from attnx.methods.chain import self_attention
from attnx.trace.trace import Trace
from attnx.trace.window_record import PatchMerge

pytestmark = pytest.mark.long

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def timm_swin(name: str, size: Any, window: int) -> nn.Module:
    return timm.create_model(name, img_size=size, patch_size=2, window_size=window, **SMALL)


def huggingface_swin(name: str, window: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 60, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = getattr(transformers, f"{name}Config")(window_size=window, num_labels=5, **sizes)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def torchvision(v2: bool) -> nn.Module:
    pytest.importorskip("torchvision")
    return torchvision_swin(v2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "timm v1": (partial(timm_swin, "swin_tiny_patch4_window7_224", 56, 7), (56, 56)),
    "timm v1 padded": (partial(timm_swin, "swin_tiny_patch4_window7_224", (60, 44), 4), (60, 44)),
    "timm v2": (partial(timm_swin, "swinv2_tiny_window8_256", 32, 4), (32, 32)),
    "timm v2 cr": (partial(timm_swin, "swinv2_cr_tiny_ns_224", 32, 4), (32, 32)),
    "transformers v1 padded": (partial(huggingface_swin, "Swin", 4), (60, 60)),
    "transformers v2 padded": (partial(huggingface_swin, "Swinv2", 4), (60, 60)),
    "torchvision v1 odd": (partial(torchvision, False), (36, 28)),
    "torchvision v2 odd": (partial(torchvision, True), (36, 28)),
}


def model_and_images(name: str) -> tuple[nn.Module, Tensor]:
    make, size = MODELS[name]
    torch.manual_seed(0)
    return sharpen(make().eval()), torch.randn(2, 3, *size)


def dense_steps(trace: Trace, weighted: bool = False) -> list[tuple[Tensor, bool]]:
    """(matrix [B, N, N'], True for a merging) of each step, in float64; test_windows checks each of them."""
    steps = []
    for _, record in self_attention(trace, weighted).steps:
        if isinstance(record, PatchMerge):
            n = record.merged[0] * record.merged[1]
            steps.append((record.vecmat(torch.eye(n, dtype=torch.float64)[None]), True))
        else:
            steps.append((record.map().double(), False))
    return steps


@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_product_of_dense_matrices(name: str) -> None:
    model, images = model_and_images(name)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    product: Tensor | None = None
    for matrix, merges in dense_steps(trace):
        step = matrix if merges else 0.5 * matrix + 0.5 * torch.eye(matrix.shape[-1], dtype=torch.float64)
        product = step if product is None else step @ product
    assert product is not None
    grid = trace.windows(next(iter(trace))).grid
    torch.testing.assert_close(attnx.rollout(trace, query="all").double(), product, rtol=0, atol=1e-6)
    got = attnx.rollout(trace)
    assert got.shape == (2, *grid)
    torch.testing.assert_close(got.double(), product.mean(1).view(2, *grid), rtol=0, atol=1e-7)
    torch.testing.assert_close(got.sum((1, 2)), torch.ones(2), rtol=0, atol=1e-5)
    one = attnx.rollout(trace, query=3)
    torch.testing.assert_close(one.double(), product[:, 3].view(2, *grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["timm v1", "timm v1 padded", "transformers v2 padded", "torchvision v1 odd"])
@pytest.mark.parametrize("options", [{"keep": "qk"}, {"heads": "each"}, {"heads": "max"}])
def test_every_kind_of_record(name: str, options: dict[str, Any]) -> None:
    model, images = model_and_images(name)
    with torch.no_grad(), attnx.capture(model, **options) as trace:
        model(images)
    fused = "max" if options.get("heads") == "max" else "mean"
    with torch.no_grad(), attnx.capture(model, heads=fused) as maps:
        model(images)
    torch.testing.assert_close(attnx.rollout(trace), attnx.rollout(maps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_extractor_gives_the_same(name: str) -> None:
    model, images = model_and_images(name)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    extract = attnx.Extractor(model)
    torch.testing.assert_close(extract(images), attnx.rollout(trace), rtol=0, atol=1e-6)
    assert extract.plan.nbytes == trace.nbytes // 2
    other = images[:, :, : images.shape[2] // 8 * 4]  # another size
    if "timm" not in name:
        with torch.no_grad(), attnx.capture(model) as trace:
            model(other)
        torch.testing.assert_close(extract(other), attnx.rollout(trace), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_relevance_for_a_class(name: str) -> None:
    model, images = model_and_images(name)
    with attnx.capture(model, grad=True) as trace:
        output = model(images)
        logits = getattr(output, "logits", output)
        trace.backward(logits[:, 1].sum())
    steps = dense_steps(trace, weighted=True)
    n = steps[-1][0].shape[-1]
    r = torch.full((2, 1, n), 1 / n, dtype=torch.float64)
    for matrix, merges in reversed(steps):
        r = r @ matrix if merges else r + r @ matrix
    got = attnx.relevance(trace)
    torch.testing.assert_close(got.flatten(1).double(), r[:, 0], rtol=1e-5, atol=1e-7)
    maps = attnx.class_maps(model, images, [1])
    torch.testing.assert_close(maps[:, 0], got, rtol=1e-5, atol=1e-7)
    assert maps.std() > 0


def test_images_of_sam_mix_windows_and_whole_grids() -> None:
    model, (images,) = next(f for f in FAMILIES if f.name == "timm samvit windows").build()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    kinds = [keys.kind for _, keys in trace.all_sides().values()]
    assert kinds == ["windows", "image", "windows"]
    product = torch.eye(16, dtype=torch.float64)
    for matrix, _ in dense_steps(trace):
        product = (0.5 * matrix + 0.5 * torch.eye(16)) @ product
    torch.testing.assert_close(attnx.rollout(trace, query="all").double(), product, rtol=0, atol=1e-6)


REFUSED = {
    "timm maxvit tf": "may mix neighbouring",
    "timm davit": "16 channels",
    "timm twins svt": "may mix neighbouring",
}


@pytest.mark.parametrize("name", REFUSED)
def test_convolutions_between_the_layers_are_refused(name: str) -> None:
    model, (images,) = next(f for f in FAMILIES if f.name == name).build()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    assert any(trace.windows(layer) is not None for layer in trace)
    with pytest.raises(ValueError, match=REFUSED[name]):
        attnx.rollout(trace)


def test_what_windows_do_not_have() -> None:
    model, images = model_and_images("timm v1")
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    with pytest.raises(ValueError, match=r"expected maps over whole images; got windows of 49 of 14 x 14 tokens"):
        attnx.cls_map(trace)
    with pytest.raises(ValueError, match="discard and preset do not apply to windows"):
        attnx.rollout(trace, discard=0.5)
    with torch.no_grad(), attnx.capture(model, layout=attnx.TokenLayout(0, (49, 4))) as trace:
        model(images)
    with pytest.raises(ValueError, match=r"that of the windows, 0 \+ 28 \* 28 tokens; got 0 \+ 49 \* 4"):
        attnx.rollout(trace)


def test_an_extractor_follows_the_size_of_the_images() -> None:
    """Bound forwards know the windows of the last size; images of another size are intercepted."""
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, img_size=(64, 96), window_size=4, strict_img_size=False, **SMALL).eval()
    extract = attnx.Extractor(sharpen(model))
    for size in ((64, 96), (64, 96), (96, 64), (96, 64), (64, 96), (64, 64)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad(), attnx.capture(model) as trace:
            model(images)
        torch.testing.assert_close(extract(images), attnx.rollout(trace), rtol=0, atol=1e-6)
    assert extract.plan.bound
