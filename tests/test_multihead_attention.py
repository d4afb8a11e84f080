"""`nn.MultiheadAttention` is intercepted in every form, and its output does not change."""

import pytest
import torch
from torch import Tensor, nn

import attnx

FORMS = {
    "self, no weights": (dict(batch_first=True), dict(need_weights=False)),
    "self, weights": (dict(batch_first=True), dict(need_weights=True)),
    "weights of each head": (dict(batch_first=True), dict(need_weights=True, average_attn_weights=False)),
    "sequence first": (dict(), dict(need_weights=False)),
    "other widths": (dict(batch_first=True, kdim=24, vdim=12), dict(need_weights=True)),
    "bias_k and zero": (dict(batch_first=True, add_bias_kv=True, add_zero_attn=True), dict(need_weights=True)),
}
MASKS = ("none", "padding", "boolean", "float", "causal")


class Net(nn.Module):
    def __init__(self, options: dict, call: dict) -> None:
        super().__init__()
        self.attn, self.call = nn.MultiheadAttention(48, 4, **options), call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: object) -> tuple[Tensor, Tensor | None]:
        return self.attn(q, k, v, **self.call, **masks)


def inputs(form: str, mask: str) -> tuple[tuple[Tensor, ...], dict]:
    options, _ = FORMS[form]
    x = torch.randn(2, 6, 48)
    q, k, v = x, torch.randn(2, 6, options.get("kdim", 48)), torch.randn(2, 6, options.get("vdim", 48))
    given = (x, x, x) if "kdim" not in options else (q, k, v)
    if not options.get("batch_first"):
        given = tuple(t.transpose(0, 1).contiguous() for t in given)
        given = (given[0],) * 3
    masks: dict = {}
    if mask == "padding":
        masks["key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    elif mask == "boolean":
        masks["attn_mask"] = torch.rand(6, 6) > 0.7
        masks["attn_mask"].fill_diagonal_(False)
    elif mask == "float":
        masks["attn_mask"] = torch.randn(6, 6)
    elif mask == "causal":
        masks.update(attn_mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)
    return given, masks


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_output_weights_and_map(form: str, mask: str) -> None:
    torch.manual_seed(0)
    model = Net(*FORMS[form]).eval()
    given, masks = inputs(form, mask)
    with torch.no_grad():
        out, weights = model(*given, **masks)
        want = model.attn(*given, need_weights=True, **{**masks, "is_causal": False})[1]
        with attnx.capture(model) as trace, attnx.capture(model, heads="each", keep="qk") as each:
            heard, again = model(*given, **masks)
    torch.testing.assert_close(heard, out, rtol=1e-4, atol=1e-6)
    assert (weights is None) == (again is None)
    if weights is not None and again is not None:
        torch.testing.assert_close(again, weights, rtol=1e-5, atol=1e-7)
    assert list(trace) == ["attn"]
    torch.testing.assert_close(trace["attn"], want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(each["attn"].mean(1), want, rtol=1e-4, atol=1e-6)


def test_gradients_of_maps_and_parameters() -> None:
    torch.manual_seed(0)
    model = Net(*FORMS["self, weights"]).eval()
    x = torch.randn(2, 6, 48)
    q, k, v = (
        (x @ model.attn.in_proj_weight.T + model.attn.in_proj_bias).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
    )
    p = (q @ k.mT * 12**-0.5).softmax(-1)
    p.retain_grad()
    model.attn.out_proj((p @ v).transpose(1, 2).flatten(2)).sum().backward()
    want = {n: w.grad.clone() for n, w in model.named_parameters()}
    model.zero_grad()
    with attnx.capture(model, grad=True) as trace:
        model(x, x, x)[0].sum().backward()
    for n, w in model.named_parameters():
        torch.testing.assert_close(w.grad, want[n], rtol=1e-4, atol=1e-6)
    assert p.grad is not None
    torch.testing.assert_close(trace["attn"], (p.grad.clamp(min=0) * p).mean(1).detach(), rtol=1e-4, atol=1e-7)


def test_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, 2, 4, 32, 64).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with attnx.capture(model) as trace:
            torch.testing.assert_close(model(images), plain, rtol=1e-4, atol=1e-5)
    assert (trace.layout.prefix, trace.layout.grid) == (1, (4, 4))
    for method, want in (("rollout", attnx.rollout(trace)), ("cls", attnx.cls_map(trace))):
        extract = attnx.Extractor(model, method)
        for _ in range(2):
            torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)
        assert extract.plan.bound
    assert attnx.class_maps(model, images, [1]).shape == (2, 1, 4, 4)


def test_unbatched() -> None:
    torch.manual_seed(0)
    model = Net(dict(), dict()).eval()
    x = torch.randn(6, 48)
    with torch.no_grad():
        out, weights = model(x, x, x)
        with attnx.capture(model) as trace:
            heard, _ = model(x, x, x)
    torch.testing.assert_close(heard, out, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trace["attn"][0], weights, rtol=1e-4, atol=1e-6)


def test_a_row_without_keys_is_what_the_model_makes_of_it() -> None:
    torch.manual_seed(0)
    model = Net(*FORMS["self, weights"]).eval()
    x = torch.randn(2, 6, 48)
    padding = torch.tensor([[False] * 6, [True] * 6])
    with torch.no_grad():
        out, weights = model(x, x, x, key_padding_mask=padding)
        with attnx.capture(model) as trace:
            heard, again = model(x, x, x, key_padding_mask=padding)
    assert out[1].isnan().all()
    torch.testing.assert_close(heard, out, equal_nan=True)
    torch.testing.assert_close(again, weights, equal_nan=True)
    assert trace["attn"][1].abs().max() == 0
