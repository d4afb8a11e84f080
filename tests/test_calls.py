"""Every forward pass inside a capture is recorded, and every row of a map is a query."""

import pytest
import timm
import torch
from torch import Tensor, nn

import attnx


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, img_size=48).eval()


def llama(kind: str = "Llama", **options: object) -> nn.Module:
    import transformers

    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    config = getattr(transformers, f"{kind}Config")(**small, intermediate_size=64, vocab_size=60, **options)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def llava() -> tuple[nn.Module, dict]:
    import transformers

    vision = dict(model_type="clip_vision_model", hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
    text = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config={**vision, "intermediate_size": 64, "image_size": 32, "patch_size": 16, "projection_dim": 32},
        text_config={**text, "intermediate_size": 64, "vocab_size": 60, "pad_token_id": 0},
        image_token_index=59,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    ids = torch.tensor([[5, 59, 59, 59, 59, 6, 7]])
    given = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), max_new_tokens=3, do_sample=False)
    return transformers.LlavaForConditionalGeneration(config).eval(), {**given, "eos_token_id": None}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("heads", ["mean", "max", "each"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_are_queries_in_every_step_of_a_padded_batch(kind: str, heads: str, cache: str) -> None:
    model = llama(kind, **({"sliding_window": 4} if kind == "Mistral" else {}))
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 5, 6, 7, 8, 4]])
    given = dict(attention_mask=(ids != 0).long(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    if cache == "static":
        given["cache_implementation"] = "static"
    with torch.no_grad():
        with attnx.capture(model, heads=heads, calls="all") as trace:
            tokens = model.generate(ids, **given)
        model.set_attn_implementation("eager")
        want = model.generate(ids, **given, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(tokens, want.sequences)
    assert len(trace.calls) == len(want.attentions) == 4
    for call, step in zip(trace.calls, want.attentions, strict=True):
        for ours, theirs in zip(call.values(), step, strict=True):
            fused = {"mean": theirs.mean(1), "max": theirs.amax(1), "each": theirs}[heads]
            assert ours.shape == fused.shape
            # Rows of padding have no keys: ours are zero, transformers' are uniform.
            seen = ours.sum(-1) > 0
            assert seen[..., -1].all()
            torch.testing.assert_close(ours[seen], fused[seen], rtol=1e-4, atol=1e-6)


def test_a_packed_step_keeps_q_and_k_and_rows() -> None:
    model = llama()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 5, 6, 7, 8, 4]])
    given = dict(attention_mask=(ids != 0).long(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        with attnx.capture(model) as maps:
            model.generate(ids, **given)
        with attnx.capture(model, keep="qk") as qk, attnx.capture(model, rows=[0], heads="each") as rows:
            model.generate(ids, **given)
    for name in maps:
        torch.testing.assert_close(qk[name], maps[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rows[name].mean(1), maps[name], rtol=1e-4, atol=1e-6)


def test_all_calls_of_a_loop() -> None:
    model = vit()
    batches = [torch.randn(n, 3, 48, 48) for n in (1, 2, 3)]
    with torch.no_grad():
        with attnx.capture(model, calls="all") as trace:
            for images in batches:
                model(images)
        alone = []
        for images in batches:
            with attnx.capture(model) as one:
                model(images)
            alone.append(one)
    assert [call[0].shape[0] for call in trace.calls] == [1, 2, 3]
    assert trace[0] is trace.calls[-1][0]
    for call, one in zip(trace.calls, alone, strict=True):
        assert torch.equal(attnx.rollout(call), attnx.rollout(one))
    assert list(trace.calls["blocks.1.attn"]) == [0, 1, 2]
    with pytest.raises(KeyError, match=r"expected one of blocks\.0\.attn, blocks\.1"):
        trace.calls["blocks.7"]


def test_the_mean_of_a_loop() -> None:
    model = vit()
    batches = [torch.randn(2, 3, 48, 48) for _ in range(3)]
    with torch.no_grad():
        with attnx.capture(model, calls="all") as every, attnx.capture(model, calls="mean") as mean:
            for images in batches:
                model(images)
        with pytest.raises(ValueError, match=r"calls='mean': expected maps of one shape; .* \[2, 10, 10\], then \[1, "):
            with attnx.capture(model, calls="mean"):
                model(batches[0])
                model(batches[0][:1])
    for name in mean:
        want = torch.stack(list(every.calls[name].values())).mean(0)
        torch.testing.assert_close(mean[name], want, rtol=1e-5, atol=1e-7)
    assert attnx.rollout(mean).shape == (2, 3, 3)


def test_images_of_other_grids_have_no_mean() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=32, num_heads=2, dynamic_img_size=True
    ).eval()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"of one grid; .* has \(2, 8\), then \(8, 2\)"),
    ):
        with attnx.capture(model, calls="mean"):
            model(torch.randn(1, 3, 32, 128))
            model(torch.randn(1, 3, 128, 32))


def test_a_loop_of_forward_features() -> None:
    model = vit()
    with torch.no_grad(), attnx.capture(model, calls="all") as trace:
        for n in (1, 2):
            model.forward_features(torch.randn(n, 3, 48, 48))
    assert [list(call) for call in trace.calls] == [["blocks.0.attn", "blocks.1.attn"]] * 2
    assert [call[0].shape[0] for call in trace.calls] == [1, 2]
    assert attnx.rollout(trace).shape == (2, 3, 3)


def test_calls_that_are_none() -> None:
    model = vit()
    with pytest.raises(ValueError, match="calls: expected one of last, all, mean"):
        with attnx.capture(model, calls="first"):
            pass
    for options in ({"grad": True}, {"keep": "qk"}):
        with pytest.raises(ValueError, match="calls: expected 'last' or 'all' with grad or keep='qk'"):
            with attnx.capture(model, calls="mean", **options):  # type: ignore[arg-type]
                pass


def test_a_vision_tower_around_generate() -> None:
    model, given = llava()
    layers = "model.vision_tower.*"
    with torch.no_grad():
        with pytest.raises(
            RuntimeError, match=r"it attended in call 1 of [34], and not in the last; calls='all' keeps"
        ):
            with attnx.capture(model, layers=layers):
                model.generate(**given)
        with attnx.capture(model, layers=layers, calls="all") as trace:
            model.generate(**given)
        with pytest.warns(UserWarning, match=r"vision_tower.*it attended in call 1 of [34], and not in the last"):
            with attnx.capture(model):
                model.generate(**given)
    assert [len(call) for call in trace.calls if call] == [2]
    assert list(trace.calls[next(iter(trace.calls[0]))]) == [0]
    assert attnx.rollout(trace.calls[0]).shape == (1, 2, 2)
    with pytest.raises(KeyError, match=r"call 0 contains it: trace.calls\[0\]"):
        trace[next(iter(trace.calls[0]))]


def test_never_is_told_from_earlier() -> None:
    model = vit()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"blocks.0.mlp: it did not call"):
        with attnx.capture(model, layers=["blocks.0.mlp", "blocks.0"]):
            model(torch.randn(1, 3, 48, 48))


def test_a_part_that_is_called_again_and_again() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = timm.layers.Attention(48, 3)

        def steps(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.attn(x)
            return x

    model = Loop().eval()
    with torch.no_grad(), attnx.capture(model, calls="all") as trace:
        model.steps(torch.randn(1, 5, 48))
    assert [list(call) for call in trace.calls] == [["attn"]] * 3


@pytest.mark.parametrize("calls", ["mean", "all"])
def test_a_pass_that_fails_is_in_no_mean_and_no_list(calls: str) -> None:
    model = vit()
    batches = [torch.randn(2, 3, 48, 48) for _ in range(3)]
    with torch.no_grad():
        with attnx.capture(model, calls=calls) as trace:
            model(batches[0])
            hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(batches[1])
            hook.remove()
            model(batches[2])
        with attnx.capture(model, calls="all") as want:
            model(batches[0])
            model(batches[2])
    if calls == "all":
        assert len(trace.calls) == 2
    for name in want:
        first, second = want.calls[name].values()
        got = trace[name] if calls == "mean" else trace.calls[0][name]
        torch.testing.assert_close(got, (first + second) / 2 if calls == "mean" else first, rtol=1e-5, atol=1e-7)


def test_layers_that_miss_a_pass_keep_their_place_in_the_mean() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(timm.layers.Attention(48, 3) for _ in range(3))

        def forward(self, x: Tensor, skip: bool) -> None:
            for i, layer in enumerate(self.layers):
                x = x if skip and i == 1 else layer(x)

    model = Skips().eval()
    with torch.no_grad(), attnx.capture(model, calls="mean") as trace:  # a model that returns None has passes, too
        for skip in (False, True):
            model(torch.randn(1, 5, 48), skip)
    assert list(trace) == ["layers.0", "layers.1", "layers.2"]
