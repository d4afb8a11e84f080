"""A bias that repeats over the batch: item b uses bias[b % P]. The table's cases test the numbers of every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnx
from attnx.testing import Case, assert_attention_lse, oracle, random_gradient, random_inputs
from attnx.trace.attention_call import Call
from attnx.trace.folding import folding
from on_backends import LONG, SHORT, on_all, pairs

CASES = (
    Case(B=8, H=2, bias="PHMN"),
    Case(B=8, H=2, mask="P1MN"),
    Case(B=4, H=2, N=300, bias="P1MN", dtype=torch.bfloat16),
    Case(B=4, H=2, N=300, mask="PHMN"),
)


def copied(bias, items):
    return bias.repeat(items // len(bias), 1, 1, 1)


@pairs(CASES)
def test_output_and_lse(case, backend, device):
    inputs = random_inputs(case, device=device)
    out, lse = attnx.attention_lse(*inputs[:3], bias=inputs.bias, backend=backend)
    assert_attention_lse(out, lse, *inputs)


@pytest.mark.parametrize("N", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@on_all
def test_results_have_the_bits_of_a_copied_bias(backend, N, device):
    case = Case(B=6, H=2, N=N, bias="PHMN")
    q, k, v, bias = random_inputs(case, device=device)
    grad, r = random_gradient(case, device=device), torch.rand(6, 20, device=device)

    def results(bias):
        options = dict(bias=bias, backend=backend)
        return (
            *attnx.attention(q, k, v, **options),
            attnx.attention_map(q, k, rows=[3, 0], **options),
            attnx.attention_map(q, k, lse=torch.ones(6, 2, 20, device=device), **options),
            attnx.vecmat(r, q, k, **options),
            attnx.gradient_map(grad, q, k, v, **options),
        )

    for repeated, whole in zip(results(bias), results(copied(bias, 6)), strict=True):
        assert torch.equal(repeated, whole)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_the_gradient_of_the_bias_is_summed_over_the_images(backend, heads):
    q, k, v = (torch.randn(6, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, heads, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 5, 4, dtype=torch.float64)
    given = (q, k, v, bias)
    out = attnx.attention(q, k, v, bias=bias, backend=backend)[0]
    ours = torch.autograd.grad((out * weight).sum(), given)
    whole = F.scaled_dot_product_attention(q, k, v, copied(bias, 6))
    for mine, exact in zip(ours, torch.autograd.grad((whole * weight).sum(), given), strict=True):
        torch.testing.assert_close(mine, exact)


def test_rows_and_sinks():
    q, k, v, bias = random_inputs(Case(B=6, H=2, bias="PHMN"))
    rows = attnx.attention(q, k, v, bias=bias, rows=[2, 7], backend="eager")
    torch.testing.assert_close(rows[0], oracle(q, k, v, bias)[0].float())
    options = dict(sinks=torch.randn(2))
    for mine, exact in zip(
        attnx.attention(q, k, v, bias=bias, **options), oracle(q, k, v, bias, **options), strict=True
    ):
        torch.testing.assert_close(mine, exact.float())


@pytest.mark.parametrize("items", [0, 4, 5, 12])
def test_other_numbers_of_items_are_refused(items):
    q = torch.randn(6, 2, 5, 4)
    with pytest.raises(
        ValueError, match=rf"bias: expected a first dimension that divides the batch of 6; got \[{items}, 2, 5, 5\]"
    ):
        attnx.attention(q, q, q, bias=torch.zeros(items, 2, 5, 5))


class WindowAttention(nn.Module):
    """Stands for a Swin block: its class name says that windows come before heads."""

    num_heads = 2


@pytest.mark.parametrize(
    ("shape", "items"),
    [((4, 2, 5, 5), 4), ((4, 1, 5, 5), 4), ((1, 4, 2, 5, 5), 4), ((1, 2, 5, 5), 1), ((3, 4, 2, 5, 5), 12),
     ((3, 1, 1, 5, 5), 12), ((5, 5), None)],
)  # fmt: skip
def test_a_mask_of_one_image_is_not_copied(shape, items):
    q = torch.randn(3, 4, 2, 5, 8)
    mask = torch.randn(shape)
    call = Call.of(F.scaled_dot_product_attention, WindowAttention(), (q, q, q, mask), {})
    assert call.q.shape == (12, 2, 5, 8)
    assert items is None or len(call.bias) == items
    assert items not in (1, 4) or call.bias.data_ptr() == mask.data_ptr()
    expected = F.scaled_dot_product_attention(q, q, q, mask)
    torch.testing.assert_close(call.output(), expected)
    out, amap = attnx.attention(call.q, call.k, call.v, bias=call.bias, heads="each")
    torch.testing.assert_close(call.unfold(out), expected)
    weights = (q @ q.mT * 8**-0.5 + mask).softmax(-1)
    torch.testing.assert_close(amap, weights.flatten(0, 1))


def test_folding_of_windows_and_heads_of_equal_number():
    fold = folding((3, 2, 2, 5, 5), [(WindowAttention(), None)]).fold
    t = torch.randn(3, 2, 2, 5, 5)
    assert torch.equal(fold(t), t.flatten(0, 1))


@pytest.mark.parametrize("grad", [False, True])
def test_a_shifted_swin_block(grad):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("swinv2_tiny_window8_256", pretrained=False, img_size=64, window_size=4, depths=(2,),
                              num_heads=(3,), num_classes=3).eval().requires_grad_(grad)  # fmt: skip
    x = torch.randn(2, 3, 64, 64)
    name = next(name for name, m in model.named_modules() if name.endswith("blocks.1.attn"))
    with torch.set_grad_enabled(grad):
        plain = model(x)
        with attnx.capture(model, keep="qk") as trace:
            out = model(x)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    windows = 16
    assert len(trace._records[name].bias) == (2 * windows if grad else windows)
    if grad:
        (out.square().sum()).backward()
        assert all(p.grad is not None for p in model.parameters())
