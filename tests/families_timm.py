"""Small models of timm, torch, torchvision and open_clip, from the real classes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models import gcvit, metaformer, mvitv2, nest, volo
from torch import nn
from torch.nn import functional as F

CLASSES = 7


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[
        [], tuple[nn.Module, tuple[Any, ...]]
    ]  # model in eval mode, and the positional arguments of its call
    images_only: bool = False  # its call is model(images) and nothing else
    classes: bool = False  # its output is logits [B, classes]
    needs: str | None = None  # a module that may be missing


@torch.no_grad()
def sharpen(model: nn.Module, gain: float = 1.5) -> nn.Module:
    """Draw new weights such that attention is far from uniform: inputs of unit variance give projections of `gain`.

    Convolutions larger than 1 x 1 keep their weights. Layer scales that are initialised near zero become 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
            if convolution and name == "weight" and p[0, 0].numel() > 1:
                continue
            if p.ndim >= 2 and (name.endswith("weight") or "proj" in name):
                p.copy_(draw(p.shape) * gain / p[0].numel() ** 0.5)
            elif p.ndim >= 2:  # position embeddings and bias tables
                p.add_(draw(p.shape) * 0.5)
            elif p.ndim == 1 and not name.endswith("bias") and p.min() >= 0 and p.max() < 0.2:
                p.fill_(0.5)
    return model


@torch.no_grad()
def settle(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Set batch norm statistics from the input. Without this, activations shrink from layer to layer."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        model(*args)
    model.eval()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(2))


def family(name: str, make: Callable[[], nn.Module], *args: Callable[[], torch.Tensor], **more: Any) -> Family:
    """A family whose model is `make()` and whose call has the arguments `arg()` for each of `args`."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(0)
        model = sharpen(make().eval())
        inputs = tuple(arg() for arg in args)
        settle(model, inputs)
        return model, inputs

    return Family(name, build, **more)


def of_images(name: str, make: Callable[[], nn.Module], size: int, **more: Any) -> Family:
    return family(name, make, partial(normal, 2, 3, size, size), images_only=True, **more)


# --- timm ------------------------------------------------------------------------------------------------------------


def timm_family(name: str, variant: str | Callable[..., nn.Module], size: int | None = None, **options: Any) -> Family:
    """timm's `variant` with `options`, or a class if the variant does not allow small sizes.

    `size` is the image size if the class has no option `img_size`.
    """
    make = partial(timm.create_model, variant) if isinstance(variant, str) else variant
    make = partial(make, num_classes=CLASSES, **options)
    return of_images(f"timm {name}", make, size or options["img_size"], classes=True)


def vit_family(name: str, variant: str, **options: Any) -> Family:
    """A plain transformer: 3 blocks, 4 heads of 16, 4 by 4 patches."""
    plain = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return timm_family(name, variant, **plain | options)


SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MAXVIT = {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 1), "stem_width": 16}
FOUR_STAGES = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
TWINS = FOUR_STAGES | {"num_heads": (1, 2, 4, 4), "embed_dims": (16, 32, 64, 64), "img_size": 64}

CROSSVIT = {"img_scale": (1.0, 2 / 3), "embed_dim": (32, 64), "depth": ((1, 2, 0), (1, 1, 0)), "num_heads": (4, 4)}
MVIT = mvitv2.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=16)
VOLO = {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (2, 4, 4, 4)}
NEST = {"embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "depths": (1, 1, 2)}
CAFORMER = {
    "depths": (1, 1, 1, 1),
    "dims": (16, 32, 64, 64),
    "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
    "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
}
GCVIT = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}

TIMM = [
    vit_family("vit", "vit_tiny_patch16_224"),
    vit_family("vit clip", "vit_xsmall_patch16_clip_224"),
    vit_family("vit dinov2 reg", "vit_small_patch14_reg4_dinov2"),
    vit_family("vit dinov3", "vit_tiny_patch16_dinov3_qkvb"),
    vit_family("vit siglip", "vit_base_patch16_siglip_224"),
    vit_family("vit reg gap", "vit_medium_patch16_reg1_gap_256"),
    timm_family("vit hybrid", "vit_small_r26_s32_224", img_size=64, embed_dim=64, depth=3, num_heads=4),
    vit_family("vit parallel block", "vit_base_patch16_xp_224"),
    vit_family("vit 18x2", "vit_small_patch16_18x2_224"),
    vit_family("vit relpos", "vit_relpos_small_patch16_224"),
    vit_family("vit srelpos", "vit_srelpos_small_patch16_224"),
    vit_family("deit", "deit_tiny_patch16_224"),
    vit_family("deit distilled", "deit_tiny_distilled_patch16_224"),
    vit_family("deit3", "deit3_small_patch16_224"),
    vit_family("eva02", "eva02_tiny_patch14_224"),
    vit_family("eva02 clip", "eva02_base_patch16_clip_224"),
    vit_family("vit pe core", "vit_pe_core_tiny_patch16_384"),
    vit_family("beit", "beit_base_patch16_224"),
    vit_family("beitv2", "beitv2_base_patch16_224"),
    vit_family("beit3", "beit3_base_patch16_224"),
    vit_family("aimv2", "aimv2_large_patch14_224"),
    vit_family("naflexvit", "naflexvit_base_patch16_gap"),
    vit_family("naflexvit map", "naflexvit_base_patch16_siglip"),
    vit_family("samvit", "samvit_base_patch16_224", window_size=0, global_attn_indexes=()),
    vit_family("samvit windows", "samvit_base_patch16_224", window_size=3, global_attn_indexes=(1,)),
    vit_family("cait", "cait_xxs24_224"),
    vit_family("convit", "convit_tiny", embed_dim=16, local_up_to_layer=2),
    vit_family("xcit", "xcit_nano_12_p16_224"),
    timm_family("vitamin", "vitamin_small_224", img_size=64, depth=2),
    timm_family("swin", "swin_tiny_patch4_window7_224", window_size=4, **SWIN),
    timm_family("swin one window", "swin_tiny_patch4_window7_224", window_size=16, **SWIN),
    timm_family("swinv2", "swinv2_tiny_window8_256", window_size=4, **SWIN),
    timm_family("swinv2 cr", "swinv2_cr_tiny_ns_224", window_size=4, **SWIN),
    timm_family("maxvit", "maxvit_rmlp_pico_rw_256", **MAXVIT),
    timm_family("maxvit tf", "maxvit_tiny_tf_224", **MAXVIT),
    timm_family("coatnet", "coatnet_pico_rw_224", **MAXVIT),
    timm_family("coatnet rmlp", "coatnet_rmlp_nano_rw_224", **MAXVIT),
    timm_family("crossvit", "crossvit_9_240", img_size=48, **CROSSVIT),
    timm_family("hiera", "hiera_tiny_224", img_size=64, embed_dim=16, stages=(1, 1, 2, 1)),
    timm_family("mvitv2", partial(mvitv2.MultiScaleVit, MVIT), img_size=64),
    timm_family("pvt v2", "pvt_v2_b0", size=64, **FOUR_STAGES),
    timm_family("davit", "davit_tiny", size=64, window_size=4, **FOUR_STAGES),
    timm_family("levit", "levit_128s", img_size=128),
    timm_family("levit conv", "levit_conv_128s", img_size=128),
    timm_family("volo", volo.VOLO, img_size=64, **VOLO),
    timm_family("twins svt", "twins_svt_small", wss=(4, 4, 2, 2), **TWINS),
    timm_family("twins pcpvt", "twins_pcpvt_small", **TWINS),
    timm_family("mobilevit", "mobilevit_xxs", size=64),
    timm_family("mobilevitv2", "mobilevitv2_050", size=64),
    timm_family("tiny vit", "tiny_vit_5m_224", size=64, window_sizes=(4, 4, 2, 2), **FOUR_STAGES),
    timm_family("efficientformer", "efficientformer_l1", size=224, depths=(1, 1, 1, 2), embed_dims=(16, 32, 48, 64)),
    timm_family("efficientformerv2", "efficientformerv2_s0", img_size=64),
    timm_family("nest", nest.Nest, img_size=64, **NEST),
    timm_family("visformer", "visformer_tiny", img_size=64, embed_dim=48, depth=(1, 1, 1)),
    timm_family("pit", "pit_ti_224", img_size=48, patch_size=8, stride=4, base_dims=(16, 16, 16), depth=(1, 1, 1)),
    timm_family("tnt", "tnt_s_patch16_224", img_size=64, embed_dim=64, inner_dim=16, depth=2, num_heads_outer=4),
    timm_family("caformer", metaformer.MetaFormer, size=64, **CAFORMER),
    timm_family("gcvit", gcvit.GlobalContextVit, img_size=64, **GCVIT),
    timm_family("efficientvit m0", "efficientvit_m0", img_size=128),
    timm_family("mobilenetv4 hybrid", "mobilenetv4_hybrid_medium_075", size=96),
    timm_family("resnet50 clip", "resnet50_clip", img_size=64),
]


# --- torch -----------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Two residual layers of nn.MultiheadAttention, and a classifier of the mean."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.need_weights = need_weights
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            x = x + layer(y, y, y, need_weights=self.need_weights)[0]
        return self.head(x.mean(1))


class ScaledDotProduct(nn.Module):
    """A residual block that calls F.scaled_dot_product_attention itself."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)


SEQUENCE = partial(normal, 2, 10, 32)
TORCH = [
    family("torch mha", partial(SelfAttention, need_weights=False), SEQUENCE, classes=True),
    family("torch mha need_weights", partial(SelfAttention, need_weights=True), SEQUENCE, classes=True),
    family("torch encoder", encoder, SEQUENCE),
    family("torch encoder norm_first", partial(encoder, norm_first=True), SEQUENCE),
    family("torch decoder", decoder, partial(normal, 2, 6, 32), SEQUENCE),
    family("torch encoder and sdpa", lambda: nn.Sequential(encoder(), ScaledDotProduct()), SEQUENCE),
]


# --- torchvision -----------------------------------------------------------------------------------------------------


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES)


def torchvision_swin(v2: bool) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if v2 else {}
    return swin.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **parts)


TORCHVISION = [
    of_images(f"torchvision {name}", make, 32, classes=True, needs="torchvision")
    for name, make in (
        ("vit", torchvision_vit),
        ("swin", partial(torchvision_swin, v2=False)),
        ("swin v2", partial(torchvision_swin, v2=True)),
    )
]


# --- open_clip -------------------------------------------------------------------------------------------------------

VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


def open_clip_clip(vision: dict[str, Any] | None = None) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(32, vision or VISION, TEXT)


def open_clip_resnet() -> nn.Module:
    return open_clip_clip({"layers": (1, 1, 1, 1), "width": 16, "head_width": 32, "image_size": 64, "patch_size": None})


def open_clip_siglip() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none"}
    text = TEXT | {"width": 192, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    return CustomTextCLIP(192, vision, text, init_logit_bias=-10.0)


def open_clip_coca() -> nn.Module:
    from open_clip.coca_model import CoCa

    vision = VISION | {
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    }
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    return CoCa(32, TEXT | {"attn_pooler_heads": 4, "dim_head": 8}, text, vision)


def pair(name: str, make: Callable[[], nn.Module], size: int = 32) -> Family:
    images, text = partial(normal, 2, 3, size, size), partial(tokens, 2, TEXT["context_length"], below=50)
    return family(f"open_clip {name}", make, images, text, needs="open_clip")


OPEN_CLIP = [
    pair("clip", open_clip_clip),
    of_images("open_clip visual", lambda: open_clip_clip().visual, 32, needs="open_clip"),
    pair("siglip", open_clip_siglip, 224),
    pair("coca", open_clip_coca),
    pair("resnet", open_clip_resnet, 64),
    of_images("open_clip resnet visual", lambda: open_clip_resnet().visual, 64, needs="open_clip"),
]

FAMILIES: list[Family] = TIMM + TORCH + TORCHVISION + OPEN_CLIP
