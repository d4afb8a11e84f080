"""A small ALBEF for tests, and a float64 reference with an explicit softmax for every attention map."""

import math

import torch
import torch.nn.functional as F

from attnx.models.albef import Albef, AlbefConfig
from attnx.models.tokenizer import Tokenizer

VOCAB = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "left", "of", "the"),
    *("skate", "##board", "##ing", "man", "dog", "on", "<", ">", "b", "/", "$", "x", "&"),
)
CONFIG = AlbefConfig(
    image_size=(32, 32), patch_size=8, vision_width=48, vision_depth=2, vision_heads=3, width=32, depth=4, heads=2,
    fusion_layer=2, vocab_size=len(VOCAB), max_tokens=24, embed_dim=16,
)  # fmt: skip
CAPTIONS = ("a red circle left of the blue square", "a dog", "the man skateboarding on a red x")


def small_albef(seed: int = 0, config: AlbefConfig = CONFIG) -> Albef:
    torch.manual_seed(seed)
    return Albef(config, Tokenizer(VOCAB, config.max_tokens)).eval()


def small_images(count: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


class Written:
    """Reference ALBEF, computed from the weights. `maps[i]` is layer i's cross-attention P, part of the graph."""

    def __init__(self, model: Albef, dtype: torch.dtype = torch.float64) -> None:
        self.w = {key: value.detach().to(dtype) for key, value in model.state_dict().items()}
        self.c = model.config
        self.maps: dict[int, torch.Tensor] = {}

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def attend(self, q, k, v, heads, mask=None, layer=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            s = s + (1 - mask[:, None, None, :].to(s)) * -10000.0
        p = s.softmax(-1)
        if layer is not None:
            self.maps[layer] = p = p.clone().requires_grad_() if not p.requires_grad else p
        return (p @ v).transpose(1, 2).flatten(2)

    def image(self, images):
        w, c, v = self.w, self.c, "visual_encoder"
        x = F.conv2d(images.to(w["temp"]), w[f"{v}.patch_embed.proj.weight"], w[f"{v}.patch_embed.proj.bias"],
                     stride=c.patch_size)  # fmt: skip
        grid, positions = x.shape[-2:], w[f"{v}.pos_embed"]
        own = tuple(pixels // c.patch_size for pixels in c.image_size)
        patches = positions[:, 1:].transpose(1, 2).unflatten(2, own)
        if grid != own:
            patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        x = x.flatten(2).transpose(1, 2) + patches.flatten(2).transpose(1, 2)
        x = torch.cat([(w[f"{v}.cls_token"] + positions[:, :1]).expand(len(x), -1, -1), x], 1)
        for i in range(c.vision_depth):
            b = f"{v}.blocks.{i}"
            q, k, value = self.linear(self.norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(q, k, value, c.vision_heads), f"{b}.attn.proj")
            x = x + self.linear(F.gelu(self.linear(self.norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        return self.norm(x, f"{v}.norm", 1e-6)

    def bert_attention(self, x, name, source, mask=None, layer=None):
        parts = (("query", x), ("key", source), ("value", source))
        q, k, v = (self.linear(t, f"{name}.self.{part}") for part, t in parts)
        out = self.linear(self.attend(q, k, v, self.c.heads, mask, layer), f"{name}.output.dense")
        return self.norm(out + x, f"{name}.output.LayerNorm", 1e-12)

    def logits(self, images, ids, mask, first=0):
        image, w, e = self.image(images), self.w, "text_encoder.embeddings"
        x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.token_type_embeddings.weight"][0]
        x = self.norm(x + w[f"{e}.position_embeddings.weight"][: ids.shape[1]], f"{e}.LayerNorm", 1e-12)
        for i in range(first, self.c.depth):
            b = f"text_encoder.encoder.layer.{i}"
            x = self.bert_attention(x, f"{b}.attention", x, mask)
            if i >= self.c.fusion_layer:
                x = self.bert_attention(x, f"{b}.crossattention", image, None, i)
            hidden = self.linear(F.gelu(self.linear(x, f"{b}.intermediate.dense")), f"{b}.output.dense")
            x = self.norm(hidden + x, f"{b}.output.LayerNorm", 1e-12)
        return self.linear(x[:, 0], "itm_head")
