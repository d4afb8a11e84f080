"""Small models with windowed attention, and the dense maps of their blocks from one-hot images."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models import gcvit, swin_transformer_v2_cr
from torch import nn
from torchvision.models import swin_transformer as vision

from attnx.trace.window_readers import windows_of

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 2}
HF_SMALL = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}
FOUR = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "num_classes": 2}


def timm_model(name, size, **options):
    return timm.create_model(name, **options).eval(), size


def swin(name, size, window):
    return timm_model(name, size, img_size=size, window_size=window, **SMALL)


def swin_cr(size, window):
    model = swin_transformer_v2_cr.SwinTransformerV2Cr(img_size=size, window_size=window, **SMALL)
    return model.eval(), size


def huggingface(kind, size, **options):
    config = getattr(transformers, f"{kind}Config")(image_size=size, **HF_SMALL, **options)
    return getattr(transformers, f"{kind}Model")(config).eval(), size


def torchvision_swin(block, merge):
    options = {"window_size": [4, 3], "num_classes": 2, "block": block, "downsample_layer": merge}
    return vision.SwinTransformer([4, 4], 16, [2, 2], [1, 2], **options).eval(), (60, 44)


def maxvit(name):
    sizes = {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 16}
    return timm_model(name, (64, 64), img_size=64, num_classes=2, **sizes)


def gc_vit():
    sizes = {
        "img_size": 64,
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "window_size": (4, 2, 4, 2),
    }
    return gcvit.GlobalContextVit(num_classes=2, window_ratio=None, **sizes).eval(), (64, 64)


def samvit(size):
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3, "global_attn_indexes": (1,)}
    return timm_model("samvit_base_patch16_224", size, img_size=size, patch_size=8, num_classes=2, **options)


def sam():
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, window_size=3,
        global_attn_indexes=[1], mlp_dim=32, output_channels=16,
    )  # fmt: skip
    return transformers.SamVisionModel(config).eval(), (64, 64)


def original(variable, path, **stubs):
    """A file of a checkout as a module."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"needs a checkout named by {variable}")
    package = f"original_{variable.lower()}"
    modules = {name.replace("PACKAGE", package): types.ModuleType(name) for name in ("PACKAGE", *stubs)}
    for module, names in zip(list(modules.values())[1:], stubs.values(), strict=True):
        vars(module).update(dict.fromkeys(names))
    modules[package].__path__ = []
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location(f"{package}.code", Path(folder) / path)
        module = importlib.util.module_from_spec(spec)
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


def microsoft(version, size):
    code = original("ATTNX_SWIN", f"models/swin_transformer{version}.py")
    options = {"img_size": size, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}
    make = code.SwinTransformerV2 if version else code.SwinTransformer
    return make(num_classes=2, **options).eval(), size


def lavt_code():
    stubs = {"PACKAGE.mmcv_custom": ["load_checkpoint"], "mmseg": [], "mmseg.utils": ["get_root_logger"]}
    return original("ATTNX_LAVT", "lib/backbone.py", **stubs)


class LavtLayer(nn.Module):
    """One layer of LAVT's backbone after a patch embedding, without the text."""

    def __init__(self):
        super().__init__()
        code = lavt_code()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList([code.SwinTransformerBlock(16, 1, 5, shift) for shift in (0, 2)])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            block.H, block.W = x.shape[2:]
            block(x.flatten(2).transpose(1, 2), torch.zeros(12, 25, 25))


CASES = {
    "timm swin": lambda: swin("swin_tiny_patch4_window7_224", (112, 112), 7),
    "timm swin padded": lambda: swin("swin_tiny_patch4_window7_224", (120, 88), 5),
    "timm swin one window": lambda: swin("swin_tiny_patch4_window7_224", (28, 28), 7),
    "timm swinv2": lambda: swin("swinv2_tiny_window8_256", (112, 112), 7),
    "timm swinv2 padded": lambda: swin("swinv2_tiny_window8_256", (120, 88), 5),
    "timm swinv2 cr padded": lambda: swin_cr((120, 88), 5),
    "transformers swin": lambda: huggingface("Swin", (56, 56), window_size=7),
    "transformers swin padded": lambda: huggingface("Swin", (60, 44), window_size=4),
    "transformers swinv2": lambda: huggingface("Swinv2", (56, 56), window_size=7),
    "transformers swinv2 padded": lambda: huggingface("Swinv2", (60, 44), window_size=4),
    "transformers donut": lambda: huggingface("DonutSwin", (60, 44), window_size=4),
    "transformers maskformer": lambda: huggingface("MaskFormerSwin", (60, 44), window_size=4),
    "torchvision swin": lambda: torchvision_swin(vision.SwinTransformerBlock, vision.PatchMerging),
    "torchvision swinv2": lambda: torchvision_swin(vision.SwinTransformerBlockV2, vision.PatchMergingV2),
    "microsoft swin": lambda: microsoft("", (64, 32)),
    "microsoft swinv2": lambda: microsoft("_v2", (64, 32)),
    "lavt": lambda: (LavtLayer().eval(), (60, 64)),
    "maxvit": lambda: maxvit("maxvit_rmlp_pico_rw_256"),
    "maxvit 2d": lambda: maxvit("maxvit_tiny_tf_224"),
    "gcvit": gc_vit,
    "davit": lambda: timm_model("davit_tiny", (72, 56), window_size=4, **FOUR),
    "samvit": lambda: samvit((64, 56)),
    "sam": sam,
    "twins": lambda: timm_model("twins_svt_small", (64, 96), img_size=(64, 96), wss=(5, 4, 3, 2), **FOUR),
}

CHANNELS_FIRST = {"SpatialBlock", "PartitionAttention2d"}
NOTHING = {"mlp", "intermediate", "output"}
ATTENTION = {"attn", "attention"}


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


class Attend(nn.Module):
    """Takes the place of a block's attention."""

    def __init__(self, mix, returns_pair, channels_first):
        super().__init__()
        self.mix, self.returns_pair, self.channels_first = mix, returns_pair, channels_first

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        x = x.movedim(1, -1) if self.channels_first else x
        y = self.mix(x.reshape(len(x), -1, x.shape[-1])).view_as(x)
        y = y.movedim(-1, 1) if self.channels_first else y
        return (y, None) if self.returns_pair else y


def windowed_calls(model, size):
    """(block, args, kwargs) of each call of a block of windows in a forward pass."""
    calls, inside = [], []

    def note(module, args, kwargs):
        if windows_of(module, args, kwargs) is not None and not inside:
            calls.append((module, args, kwargs))
            inside.append(module)

    def leave(module, args, output):
        if inside == [module]:
            inside.pop()

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    hooks += [m.register_forward_hook(leave) for m in model.modules()]
    with torch.no_grad():
        model(torch.randn(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return calls


def hollow(block, mix, patch):
    """Reduce a block to its residual and its attention, and that to `mix`. Returns 1 if the residual remains."""
    kind = type(block).__name__
    if kind == "LocallyGroupedAttn":
        block.qkv, block.proj, block.num_heads = Copies(), nn.Identity(), 1
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: mix(v.flatten(0, 2)).view_as(v))
        return 0
    for name, child in list(block.named_children()):
        if name not in ATTENTION:
            setattr(block, name, Nothing() if name in NOTHING else nn.Identity())
        elif not type(child).__name__.startswith("ShiftedWindowAttention"):
            setattr(block, name, Attend(mix, "Layer" in kind, kind == "PartitionAttention2d"))
    return 1


class Copies(nn.Module):
    def forward(self, x):
        return torch.cat([x, x, x], -1)


def hollow_torchvision(attn, channels, mix, patch):
    """The values of the attention become its input, and its weights times the values `mix`."""
    attn.num_heads, attn.get_relative_position_bias = 1, lambda: torch.zeros(())
    eye = torch.eye(channels).double()
    attn.qkv.weight, attn.qkv.bias = nn.Parameter(eye.repeat(3, 1)), None
    attn.proj.weight, attn.proj.bias = nn.Parameter(eye), None
    if hasattr(attn, "logit_scale"):
        attn.logit_scale = nn.Parameter(torch.zeros(1, 1, 1))
    patch.setattr(
        F, "softmax", lambda scores, dim: mix(torch.eye(scores.shape[-1]).expand(len(scores), -1, -1))[:, None]
    )


def random_maps(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, size, size, generator=generator, dtype=torch.float64).softmax(-1)


def dense_map(block, args, kwargs, grid, seed):
    """The block's map [N, N] before rows are normalised, its windows, and the random maps in its windows."""
    n, got = grid[0] * grid[1], {}
    first = args[0] if args else kwargs["hidden_states"]
    eye = torch.eye(n, dtype=torch.float64)
    channels_first = type(block).__name__ in CHANNELS_FIRST
    x = eye.view(1, *grid, n) if first.dim() == 4 else eye[None]
    x = x.movedim(-1, 1).contiguous() if channels_first else x

    def mix(tokens):
        got["windows"] = windows_of(block, args, kwargs)
        got["maps"] = random_maps(*tokens.shape[:2], seed)
        return got["maps"] @ tokens.double()

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        residual = hollow(block, mix, patch)
        attn = getattr(block, "attn", None)
        if type(attn).__name__.startswith("ShiftedWindowAttention"):
            hollow_torchvision(attn, n, mix, patch)
        out = block(x, *args[1:], **{k: v for k, v in kwargs.items() if v is not first})
    out = (out[0] if isinstance(out, tuple) else out) - residual * x
    out = out.movedim(1, -1) if channels_first else out
    return out.reshape(n, n), got["windows"], got["maps"]
