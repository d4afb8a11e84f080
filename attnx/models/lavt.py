"""LAVT for current versions of torch: a Swin transformer whose stages attend to the words of an expression.

Its parameters have the names of the original code, so that published checkpoints load. Its attention calls SDPA, so
that `attnx.capture` can intercept it. It has no dropout.

Reference:
    Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation",
    https://arxiv.org/abs/2112.02244; https://github.com/yz93/LAVT-RIS
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from attnx.models.lavt_swin import PATCH, PatchEmbed, PatchMerging, SwinBlock
from attnx.models.tokenizer import Tokenizer

Four = tuple[int, int, int, int]
INTERPOLATION = "bilinear"
"""The interpolation of images, as in `attnx.images.to_tensor`."""


@dataclass(frozen=True)
class LavtConfig:
    """Sizes of a LAVT. Defaults are those of published checkpoints: Swin-B with windows of 12 x 12, and BERT-base.

    `heads`: of the windows of each stage; `fusion_heads`: of its attention to words, the original's option `mha`;
    `image_size`: (height, width) in pixels to which images are resized. The model takes any other size, too.
    """

    embed_dim: int = 128
    depths: Four = (2, 2, 18, 2)
    heads: Four = (4, 8, 16, 32)
    window: int = 12
    fusion_heads: Four = (1, 1, 1, 1)
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    vocab_size: int = 30522
    max_positions: int = 512
    image_size: tuple[int, int] = (480, 480)


SIZES: dict[str, tuple[int, Four, Four]] = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
"""The original's `swin_type`: (embed_dim, depths, heads)."""


class PixelWordAttention(nn.Module):
    """Attention from the pixels of a stage (queries) to the words (keys and values)."""

    def __init__(self, dim: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.f_key = nn.Sequential(nn.Conv1d(text_width, dim, 1))
        self.f_query = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.InstanceNorm1d(dim))
        self.f_value = nn.Sequential(nn.Conv1d(text_width, dim, 1))
        self.W = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.InstanceNorm1d(dim))

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, N], words [B, C', T], mask [B, T] bool: False for padding -> [B, C, N]."""
        keep = mask[:, None].to(words.dtype)
        pixels, keys, values = self.f_query(x), self.f_key(words) * keep, self.f_value(words) * keep
        q, k, v = (t.unflatten(1, (self.heads, -1)).mT for t in (pixels, keys, values))
        bias = ((1 - keep) * -1e4)[:, None].to(q.dtype)
        out: Tensor = self.W(F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale).mT.flatten(1, 2))
        return out


class PixelWordFusion(nn.Module):
    """The product of each pixel's features and its features of the words (the paper's PWAM)."""

    def __init__(self, dim: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.GELU())
        self.image_lang_att = PixelWordAttention(dim, text_width, heads)
        self.project_mm = nn.Sequential(nn.Conv1d(dim, dim, 1), nn.GELU())

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, C], words [B, C', T], mask [B, T] -> [B, N, C]."""
        x = x.mT
        fused: Tensor = self.project_mm(self.vis_project(x) * self.image_lang_att(x, words, mask))
        return fused.mT


class Stage(nn.Module):
    """Swin blocks, fusion with the words through a gate, and the merging of patches (but in the last stage)."""

    def __init__(self, config: LavtConfig, i: int) -> None:
        super().__init__()
        dim, n = config.embed_dim * 2**i, config.window
        self.blocks = nn.ModuleList(
            SwinBlock(dim, n, config.heads[i], n // 2 if b % 2 else 0) for b in range(config.depths[i])
        )
        self.fusion = PixelWordFusion(dim, config.text_width, config.fusion_heads[i])
        linear = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.res_gate = nn.Sequential(next(linear), nn.ReLU(), next(linear), nn.Tanh())
        self.downsample = PatchMerging(dim) if i < 3 else None

    def forward(self, x: Tensor, grid: tuple[int, int], words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, h * w, C] -> (the stage's output, of the same shape; the input of the next stage)."""
        for block in self.blocks:
            x = block(x, grid)
        fused = self.fusion(x, words, mask)
        x = x + self.res_gate(fused) * fused
        return fused, x if self.downsample is None else self.downsample(x, grid)


class Backbone(nn.Module):
    """The four stages of the language-aware Swin transformer."""

    def __init__(self, config: LavtConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.layers = nn.ModuleList(Stage(config, i) for i in range(4))
        for i in range(4):
            self.add_module(f"norm{i}", nn.LayerNorm(config.embed_dim * 2**i))

    def forward(self, images: Tensor, words: Tensor, mask: Tensor, last: int = 3) -> list[Tensor]:
        """The outputs [B, C_s, h_s, w_s] of the stages up to `last`; arguments as in `PixelWordAttention.forward`."""
        x, grid = self.patch_embed(images)
        outputs = []
        for i, stage in enumerate(self.layers[: last + 1]):
            fused, x = stage(x, grid, words, mask)
            outputs.append(self.get_submodule(f"norm{i}")(fused).mT.unflatten(2, grid))
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return outputs


class Decoder(nn.Module):
    """The segmentation head: from the last stage to the first, convolutions of what is there and the stage's output."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // 2
        for i, given in ((4, dim), (3, hidden), (2, hidden)):
            widths = (given + dim // 2 ** (5 - i), hidden)
            for part, width in enumerate(widths, 1):
                self.add_module(f"conv{part}_{i}", nn.Conv2d(width, hidden, 3, padding=1, bias=False))
                self.add_module(f"bn{part}_{i}", nn.BatchNorm2d(hidden))
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """The outputs of the four stages -> [B, 2, h, w] logits on the first stage's grid."""
        x = stages[3]
        for i in (4, 3, 2):
            finer = stages[i - 2]
            x = torch.cat([F.interpolate(x, size=finer.shape[2:], mode="bilinear", align_corners=True), finer], 1)
            for part in (1, 2):
                x = self.get_submodule(f"conv{part}_{i}")(x)
                x = F.relu(self.get_submodule(f"bn{part}_{i}")(x))
        logits: Tensor = self.conv1_1(x)
        return logits


class Lavt(nn.Module):
    """LAVT with its text encoder: the segmentation of what an expression refers to.

    Args:
        config: sizes of the model.
        tokenizer: tokenizer of expressions.
    """

    def __init__(self, config: LavtConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = c = config or LavtConfig()
        self.tokenizer = tokenizer
        self.backbone = Backbone(c)
        self.classifier = Decoder(8 * c.embed_dim)
        bert = BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.text_width,
            num_hidden_layers=c.text_depth,
            num_attention_heads=c.text_heads,
            intermediate_size=4 * c.text_width,
            max_position_embeddings=c.max_positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        bert._attn_implementation = "sdpa"
        self.text_encoder = BertModel(bert, add_pooling_layer=False)

    def grids(self, images: Tensor) -> list[tuple[int, int]]:
        """(rows, columns) of each of the four stages, for images [B, 3, height, width].

        Raises:
            ValueError: invalid shape, or an image of so few pixels that the last stage has a single token.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not len(images) or max(images.shape[2:]) <= 8 * PATCH:
            raise ValueError(
                f"images: expected [B, 3, height, width], one side above {8 * PATCH} pixels; got {list(images.shape)}"
            )
        height, width = images.shape[2:]
        return [(-(-height // (PATCH << i)), -(-width // (PATCH << i))) for i in range(4)]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] token ids -> [B, C', T] after BERT's last layer. `mask` [B, T] bool: False for padding."""
        words: Tensor = self.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
        return words.mT

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, 2, height, width] of (background, what the expression refers to) for each pixel.

        Args:
            images: [B, 3, height, width] float, normalised.
            ids, mask: [B, T] int64 and bool; the mask is False for padding.
        """
        self.grids(images)
        logits = self.classifier(self.backbone(images, self.encode_text(ids, mask), mask))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=True)
