"""ALBEF's and DINO's own attention is intercepted, in blocks of the same interface and in the original code.

ATTNX_ALBEF=ALBEF ATTNX_DINO=dino pytest tests/test_albef_adapter.py
"""

import copy
import math

import pytest
import timm
import torch
from original_code import original_albef, original_dino
from test_capture import assert_same_state, state
from torch import Tensor, nn

import attnx
from attnx.testing import assert_within_budget
from attnx.trace.adapters import dino as dino_adapter
from attnx.trace.adapters import route_to_sdpa


class Keeper(nn.Module):
    """The interface of both ALBEF attentions for storing the map and its gradient."""

    attention_map: Tensor | None = None
    attn_gradients: Tensor | None = None

    def save_attention_map(self, attention_map):
        self.attention_map = attention_map

    def get_attention_map(self):
        return self.attention_map

    def save_attn_gradients(self, attn_gradients):
        self.attn_gradients = attn_gradients

    def get_attn_gradients(self):
        return self.attn_gradients


class BertSelfAttention(Keeper):
    def __init__(self, width, source, heads, dropout=0.1):
        super().__init__()
        self.heads, self.attention_head_size = heads, width // heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.dropout = nn.Dropout(dropout)
        self.position_embedding_type = "absolute"
        self.save_attention = False

    def transpose_for_scores(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, hidden_states, attention_mask=None, head_mask=None, encoder_hidden_states=None,
        encoder_attention_mask=None, past_key_value=None, output_attentions=False,
    ):  # fmt: skip
        q = self.transpose_for_scores(self.query(hidden_states))
        crossed = encoder_hidden_states is not None
        source = encoder_hidden_states if crossed else hidden_states
        k, v = self.transpose_for_scores(self.key(source)), self.transpose_for_scores(self.value(source))
        if crossed:
            attention_mask = encoder_attention_mask
        elif past_key_value is not None:
            k = torch.cat([past_key_value[0], k], dim=2)
            v = torch.cat([past_key_value[1], v], dim=2)
        s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        if self.position_embedding_type == "relative_key":
            s = s + torch.arange(s.size(-1), dtype=s.dtype, device=s.device)
        p = nn.Softmax(-1)(s if attention_mask is None else s + attention_mask)
        if crossed and self.save_attention:
            self.save_attention_map(p)
            p.register_hook(self.save_attn_gradients)
        dropped = self.dropout(p)
        if head_mask is not None:
            dropped = dropped * head_mask
        c = torch.matmul(dropped, v).permute(0, 2, 1, 3).contiguous()
        c = c.view(c.size(0), c.size(1), -1)
        return (c, p, (k, v)) if output_attentions else (c, (k, v))


class BertAttention(nn.Module):
    def __init__(self, width, source, heads):
        super().__init__()
        self.self = BertSelfAttention(width, source, heads)
        self.output = nn.Linear(width, width)

    def forward(self, x, *args):
        return x + self.output(self.self(x, *args)[0])


def packed_layers(self, width, heads):
    self.num_heads, self.scale = heads, (width // heads) ** -0.5
    self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)


def vits_attention():
    class Attention(Keeper):
        def __init__(self, width, heads):
            super().__init__()
            packed_layers(self, width, heads)

        def forward(self, x, register_hook=False):
            B, N, C = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            p = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
            if register_hook:
                self.save_attention_map(p)
                p.register_hook(self.save_attn_gradients)
            return self.proj_drop(self.proj((p @ v).transpose(1, 2).reshape(B, N, C)))

    return Attention


def dinos_attention():
    class Attention(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            packed_layers(self, width, heads)

        def forward(self, x):
            B, N, C = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            p = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
            out = self.proj_drop(self.proj((p @ v).transpose(1, 2).reshape(B, N, C)))
            return out, p

    return Attention


def parts(block, attention, width, heads):
    block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    block.attn, block.drop_path = attention(width, heads), nn.Identity()
    block.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class VitBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        parts(self, vits_attention(), width, heads)

    def forward(self, x, register_hook=False):
        x = x + self.attn(self.norm1(x), register_hook=register_hook)
        return x + self.mlp(self.norm2(x))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        parts(self, dinos_attention(), width, heads)

    def forward(self, x, return_attention=False):
        y, p = self.attn(self.norm1(x))
        if return_attention:
            return p
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Tokens(nn.Module):
    def __init__(self, block, depth, patch=16, width=48, heads=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))

    def tokens(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)


class Vit(Tokens):
    def forward(self, images, register_blk=-1):
        x = self.tokens(images)
        for i, block in enumerate(self.blocks):
            x = block(x, i == register_blk)
        return x


class Dino(Tokens):
    def forward(self, images):
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]

    def get_last_selfattention(self, images):
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)


class Layer(nn.Module):
    def __init__(self, width, crosses):
        super().__init__()
        self.attention = BertAttention(width, width, 3)
        if crosses:
            self.crossattention = BertAttention(width, width, 3)


class Pair(nn.Module):
    """A model of image and text with cross-attention from words to patches. Names are ALBEF's."""

    def __init__(self):
        super().__init__()
        self.visual_encoder = Vit(VitBlock, 2)
        self.text_encoder = nn.Module()
        self.text_encoder.words = nn.Embedding(60, 48)
        self.text_encoder.encoder = nn.Module()
        self.text_encoder.encoder.layer = nn.ModuleList(Layer(48, crosses=i > 0) for i in range(3))
        self.itm_head = nn.Linear(48, 2)

    def forward(self, images, ids, mask):
        image, x = self.visual_encoder(images), self.text_encoder.words(ids)
        added = (1 - mask[:, None, None, :].to(x.dtype)) * -10000
        for layer in self.text_encoder.encoder.layer:
            x = layer.attention(x, added)
            if hasattr(layer, "crossattention"):
                x = layer.crossattention(x, added, None, image, torch.zeros_like(image[:, None, None, :, 0]))
        return self.itm_head(x[:, 0])


def stand_in():
    return Pair().eval()


@pytest.fixture(params=["stand-in", "its own code"])
def pair(request):
    """A model, its inputs, and the name of the cross-attention whose map is tested."""
    torch.manual_seed(0)
    model, layer = (stand_in(), 1) if request.param == "stand-in" else (original_albef(), 8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attention.self" in name and weight.dim() == 2:
                weight.normal_(std=0.3)  # maps that are not nearly uniform
    ids = torch.randint(1, 60, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model, (torch.randn(2, 3, 48, 48), ids, mask), f"text_encoder.encoder.layer.{layer}.crossattention.self"


@pytest.fixture(params=["stand-in", "its own code"])
def dino(request):
    torch.manual_seed(0)
    model = Dino(Block, 3, patch=8).eval() if request.param == "stand-in" else original_dino()
    for name, weight in model.named_parameters():
        if "qkv.weight" in name:
            nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False), torch.randn(2, 3, 32, 32)


def notebook(model, inputs, name):
    """Logits, P and dP of one cross-attention, computed as in ALBEF's notebook."""
    cross = model.get_submodule(name)
    cross.save_attention = True
    model.zero_grad()
    logits = model(*inputs)
    logits[:, 1].sum().backward()
    cross.save_attention = False
    return logits.detach(), cross.get_attention_map().detach(), cross.get_attn_gradients()


def exactly(model, inputs, name):
    """The result of `notebook` in float64."""
    images, ids, mask = inputs
    return notebook(copy.deepcopy(model).double(), (images.double(), ids, mask), name)


def weighted(p, dp):
    return (p * dp.clamp(0)).mean(1)


def test_every_layer_is_heard_and_nothing_is_left(pair):
    model, inputs, name = pair
    with torch.no_grad():
        plain, before = model(*inputs), state(model)
        with attnx.capture(model) as trace:
            heard = model(*inputs)
        assert_same_state(before, state(model))
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(*inputs), plain)
    want = [n for n, module in model.named_modules() if type(module).__name__ in ("Attention", "BertSelfAttention")]
    assert sorted(trace) == sorted(want)
    logits, p, _ = exactly(model, inputs, name)
    plain, own_p, _ = notebook(model, inputs, name)
    assert_within_budget(heard, logits, plain)
    assert_within_budget(trace[name], p.mean(1), own_p.mean(1).float(), exponent=8)
    assert trace["text_encoder.encoder.layer.0.attention.self"][1, :, 5:].max() == 0  # padding


def test_the_notebook_runs_on_a_patched_model(pair):
    model, inputs, name = pair
    exact, own = exactly(model, inputs, name), notebook(model, inputs, name)
    with attnx.capture(model) as trace:
        ours = notebook(model, inputs, name)
    for result, oracle, reference in zip(ours, exact, own, strict=True):
        assert_within_budget(result, oracle, reference, exponent=8)
    assert_within_budget(weighted(*ours[1:]), weighted(*exact[1:]), weighted(*own[1:]), exponent=8)
    torch.testing.assert_close(trace[name], ours[1].mean(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcam_of_a_capture_is_the_notebooks(pair, frozen):
    model, inputs, name = pair
    exact, own = exactly(model, inputs, name), notebook(model, inputs, name)
    model.requires_grad_(not frozen)
    cross = model.get_submodule(name)
    cross.save_attention = True
    with attnx.capture(model, layers=name, grad=True) as trace:
        trace.backward(model(*inputs)[:, 1].sum())
    assert_within_budget(trace[name], weighted(*exact[1:]), weighted(*own[1:]), exponent=8)
    # JobOptions in the old way too, even where the parameters are frozen and the original raises.
    assert_within_budget(cross.get_attn_gradients(), exact[2], own[2], exponent=8)


def test_without_gradients_the_map_is_saved_and_they_are_left(pair):
    model, inputs, name = pair
    _, p, dp = notebook(model, inputs, name)
    cross = model.get_submodule(name)
    cross.save_attention = True
    cross.save_attention_map(None)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cannot register a hook"):
            model(*inputs)
        with attnx.capture(model):
            model(*inputs)
    torch.testing.assert_close(cross.get_attention_map(), p)
    assert not cross.get_attention_map().requires_grad
    assert cross.get_attn_gradients() is dp


def test_an_images_hook_keeps_working(pair):
    model, (images, *_), _ = pair
    vit = model.visual_encoder
    attention = vit.blocks[1].attn

    def asked():
        out = vit(images, register_blk=1)
        (out * torch.arange(out.shape[-1])).sum().backward()
        return out.detach(), attention.get_attention_map().detach(), attention.get_attn_gradients()

    own = asked()
    with attnx.capture(vit) as trace:
        ours = asked()
    for result, reference in zip(ours, own, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace["blocks.1.attn"], own[1].mean(1), rtol=1e-4, atol=1e-6)


def attend(pair, **options):
    """Arguments for a call of the cross-attention alone."""
    model, (_, ids, _), name = pair
    x, image = torch.randn(2, ids.shape[1], 48), torch.randn(2, 10, 48)
    mask = torch.zeros(2, 1, 1, 10)
    mask[1, ..., 6:] = torch.finfo(torch.float32).min
    return (
        model.get_submodule(name),
        (x, None),
        dict(dict(encoder_hidden_states=image, encoder_attention_mask=mask), **options),
    )


def test_probabilities_that_are_returned(pair):
    cross, args, options = attend(pair, output_attentions=True)
    own = cross(*args, **options)
    with torch.no_grad(), attnx.capture(cross) as trace:
        undo = route_to_sdpa(cross)
        assert undo == []  # what is open is left alone
        context, p, (k, v) = cross.forward(*args, **options)
        cross(*args, **{**options, "output_attentions": False})
    for ours, theirs in zip((context, p, k, v), (*own[:2], *own[2]), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trace[""], p.mean(1), rtol=1e-4, atol=1e-6)
    # With gradients the map is part of the graph: the block's own forward runs, and its softmax is intercepted.
    with attnx.capture(cross) as trace:
        _, p, _ = cross.forward(*args, **options)
        assert p.requires_grad
        cross(args[0], None, torch.ones(2, 1, 1, 1), **{**options, "output_attentions": False})
    torch.testing.assert_close(trace[""], p.mean(1).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["head mask", "relative positions", "dropout"])
def test_what_sdpa_cannot_say_is_left_to_the_block(pair, what):
    cross, args, options = attend(pair)
    if what == "head mask":
        options["head_mask"] = torch.tensor([1.0, 0.0, 0.5])[None, :, None, None]
    elif what == "relative positions":
        cross.position_embedding_type = "relative_key"
        cross.max_position_embeddings = 7
        cross.distance_embedding = nn.Embedding(13, cross.attention_head_size)
        options["encoder_hidden_states"] = options["encoder_hidden_states"][:, :7]
        options["encoder_attention_mask"] = options["encoder_attention_mask"][..., :7]
    else:
        cross.train()
    torch.manual_seed(3)
    own = cross(*args, **options)
    torch.manual_seed(3)
    with attnx.capture(cross) as trace:
        ours = cross(*args, **options)
    assert torch.equal(ours[0], own[0])
    kept = 0.5 if what == "head mask" else 1.0  # the weights of the heads are 1, 0 and 0.5
    torch.testing.assert_close(trace[""].sum(-1), torch.full(trace[""].shape[:2], kept))


def test_keys_and_values_of_the_past_come_first(pair):
    model, _, _ = pair
    block = model.text_encoder.encoder.layer[0].attention.self
    x = torch.randn(2, 7, 48)
    causal = torch.full((7, 7), -10000.0).triu(1)[None, None]
    with torch.no_grad():
        whole, _ = block(x, causal)
        with attnx.capture(block) as trace:
            first, past = block(x[:, :4], causal[..., :4, :4])
            rest, (k, v) = block(x[:, 4:], causal[..., 4:, :], past_key_value=past)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-5)
    assert k.shape[2] == v.shape[2] == 7
    assert trace[""].shape == (2, 3, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast(pair, dtype):
    model, inputs, name = pair
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            plain = model(*inputs)
            with attnx.capture(model) as trace:
                heard = model(*inputs)
        exact = copy.deepcopy(model).double()(inputs[0].double(), *inputs[1:])
    assert trace[name].dtype == torch.float32
    assert_within_budget(heard, exact, plain, exponent=4)


def test_a_row_that_is_masked_whole_stays_finite_in_half(pair):
    cross, args, options = attend(pair)
    options["encoder_attention_mask"][1] = torch.finfo(torch.float32).min
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = cross(*args, **options)[0]
        undo = route_to_sdpa(cross)
        ours = cross(*args, **options)[0]
    assert "forward" in vars(cross)
    for put_back in undo:
        put_back()
    assert not torch.equal(ours, own)  # it was not the block's own forward
    torch.testing.assert_close(ours.float(), own.float(), rtol=0.05, atol=0.05)


def test_captures_nest_and_patches_overlap(pair):
    model, inputs, name = pair
    before = state(model)
    with torch.no_grad():
        with attnx.capture(model) as whole, attnx.capture(model.get_submodule(name), heads="each") as part:
            model(*inputs)
        torch.testing.assert_close(part[""].mean(1), whole[name], rtol=1e-5, atol=1e-7)
        first, second = attnx.patch(model), attnx.patch(model)
        first.remove()
        model(*inputs)
    assert name in second.trace
    second.remove()
    assert_same_state(before, state(model))


def test_an_exception_unbinds(pair):
    model, (images, ids, mask), _ = pair
    before = state(model)
    with pytest.raises(ValueError, match=r"layer\.0.*expected a shape that broadcasts"), attnx.capture(model):
        model(images, ids, mask[:, :3])
    assert_same_state(before, state(model))


def test_dino_and_the_probabilities_it_discards(dino, monkeypatch):
    model, images = dino
    made = []
    softmax = dino_adapter.probabilities_of
    monkeypatch.setattr(dino_adapter, "probabilities_of", lambda *args: made.append(softmax(*args)) or made[-1])
    before = state(model)
    plain, last = model(images), model.get_last_selfattention(images)
    exact = copy.deepcopy(model).double()
    with attnx.capture(model, heads="each") as trace:
        heard = model(images)
    assert not made
    assert_same_state(before, state(model))
    assert list(trace) == [f"blocks.{i}.attn" for i in range(3)]
    assert_within_budget(heard, exact(images.double()), plain)
    want = exact.get_last_selfattention(images.double())
    assert_within_budget(trace[-1], want, last, exponent=8)
    with attnx.capture(model, heads="each") as trace:
        assert_within_budget(model.get_last_selfattention(images), want, last, exponent=8)
        assert len(made) == 1
    assert_within_budget(trace["blocks.2.attn"], want, last, exponent=8)


def test_dinos_attention_called_alone_or_watched_gives_both(dino):
    model, images = dino
    seen = []
    hook = model.blocks[1].attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with attnx.capture(model, heads="each") as trace:
        model(images)
    hook.remove()
    torch.testing.assert_close(seen[0], trace[1], rtol=1e-5, atol=1e-7)
    x = torch.randn(2, 5, 48)
    own = model.blocks[0].attn(x)
    with attnx.capture(model.blocks[0].attn):
        ours = model.blocks[0].attn(x)
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dinos_probabilities_inside_a_graph_are_its_own(dino):
    model, images = dino
    model.requires_grad_(True)
    with attnx.capture(model, layers="blocks.2") as trace:
        p = model.get_last_selfattention(images)
        p[:, :, 0].square().sum().backward()
    torch.testing.assert_close(trace["blocks.2.attn"], p.mean(1).detach(), rtol=1e-5, atol=1e-7)
    assert model.blocks[2].attn.qkv.weight.grad.abs().max() > 0


class Gated(vits_attention()):
    """A block with the same interface that computes something else: it scales its output."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, register_hook=False):
        return super().forward(x, register_hook) * self.gate


def test_others_of_the_same_names_are_left_alone():
    import transformers

    bert = transformers.BertConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    Gated.__name__ = "Attention"
    models = (timm.create_model("vit_tiny_patch16_224", depth=1), transformers.BertModel(bert), Gated(12, 2))
    for model in models:
        undo = route_to_sdpa(model)
        assert not any("forward" in vars(module) for module in model.modules())
        while undo:
            undo.pop()()
