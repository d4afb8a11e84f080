"""The models that whole-model benchmarks run: random weights, no download."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Spec(NamedTuple):
    """A model by name; batch sizes for the CPU and for CUDA; which contestants know its family."""

    build: Callable[[], nn.Module]
    image_size: int
    batch: int
    batch_cuda: int
    contestants: tuple[str, ...]


def build(name: str) -> nn.Module:
    """The model of that name in eval mode, fp32, on the CPU; the same weights every time.

    Its scores are made larger: at initialisation attention is all but even, and a wrong map would look right.
    """
    torch.manual_seed(0)
    model = SPECS[name].build().eval().requires_grad_(False)
    projections = [m for n, m in model.named_modules() if n.rpartition(".")[2] in _PROJECTIONS]
    if not projections:
        raise ValueError(f"{name}: expected projections called {', '.join(sorted(_PROJECTIONS))}; found none")
    for projection in projections:
        projection.weight.mul_(4)  # type: ignore[operator]
    return model


def images(name: str, device: str, batch: int | None = None) -> Tensor:
    """[B, 3, height, width] fp32 noise of the model's size."""
    spec = SPECS[name]
    batch = batch or (spec.batch_cuda if device == "cuda" else spec.batch)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, spec.image_size, spec.image_size, generator=generator).to(device)


def _timm(name: str, **options: int) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _hugging_face(**options: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**options), add_pooling_layer=False)


_PROJECTIONS = {"qkv", "query", "key", "q_proj", "k_proj"}
_TIMM = ("plain", "attnx", "extractor", "hooks")
_HF = ("plain", "attnx", "extractor", "output_attentions")

SPECS = {
    "vit_base_patch16_224": Spec(lambda: _timm("vit_base_patch16_224"), 224, 8, 64, _TIMM),
    "vit_small_patch8_480": Spec(lambda: _timm("vit_small_patch8_224", img_size=480), 480, 1, 1, _TIMM),
    "hf_vit_base_224": Spec(lambda: _hugging_face(), 224, 4, 64, _HF),
    "tiny": Spec(lambda: _timm("vit_tiny_patch16_224", img_size=64, depth=3), 64, 2, 2, _TIMM),
    "hf_tiny": Spec(
        lambda: _hugging_face(
            image_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
        ),
        64, 2, 2, _HF,
    ),
}  # fmt: skip
FULL = ("vit_base_patch16_224", "vit_small_patch8_480", "hf_vit_base_224")
QUICK = ("tiny", "hf_tiny")
