"""Small models of the original repositories, with random weights, from checkouts named by environment variables.

A folder is named by ATTNX_CLIP, ATTNX_DINOV2, ATTNX_DINO, ATTNX_ALBEF, ATTNX_CROSSVIT, ATTNX_SWIN or ATTNX_LAVT.
Without it, the test is skipped.
"""

import warnings
from importlib import import_module

import torch
from original_code import checkout, importing, original_albef, original_dino
from original_lavt import original_lavt
from own_softmax import load, randomize
from torch import Tensor, nn

from attnx.models.lavt import LavtConfig

SWIN = {"window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
LAVT = LavtConfig(
    embed_dim=24, depths=(2, 2, 2, 2), heads=(1, 2, 3, 4), window=4, fusion_heads=(1, 2, 4, 6), text_depth=2,
    vocab_size=60, max_positions=24,
)  # fmt: skip


def pixels(*size: int) -> Tensor:
    """Two images [2, 3, H, W]."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def words(length: int = 12, vocabulary: int = 60) -> tuple[Tensor, Tensor]:
    """(ids [2, length], mask [2, length]) of two texts, of which the second is shorter."""
    ids = torch.randint(3, vocabulary - 1, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length // 2 :] = False
    return ids * mask, mask


def clip(resnet: bool = False) -> nn.Module:
    """openai/CLIP with a vision transformer, or with a ResNet and its attention pooling."""
    code = load(checkout("ATTNX_CLIP", "openai/CLIP") / "clip" / "model.py", "original_clip")
    vision = (
        {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}
        if resnet
        else {"vision_layers": 3, "vision_width": 128, "vision_patch_size": 16}
    )
    text = {"context_length": 12, "vocab_size": 60, "transformer_width": 64, "transformer_heads": 1}
    return gentle(code.CLIP(embed_dim=32, image_resolution=64, transformer_layers=2, **vision, **text).float())


def clip_inputs() -> tuple[Tensor, Tensor]:
    """(images, texts): the end of a text is its largest number."""
    texts, _ = words()
    texts[0, -1] = texts[1, 5] = 59
    return pixels(64, 64), texts


def dino() -> nn.Module:
    """The vision transformer of facebookresearch/dino."""
    return randomize(original_dino())


def dinov2(**options: object) -> nn.Module:
    """The vision transformer of facebookresearch/dinov2, with the arguments of its hub models: patches of 14 pixels."""
    folder = checkout("ATTNX_DINOV2", "facebookresearch/dinov2")
    with importing(folder, "dinov2"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # xFormers is not available
        code, layers = import_module("dinov2.models.vision_transformer"), import_module("dinov2.layers")
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 3, "init_values": 1.0}
    sizes |= {"block_chunks": 0, "block_fn": lambda **given: layers.NestedTensorBlock(**given)}
    return randomize(code.DinoVisionTransformer(**(sizes | options)))


def albef() -> nn.Module:
    """The model of salesforce/ALBEF's Grad-CAM notebook: (images, ids, mask) -> logits."""
    return gentle(original_albef())


def crossvit() -> nn.Module:
    """IBM/CrossViT with two blocks of two branches."""
    code = load(checkout("ATTNX_CROSSVIT", "IBM/CrossViT") / "models" / "crossvit.py", "original_crossvit")
    block = code.Block
    code.Block = lambda drop, **given: block(proj_drop=drop, **given)  # timm renamed the argument
    sizes = {"img_size": [48, 48], "patch_size": (8, 16), "depth": ((1, 2, 0), (1, 1, 0)), "num_classes": 5}
    return randomize(
        code.VisionTransformer(embed_dim=(16, 24), num_heads=(2, 3), mlp_ratio=(2, 2, 1), qkv_bias=True, **sizes)
    )


def swin(version: int, **options: object) -> nn.Module:
    """microsoft/Swin-Transformer: two stages of a plain and a shifted block."""
    name = {1: "swin_transformer", 2: "swin_transformer_v2"}[version]
    code = load(checkout("ATTNX_SWIN", "microsoft/Swin-Transformer") / "models" / f"{name}.py", f"original_{name}")
    kind = {1: "SwinTransformer", 2: "SwinTransformerV2"}[version]
    return randomize(getattr(code, kind)(**({"img_size": 32, "patch_size": 2} | SWIN | options)))


class WholeLavt(nn.Module):
    """The backbone, the decoder and the text encoder of yz93/LAVT-RIS: (images, ids, mask) -> logits of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.bert_model = original_lavt(LAVT)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert_model(ids, attention_mask=mask.long())[0].permute(0, 2, 1)
        return self.model(images, hidden, l_mask=mask.long().unsqueeze(-1))


def lavt() -> nn.Module:
    """yz93/LAVT-RIS with its text encoder."""
    torch.manual_seed(0)
    model = WholeLavt()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("relative_position_bias_table", "bias")):
                p.add_(0.2 * torch.randn_like(p))
    return model


def gentle(model: nn.Module) -> nn.Module:
    """The model in eval mode with random weights whose scale keeps the activations of a deep model moderate."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.06) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()
