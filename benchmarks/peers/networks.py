"""The models of the whole-model benchmarks, with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Spec(NamedTuple):
    """A model, its image size in pixels, and the contestants for its family, the eager one last."""

    build: Callable[[], nn.Module]
    image_size: int
    contestants: tuple[str, ...]


class Run(NamedTuple):
    """A model and its batch size."""

    model: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model} b{self.batch}"


def build(name: str) -> nn.Module:
    """The model in eval mode, fp32, on the CPU, with the same weights in every process.

    The projections of q and k are scaled by 4. At initialisation attention is almost uniform, and wrong maps pass.
    """
    torch.manual_seed(0)
    model = SPECS[name].build().eval().requires_grad_(False)
    projections = [m for n, m in model.named_modules() if n.rpartition(".")[2] in _PROJECTIONS]
    if not projections:
        raise ValueError(f"{name}: expected projections called {', '.join(sorted(_PROJECTIONS))}; found none")
    for projection in projections:
        projection.weight.mul_(4)
    return model


def images(name: str, device: str, batch: int) -> Tensor:
    """[B, 3, height, width] fp32 noise of the model's size."""
    size = SPECS[name].image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator).to(device)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _hugging_face(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**options), add_pooling_layer=False)


_PROJECTIONS = {"qkv", "query", "key", "q_proj", "k_proj"}
_TIMM = ("plain", "attnx", "extractor", "extractor_graph", "cls", "hooks")
_HF = ("plain", "attnx", "extractor", "cls", "output_attentions")
GROWTH = (224, 384, 512, 768, 1024)  # image sizes of the growth suite's ViT-Ti/16

SPECS = {
    "vit_base_patch16_224": Spec(lambda: _timm("vit_base_patch16_224"), 224, _TIMM),
    "vit_base_patch16_384": Spec(lambda: _timm("vit_base_patch16_384"), 384, _TIMM),
    # With the default init_values, the layers add almost nothing to their inputs.
    "vit_base_patch14_518": Spec(lambda: _timm("vit_base_patch14_dinov2", init_values=1.0), 518, _TIMM),
    **{
        f"vit_tiny_patch16_{size}": Spec(partial(_timm, "vit_tiny_patch16_224", img_size=size), size, _TIMM)
        for size in GROWTH
    },
    "vit_base_patch16_2048": Spec(lambda: _timm("vit_base_patch16_224", img_size=2048), 2048, _TIMM),
    "vit_small_patch8_480": Spec(lambda: _timm("vit_small_patch8_224", img_size=480), 480, _TIMM),
    "hf_vit_base_224": Spec(lambda: _hugging_face(), 224, _HF),
    "tiny": Spec(lambda: _timm("vit_tiny_patch16_224", img_size=64, depth=3), 64, _TIMM),
    "hf_tiny": Spec(
        lambda: _hugging_face(
            image_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
        ),
        64, _HF,
    ),
}  # fmt: skip

# The most important first, because the last are cut at the time limit.
RUNS = {
    "quick": (Run("tiny", 2), Run("hf_tiny", 2)),
    "cpu": (
        Run("vit_base_patch16_224", 8),
        Run("vit_base_patch16_384", 2),
        Run("vit_small_patch8_480", 1),
        Run("vit_base_patch14_518", 1),
        Run("vit_tiny_patch16_224", 1),
        Run("hf_vit_base_224", 4),
    ),
    "cuda": (
        Run("vit_base_patch16_224", 64),
        Run("vit_base_patch16_384", 64),
        Run("vit_base_patch14_518", 64),
        Run("vit_base_patch16_224", 1),
        Run("hf_vit_base_224", 64),
        Run("vit_small_patch8_480", 4),
        Run("vit_base_patch16_2048", 1),
        Run("vit_base_patch16_2048", 2),
        Run("vit_base_patch16_224", 256),
    ),
}
