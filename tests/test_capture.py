"""capture and patch: the intercepted layers, the model output, and that the model is restored."""

import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import attnx
from attnx.testing import oracle
from attnx.trace.layers import attention_layers

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {**TINY, "img_size": (48, 64)}, (48, 64), 1, (3, 4)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {**TINY, "img_size": 48}, (48, 48), 2, (3, 3)),
    "dino": ("vit_small_patch8_224.dino", {**TINY, "img_size": 32, "num_classes": 0}, (32, 32), 1, (4, 4)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {**TINY, "img_size": (42, 56)}, (42, 56), 5, (3, 4)),
    "dynamic size": ("vit_tiny_patch16_224", {**TINY, "dynamic_img_size": True}, (80, 32), 1, (5, 2)),
    "eva02": ("eva02_tiny_patch14_224", {**TINY, "img_size": 56}, (56, 56), 1, (4, 4)),
    "eva rope": ("vit_small_patch16_dinov3", {**TINY, "img_size": (48, 64)}, (48, 64), 5, (3, 4)),
    "beit": ("beit_base_patch16_224", {**TINY, "img_size": 48}, (48, 48), 1, (3, 3)),
    "no class token": ("vit_base_patch16_siglip_gap_224", {**TINY, "img_size": 48}, (48, 48), 0, (3, 3)),
    "registers only": ("vit_wee_patch16_reg1_gap_256", {**TINY, "img_size": 48}, (48, 48), 1, (3, 3)),
}
HF = {
    "ViT": ({}, (48, 48), 1),
    "Dinov2": ({"patch_size": 14, "image_size": 56}, (56, 84), 1),
    "Dinov2WithRegisters": ({"patch_size": 14, "image_size": 56, "num_register_tokens": 4}, (56, 84), 5),
    "DINOv3ViT": ({"num_register_tokens": 4}, (48, 64), 5),
    "CLIPVision": ({}, (48, 48), 1),
    "SiglipVision": ({}, (48, 48), 0),
}


def timm_model(family: str) -> tuple[nn.Module, Tensor]:
    name, options, size, *_ = TIMM[family]
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **options).eval(), torch.randn(2, 3, *size)


def hf_model(family: str, implementation: str) -> tuple[nn.Module, Tensor, dict]:
    import transformers

    options, size, _ = HF[family]
    small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}
    config = getattr(transformers, family + "Config")(**{**small, "image_size": 48, "patch_size": 16, **options})
    torch.manual_seed(0)
    model = getattr(transformers, family + "Model")._from_config(config, attn_implementation=implementation).eval()
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return model, torch.randn(2, 3, *size), {"interpolate_pos_encoding": True} if takes else {}


def state(model: nn.Module) -> dict:
    """The state of a model that a capture could change."""
    kept: dict = {f"param {k}": v.clone() for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                kept[name, key] = {k: id(v) for k, v in value.items()}
            elif isinstance(value, (bool, int, float, str)):
                kept[name, key] = value
            else:
                kept[name, key] = id(value)
        kept[name, "class"] = type(module)
        kept[name, "implementation"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return kept


def assert_same_state(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


@pytest.fixture
def vit() -> tuple[nn.Module, Tensor]:
    return timm_model("vit")


def eager_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """timm's own per-head maps [B, H, N, N] of each layer, from its unfused attention."""
    maps: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda m, a, out: maps.append(out)))
    with torch.no_grad():
        model(images)
    for hook, block in zip(hooks, model.blocks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    return maps


@pytest.mark.parametrize("family", TIMM)
def test_timm_families(family: str) -> None:
    model, images = timm_model(family)
    *_, prefix, grid = TIMM[family]
    before = state(model)
    with torch.no_grad():
        plain = model(images)
        with attnx.capture(model) as trace:
            heard = model(images)
        again = model(images)
    assert_same_state(before, state(model))
    assert torch.equal(plain, again)
    torch.testing.assert_close(heard, plain, rtol=1e-5, atol=1e-5)
    assert list(trace) == [f"blocks.{i}.attn" for i in range(3)]
    assert (trace.layout.prefix, trace.layout.grid) == (prefix, grid)
    assert trace[-1].shape == (2, trace.layout.tokens, trace.layout.tokens)
    torch.testing.assert_close(trace[0].sum(-1), torch.ones(2, trace.layout.tokens))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", HF)
def test_huggingface_families(family: str, implementation: str) -> None:
    model, images, kwargs = hf_model(family, implementation)
    before = state(model)
    with torch.no_grad():
        plain = model(images, **kwargs).last_hidden_state
        with attnx.capture(model) as trace:
            heard = model(images, **kwargs).last_hidden_state
        again = model(images, **kwargs).last_hidden_state
    assert_same_state(before, state(model))
    assert torch.equal(plain, again)
    torch.testing.assert_close(heard, plain, rtol=1e-4, atol=1e-5)
    assert trace.layout.prefix == HF[family][2]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(images, output_attentions=True, **kwargs).attentions
    # The pooling head is intercepted too; transformers returns no map for it.
    for layer, theirs in zip(attention_layers(model), attentions, strict=True):
        torch.testing.assert_close(trace[layer], theirs.mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", ["mean", "max", "min", "each"])
def test_maps_equal_timms_own(vit: tuple[nn.Module, Tensor], heads: str) -> None:
    model, images = vit
    with torch.no_grad(), attnx.capture(model, heads=heads) as trace:
        model(images)
    for ours, theirs in zip(trace.values(), eager_maps(model, images), strict=True):
        fused = {"mean": theirs.mean(1), "max": theirs.amax(1), "min": theirs.amin(1), "each": theirs}[heads]
        torch.testing.assert_close(ours, fused, rtol=1e-4, atol=1e-6)


def test_unfused_blocks_are_heard_and_stay_unfused(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    model.blocks[1].attn.fused_attn = False
    before = state(model)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    assert len(trace) == 3
    assert_same_state(before, state(model))


@pytest.mark.parametrize(
    ("layers", "heard"),
    [
        ("blocks.1.attn", [1]),
        ("blocks.1", [1]),
        ("blocks.[02].*", [0, 2]),
        (-1, [2]),
        ([0, -1], [0, 2]),
        (["*.2.attn", 0], [0, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_selection(vit: tuple[nn.Module, Tensor], layers: object, heard: list[int]) -> None:
    model, images = vit
    with torch.no_grad(), attnx.capture(model, layers=layers) as trace:  # type: ignore[arg-type]
        model(images)
    assert list(trace) == [f"blocks.{i}.attn" for i in heard]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block.1", r"'block.1' matches no module; attention layers: blocks.0.attn, "),
        (3, r"expected an index into 3 attention layers; got 3"),
        ([], "expected at least one layer"),
        (1.5, "expected names, globs or depth indices; got 1.5"),
    ],
)
def test_selection_of_nothing(vit: tuple[nn.Module, Tensor], layers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), attnx.capture(vit[0], layers=layers):  # type: ignore[arg-type]
        pass


def test_rows(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    with torch.no_grad():
        with attnx.capture(model) as whole:
            model(images)
        with attnx.capture(model, rows=[0, 5]) as chosen:
            model(images)
    for name in whole:
        assert chosen[name].shape == (2, 2, 13)
        torch.testing.assert_close(chosen[name], whole[name][:, [0, 5]], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"blocks.0.attn: rows: expected .* -13..12"), attnx.capture(model, rows=[13]):
        model(images)


def test_silence_is_an_error(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    with pytest.raises(RuntimeError, match="the model was not called"), attnx.capture(model):
        pass
    with pytest.raises(RuntimeError, match=r"not intercepted: blocks.0.mlp: .*intercepted: blocks.0.attn"):
        with torch.no_grad(), attnx.capture(model, layers="blocks.0.mlp"):
            model(images)

    class Deaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    deaf = Deaf()
    with pytest.raises(RuntimeError, match="nothing was captured: Deaf ran"), attnx.capture(deaf):
        deaf(images)


def test_dropout_is_an_error(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    model.train()
    model.blocks[0].attn.attn_drop.p = 0.1
    with pytest.raises(ValueError, match=r"blocks.0.attn: expected dropout_p = 0; got 0.1; call model.eval"):
        with attnx.capture(model):
            model(images)


def test_an_exception_leaves_nothing(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    before = state(model)
    with pytest.raises(AssertionError), attnx.capture(model):
        model(images[..., :32])
    with pytest.raises(ZeroDivisionError), torch.no_grad(), attnx.capture(model):
        model(images)
        raise ZeroDivisionError
    assert_same_state(before, state(model))
    assert torch.overrides._len_torch_function_stack() == 0
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    assert len(trace) == 3


def test_nested_and_two_models(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    other, _ = timm_model("vit")
    with torch.no_grad(), attnx.capture(model) as mean, attnx.capture(model, heads="each", layers=1) as each:
        model(images)
    assert len(mean) == 3
    torch.testing.assert_close(each[0].mean(1), mean[1])
    with torch.no_grad(), attnx.capture(model) as one, attnx.capture(other) as two:
        other(images)
        model(images + 1)
    assert not torch.equal(one[0], two[0])
    assert len(one) == len(two) == 3
    # A capture of a part inside a capture of the whole.
    with torch.no_grad(), attnx.capture(model) as whole, attnx.capture(model.blocks[1]) as part:
        model(images)
    assert list(part) == ["attn"]
    assert torch.equal(part["attn"], whole["blocks.1.attn"])


def test_a_new_pass_replaces_the_last(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images[:1])
        model(images)
    assert trace[0].shape[0] == 2
    with torch.no_grad(), attnx.capture(model) as trace:
        model.forward_features(images)
    assert len(trace) == 3
    assert trace.layout.grid == (3, 4)


def test_a_shared_layer_is_numbered() -> None:
    block = timm.layers.Attention(48, 3)
    model = nn.Sequential(block, block).eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(1, 5, 48))
    assert list(trace) == ["0", "0#2"]


def test_trace(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    assert trace[-1] is trace["blocks.2.attn"]
    assert "[2, 13, 13]" in repr(trace)
    with pytest.raises(KeyError, match=r"expected one of blocks.0.attn"):
        trace["blocks.7"]
    with pytest.raises(KeyError, match="expected an index into 3 layers"):
        trace[3]


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "grad", "autocast", "bfloat16"])
def test_modes(vit: tuple[nn.Module, Tensor], mode: str) -> None:
    model, images = vit
    if mode == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()
    context = {
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "grad": torch.enable_grad(),
    }.get(mode, torch.no_grad())
    with context:
        plain = model(images)
        with attnx.capture(model) as trace:
            heard = model(images)
    assert heard.dtype == plain.dtype
    loose = 2e-2 if plain.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(heard, plain, rtol=loose, atol=loose)
    assert trace
    assert all(m.dtype == torch.float32 and not m.requires_grad for m in trace.values())
    if mode == "grad":
        heard.sum().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        model(images).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_before_and_inside(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(images)
        with attnx.capture(compiled) as trace:
            heard = compiled(images)
        assert torch.equal(compiled(images), plain)
        with attnx.capture(model) as inside:
            torch.compile(model, backend="aot_eager")(images)
    assert list(trace) == list(inside) == [f"blocks.{i}.attn" for i in range(3)]
    torch.testing.assert_close(heard, plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"use attnx.capture, or patch model\._orig_mod"):
        attnx.patch(compiled)
    torch._dynamo.reset()


def test_patch(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    before = state(model)
    handle = attnx.patch(model, layers=[0, 2], heads="max")
    with pytest.raises(RuntimeError, match="the model was not called"):
        handle.trace  # noqa: B018
    with torch.no_grad():
        for batch in (images[:1], images):
            model(batch)
            assert handle.trace[0].shape[0] == len(batch)
    assert list(handle.trace) == ["blocks.0.attn", "blocks.2.attn"]
    handle.remove()
    handle.remove()
    assert_same_state(before, state(model))


@pytest.mark.long
def test_a_patched_model_may_be_compiled(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    handle = attnx.patch(model)
    with torch.no_grad():
        model(images)
        want = {name: m.clone() for name, m in handle.trace.items()}
        model(images + 1)
        torch.compile(model, backend="aot_eager")(images)
    for name, amap in handle.trace.items():
        torch.testing.assert_close(amap, want[name], rtol=1e-5, atol=1e-7)
    handle.remove()
    torch._dynamo.reset()


def test_bias_causal_and_grouped_heads_are_passed_on() -> None:
    class Custom(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            sdpa = nn.functional.scaled_dot_product_attention
            return sdpa(q, k, v, attn_mask=bias, scale=0.3, enable_gqa=True)

    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    bias = torch.randn(5, 7)
    model = Custom().eval()
    with attnx.capture(model) as trace:
        out = model(q, k, v, bias)
    want, amap = oracle(q, k, v, bias=bias, scale=0.3)
    assert list(trace) == [""]
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace[""].double(), amap, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"no map can be made of the model itself: expected q, k and v of"):
        with attnx.capture(model):
            model(q[0], k[0], v[0], bias)


def test_pooling_heads_are_no_depth() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", pretrained=False, **TINY, img_size=48).eval()
    assert attention_layers(model) == [f"blocks.{i}.attn" for i in range(3)]
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(1, 3, 48, 48))
    assert list(trace)[-1] == "attn_pool"
    assert trace["attn_pool"].shape == (1, 1, 9)


def test_attn_implementation_gives_the_maps_as_attentions() -> None:
    from attnx import huggingface

    huggingface.register()
    model, images, kwargs = hf_model("Dinov2WithRegisters", "eager")
    with torch.no_grad():
        plain = model(images, output_attentions=True, **kwargs)
        model.set_attn_implementation("attnx")
        ours = model(images, output_attentions=True, **kwargs)
    torch.testing.assert_close(ours.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.attentions, plain.attentions, strict=True):
        torch.testing.assert_close(a, b.mean(1), rtol=1e-4, atol=1e-6)


def test_attn_implementation_keeps_padding_masked() -> None:
    import transformers

    from attnx import huggingface

    huggingface.register()
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.BertModel._from_config(config, attn_implementation="attnx").eval()
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        alone = model(ids[:, :4]).last_hidden_state
        padded = model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), output_attentions=True)
    torch.testing.assert_close(padded.last_hidden_state[:, :4], alone, rtol=1e-4, atol=1e-5)
    assert padded.attentions[0][..., 4:].abs().max() == 0


def test_hooks_of_the_user_that_raise(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit

    def stop(module: nn.Module, *_: object) -> None:
        raise ZeroDivisionError

    for register in (model.blocks[1].register_forward_pre_hook, model.blocks[1].register_forward_hook):
        hook = register(stop)
        with pytest.raises(ZeroDivisionError), torch.no_grad(), attnx.capture(model), attnx.capture(model):
            model(images)
        assert torch.overrides._len_torch_function_stack() == 0
        hook.remove()


def test_overlapping_patches_keep_the_blocks_open(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    for block in model.blocks:
        block.attn.fused_attn = False
    before = state(model)
    first, second = attnx.patch(model), attnx.patch(model)
    first.remove()
    with torch.no_grad():
        model(images)
    assert len(second.trace) == 3
    second.remove()
    assert_same_state(before, state(model))


def test_a_pass_that_did_not_finish_is_no_trace(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    handle = attnx.patch(model)
    with torch.no_grad():
        model(images)
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        with pytest.raises(RuntimeError, match="the model's last call did not finish"):
            handle.trace  # noqa: B018
        hook.remove()
        model(images)
    assert len(handle.trace) == 3
    handle.remove()


def test_the_grid_is_that_of_the_last_input() -> None:
    model, _ = timm_model("dynamic size")
    handle = attnx.patch(model)
    with torch.no_grad():
        for size, grid in (((48, 64), (3, 4)), ((64, 48), (4, 3)), ((48, 64), (3, 4))):
            model.forward_features(torch.randn(1, 3, *size))
            assert handle.trace.layout.grid == grid
    handle.remove()


def test_output_attentions_inside_a_capture() -> None:
    model, images, kwargs = hf_model("Dinov2", "eager")
    with torch.no_grad(), pytest.raises(ValueError, match="output_attentions: expected False inside a capture"):
        with attnx.capture(model):
            model(images, output_attentions=True, **kwargs)
    with torch.no_grad():
        assert len(model(images, output_attentions=True, **kwargs).attentions) == 3


def test_other_attention_implementations_are_heard() -> None:
    from attnx import huggingface

    huggingface.register()
    model, images, kwargs = hf_model("ViT", "sdpa")
    model.set_attn_implementation("attnx")
    before = state(model)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images, **kwargs)
    assert len(trace) == 3
    assert_same_state(before, state(model))


@pytest.mark.parametrize("rows", [0.5, "0", [0.5], [None], True, [True]])
def test_rows_that_are_no_indices(vit: tuple[nn.Module, Tensor], rows: object) -> None:
    with pytest.raises(ValueError, match="rows: expected an integer or a sequence of integers; got"):
        with attnx.capture(vit[0], rows=rows):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rows": []}, "rows: expected at least one row, or None for all; got none"),
        ({"layout": (4, 4)}, r"layout: expected a TokenLayout; got \(4, 4\)"),
    ],
)
def test_options_that_mean_nothing(vit: tuple[nn.Module, Tensor], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected), attnx.capture(vit[0], **options):
        pass


def test_rows_as_tensor(vit: tuple[nn.Module, Tensor]) -> None:
    model, images = vit
    with torch.no_grad(), attnx.capture(model, rows=torch.tensor([0, 2])) as trace:  # type: ignore[arg-type]
        model(images)
    assert trace.rows == (0, 2)
    assert trace[0].shape == (2, 2, 13)


def test_parallel_attention_has_no_order_for_rollout() -> None:
    model = timm.create_model("vit_small_patch16_18x2_224", pretrained=False, **TINY, img_size=48).eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(1, 3, 48, 48))
    assert len(trace) == 6
    with pytest.raises(ValueError, match=r"blocks.0.attns.1 runs beside blocks.0.attns.0"):
        attnx.rollout(trace)


def test_blocks_that_attend_themselves_have_a_depth() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, **TINY, img_size=48, block_fn=ParallelScalingBlock
    ).eval()
    assert attention_layers(model) == [f"blocks.{i}" for i in range(3)]
    with torch.no_grad(), attnx.capture(model, layers=-1) as trace:
        model(torch.randn(1, 3, 48, 48))
    assert list(trace) == ["blocks.2"]


def test_layers_that_stay_silent_are_told() -> None:
    class DeafAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x @ x.mT) @ x

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heard = timm.layers.Attention(48, 3)
            self.deaf_attention = DeafAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.deaf_attention(self.heard(x))

    model = Half().eval()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="not intercepted.*: deaf_attention: it did not call"),
    ):
        with attnx.capture(model):
            model(torch.randn(1, 5, 48))
