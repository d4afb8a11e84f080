"""ALBEF for current versions of torch: timm's ViT, BERT's layers, and cross-attention from words to patches.

Its parameters have the names of the original code, so that published checkpoints load. Its attention calls SDPA, so
that `attnx.capture` can intercept it.

Reference:
    Li et al., "Align before Fuse", https://arxiv.org/abs/2107.07651; https://github.com/salesforce/ALBEF
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertSelfOutput,
)

from attnx.models.tokenizer import Tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class AlbefConfig:
    """Sizes of an ALBEF. Defaults are those of published checkpoints. `image_size`: (height, width) in pixels."""

    image_size: tuple[int, int] = (256, 256)
    patch_size: int = 16
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    fusion_layer: int = 6
    vocab_size: int = 30522
    max_tokens: int = 512
    embed_dim: int = 256


class CrossAttention(nn.Module):
    """Queries from words, keys and values from the tokens of their image."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.vision_width, config.width)
        self.value = nn.Linear(config.vision_width, config.width)

    def forward(self, words: Tensor, image: Tensor, owner: Tensor | None) -> Tensor:
        """words [P, T, C], image [I, N, C'], owner [P]: index of each caption's image; None: P / I per image."""
        shape = words.shape
        if owner is None:
            # Captions of one image form one sequence of queries, so keys and values are not copied.
            words = words.reshape(len(image), -1, shape[-1])
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, words), (self.key, image), (self.value, image))
        )
        if owner is not None:
            k, v = k[owner], v[owner]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view(shape)


class CrossLayer(nn.Module):
    """`CrossAttention` with its projection and residual; named `crossattention` in checkpoints."""

    def __init__(self, config: AlbefConfig, bert: BertConfig) -> None:
        super().__init__()
        self.self = CrossAttention(config)
        self.output = BertSelfOutput(bert)

    def forward(self, words: Tensor, image: Tensor, owner: Tensor | None) -> Tensor:
        """The words [P, T, C] after cross-attention; arguments as in `CrossAttention.forward`."""
        output: Tensor = self.output(self.self(words, image, owner), words)
        return output


class TextLayer(nn.Module):
    """A BERT layer, with cross-attention between self-attention and MLP from layer `fusion_layer` on."""

    def __init__(self, config: AlbefConfig, bert: BertConfig, fuses: bool) -> None:
        super().__init__()
        self.attention = BertAttention(bert)
        self.crossattention = CrossLayer(config, bert) if fuses else None
        self.intermediate = BertIntermediate(bert)
        self.output = BertOutput(bert)

    def forward(self, words: Tensor, mask: Tensor, image: Tensor | None, owner: Tensor | None) -> Tensor:
        """The words [P, T, C] after this layer. `mask` [P, 1, 1, T] bool: False for padding."""
        words = self.attention(words, mask)[0]
        if self.crossattention is not None:
            words = self.crossattention(words, image, owner)
        output: Tensor = self.output(self.intermediate(words), words)
        return output


class TextEncoder(nn.Module):
    """Embeddings and layers, named as in the checkpoints."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        bert = BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_ratio * config.width,
            max_position_embeddings=config.max_tokens,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        bert._attn_implementation = "sdpa"
        self.embeddings = BertEmbeddings(bert)
        layers = [TextLayer(config, bert, fuses=i >= config.fusion_layer) for i in range(config.depth)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, words: Tensor, mask: Tensor, image: Tensor | None, owner: Tensor | None, layers: range) -> Tensor:
        """The words [P, T, C] after the given layers. `mask` [P, T] bool: False for padding."""
        attend = mask[:, None, None, :]
        for i, layer in enumerate(cast(nn.ModuleList, self.encoder["layer"])):
            if i in layers:
                words = layer(words, attend, image, owner)
        return words


class Albef(nn.Module):
    """ALBEF without dropout: vision encoder, text encoder with cross-attention, matching head and projections.

    Args:
        config: sizes of the model.
        tokenizer: tokenizer of captions; required by `attnx.word_maps` and `attnx.gradcam`.
    """

    def __init__(self, config: AlbefConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config or AlbefConfig()
        self.tokenizer = tokenizer
        c = self.config
        self.visual_encoder = VisionTransformer(
            img_size=c.image_size,
            patch_size=c.patch_size,
            num_classes=0,
            embed_dim=c.vision_width,
            depth=c.vision_depth,
            num_heads=c.vision_heads,
            mlp_ratio=c.mlp_ratio,
            dynamic_img_size=True,
        )
        self.text_encoder = TextEncoder(c)
        # These are None if the checkpoint does not contain them.
        self.vision_proj: nn.Linear | None = nn.Linear(c.vision_width, c.embed_dim)
        self.text_proj: nn.Linear | None = nn.Linear(c.width, c.embed_dim)
        self.temp: nn.Parameter | None = nn.Parameter(torch.tensor(0.07))
        self.itm_head: nn.Linear | None = nn.Linear(c.width, 2)

    @property
    def cross_layers(self) -> range:
        """The text layers that have cross-attention."""
        return range(self.config.fusion_layer, self.config.depth)

    def cross_attention(self, layer: int) -> str:
        """The name of a text layer's cross-attention, as `attnx.capture` takes it.

        Raises:
            ValueError: the layer has no cross-attention; the message lists the layers that do.
        """
        if layer not in self.cross_layers:
            have = ", ".join(map(str, self.cross_layers))
            raise ValueError(f"layer: expected a text layer with cross-attention, one of {have}; got {layer}")
        return f"text_encoder.encoder.layer.{layer}.crossattention.self"

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches of images [I, 3, height, width].

        Raises:
            ValueError: invalid shape, or a size that is not a multiple of the patch size.
        """
        p = self.config.patch_size
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape) < 1:
            raise ValueError(f"images: expected [I, 3, height, width]; got {list(images.shape)}")
        if images.shape[2] % p or images.shape[3] % p:
            height, width = images.shape[2:]
            raise ValueError(f"images: expected multiples of the patch of {p} pixels; got {height}x{width}")
        return images.shape[2] // p, images.shape[3] // p

    def encode_image(self, images: Tensor) -> Tensor:
        """[I, 3, height, width] -> [I, 1 + patches, C] after the last norm, class token first.

        For a grid that differs from the model's, position embeddings are interpolated (bicubic), as the original does
        when it loads a checkpoint.
        """
        grid, vision = self.grid(images), self.visual_encoder
        x = vision.patch_embed(images).flatten(1, 2)
        cls, positions = cast(Tensor, vision.cls_token), cast(Tensor, vision.pos_embed)
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
        x = x + interpolate_positions(positions, vision.patch_embed.grid_size, grid)
        patches: Tensor = vision.norm(vision.blocks(vision.norm_pre(vision.patch_drop(vision.pos_drop(x)))))
        return patches

    def encode_text(
        self,
        ids: Tensor,
        mask: Tensor,
        image: Tensor | None = None,
        owner: Tensor | None = None,
        *,
        words: Tensor | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """[P, T] token ids -> [P, T, C] after the last of the layers.

        Args:
            ids: int64; mask: bool, False for padding.
            image: [I, N, C'] of `encode_image`, for the layers that attend to it.
            owner: [P] int64, index of each caption's image; None: P / I captions per image, in order.
            words: input of the first layer; None: the embeddings of `ids`.
            layers: the layers that run; None: all, or those below `fusion_layer` without an image.
        """
        if layers is None:
            layers = range(self.config.depth if image is not None else self.config.fusion_layer)
        words = self.text_encoder.embeddings(input_ids=ids) if words is None else words
        encoded: Tensor = self.text_encoder(words, mask, image, owner, layers)
        return encoded

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        owner: Tensor | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """Image-text matching logits, [P, 2], of (no match, match) for each caption and its image.

        Raises:
            ValueError: the checkpoint had no matching head.
        """
        words = self.encode_text(ids, mask, self.encode_image(images), owner, layers=layers)
        if self.itm_head is None:
            raise ValueError("model: expected one with an image-text matching head (itm_head); its checkpoint had none")
        logits: Tensor = self.itm_head(words[:, 0])
        return logits


def interpolate_positions(positions: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1, 1 + patches, C], with the patches interpolated from grid `own` to `grid` (bicubic)."""
    if own == grid:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    square = patches.transpose(1, 2).unflatten(2, own).float()
    scaled = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, scaled.flatten(2).transpose(1, 2).to(positions.dtype)], 1)
