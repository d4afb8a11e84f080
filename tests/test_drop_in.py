"""The op in place of `F.scaled_dot_product_attention`: its argument names, key-padding masks, rows of any spelling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnx
from attnx.testing import Case, random_inputs
from on_backends import of_both_lengths, on_all

B, H, M, N = 2, 3, 4, 5
# Every public op with a bias: its call with q, k, v and more arguments.
OPS = {
    "attention": attnx.attention,
    "attention_map": lambda q, k, v, **more: attnx.attention_map(q, k, **more),
    "attention_lse": attnx.attention_lse,
    "vecmat": lambda q, k, v, **more: attnx.vecmat(torch.ones(q.shape[0], q.shape[2]), q, k, **more),
    "gradient_map": lambda q, k, v, **more: attnx.gradient_map(torch.ones_like(q), q, k, v, **more),
    "attention_stats": lambda q, k, v, **more: attnx.attention_stats(q, k, stats=["entropy", "max"], **more),
    "row_importance": lambda q, k, v, **more: attnx.row_importance(torch.ones_like(q), q, k, v, **more),
}
on_every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture
def qkv():
    return tuple(random_inputs(Case(B=B, H=H, M=M, N=N))[:3])


@pytest.fixture
def padding():
    """[B, N]: True for the keys that count."""
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, 3:] = False
    return mask


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def explicit(q, k, mask):
    """The mean map by softmax."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).mean(1)


@on_every_op
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_is_the_bias(op, kind, qkv, padding):
    mask = padding[:, None, None, :]
    mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    ours = op(*qkv, attn_mask=mask, enable_gqa=True)
    same(ours, op(*qkv, bias=mask))
    with pytest.raises(AssertionError):
        same(ours, op(*qkv))


@on_every_op
def test_both_names_are_an_error(op, qkv, padding):
    mask = padding[:, None, None, :]
    with pytest.raises(ValueError, match="bias, attn_mask: expected one of the two"):
        op(*qkv, bias=mask, attn_mask=mask)


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpas_arguments_give_sdpas_output(is_causal, qkv, padding):
    more = dict(scale=0.3, is_causal=is_causal, attn_mask=None if is_causal else padding[:, None, None, :])
    out, amap = attnx.attention(*qkv, **more)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv, **more))
    if not is_causal:
        expected = explicit(qkv[0] * 0.3 * qkv[0].shape[-1] ** 0.5, qkv[1], more["attn_mask"])
        torch.testing.assert_close(amap, expected)


@pytest.mark.parametrize("enable_gqa", [False, True])
def test_grouped_heads_need_no_flag(enable_gqa):
    q, k, v, _ = random_inputs(Case(H=4, Hk=2))
    out, _ = attnx.attention(q, k, v, enable_gqa=enable_gqa)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_the_gradient_of_attn_mask(qkv):
    grads = []
    for call in (lambda m: attnx.attention(*qkv, attn_mask=m)[0], lambda m: F.scaled_dot_product_attention(*qkv, m)):
        mask = torch.linspace(-1, 1, M * N).view(M, N).requires_grad_()
        call(mask).square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads)


@on_every_op
@pytest.mark.parametrize("name", ["bias", "attn_mask"])
def test_a_key_padding_mask_gets_a_hint(op, name, qkv, padding):
    hint = rf"{name}: expected .*; got \[2, 5\]; for a key-padding mask \[B, N\] pass mask\[:, None, None, :\]$"
    with pytest.raises(ValueError, match=hint):
        op(*qkv, **{name: padding})


def test_other_misfits_get_no_hint(qkv):
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape that broadcasts .*; got \[3, 5\]$"):
        attnx.attention(*qkv, attn_mask=torch.ones(3, 5))


@pytest.mark.parametrize("items", [1, 4])
def test_a_mask_that_broadcasts_means_what_it_means_to_sdpa(items):
    q, k, v, _ = random_inputs(Case(B=items, M=4, N=5))
    mask = torch.ones(items, 5, dtype=torch.bool)
    mask[-1, 2:] = False
    out, amap = attnx.attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))
    torch.testing.assert_close(amap, explicit(q, k, mask))


SPELLINGS = [2, -1, -20, np.int64(-2), [-1], (np.int32(3), -1), range(-3, 0), [], torch.tensor([-1, 0, 19, -20])]
SPELLINGS += [torch.tensor([-2, 1]).to(torch.int8), torch.tensor([1]).int(), torch.tensor([3]).to(torch.uint8)]


@on_all
@of_both_lengths
@pytest.mark.parametrize("rows", SPELLINGS, ids=str)
def test_rows_of_every_spelling(rows, N, backend, device):
    q, k, v, _ = random_inputs(Case(B=1, M=20, N=N), device=device)
    rows = rows.to(device) if isinstance(rows, torch.Tensor) else rows
    at = torch.as_tensor(rows, device=device).long().reshape(-1) % 20
    grad = torch.ones_like(q)
    for call in (
        lambda **more: attnx.attention(q, k, v, is_causal=True, backend=backend, **more)[1],
        lambda **more: attnx.attention_map(q, k, is_causal=True, backend=backend, **more),
        lambda **more: attnx.gradient_map(grad, q, k, v, is_causal=True, backend=backend, **more),
    ):
        torch.testing.assert_close(call(rows=rows), call()[:, at])


@pytest.mark.parametrize(
    "rows", [4, -5, [0, -5], True, [True], 1.0, np.float32(1), "1", np.int64(4), torch.tensor([-5]), torch.tensor([4])]
)
def test_rows_out_of_range_or_not_integers(rows, qkv):
    q, k, v = qkv
    for call in (
        lambda: attnx.attention(q, k, v, rows=rows),
        lambda: attnx.attention_map(q, k, rows=rows),
        lambda: attnx.gradient_map(torch.ones_like(q), q, k, v, rows=rows),
    ):
        with pytest.raises(
            ValueError, match=r"rows: expected (integers in -4\.\.3|an integer or a sequence of integers); got "
        ):
            call()


def test_rows_as_arrays_and_as_a_tensor_without_dimensions(qkv):
    q, k, _ = qkv
    whole = attnx.attention_map(q, k)
    for rows, at in ((np.array([0, -1]), [0, 3]), (np.array(2), [2]), (torch.tensor(-2), [2]), ([], [])):
        torch.testing.assert_close(attnx.attention_map(q, k, rows=rows), whole[:, at])


def test_dropout_is_none(qkv):
    q, k, v = qkv
    out, _ = attnx.attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"dropout_p: expected 0, since attnx has no dropout; got 0\.1"):
        attnx.attention(q, k, v, dropout_p=0.1)


def test_a_boolean_tensor_is_no_rows(qkv):
    with pytest.raises(ValueError, match=r"rows: expected a 1-D integer tensor on cpu; got torch\.bool"):
        attnx.attention(*qkv, rows=torch.ones(4, dtype=torch.bool))


class Own(nn.Module):
    """A module that calls `attnx.attention` with these arguments."""

    def __init__(self, **more):
        super().__init__()
        self.more, self.qkv = more, nn.Linear(16, 48)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out, self.map = attnx.attention(q, k, v, attn_mask=mask, **self.more)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [None, -1, [0, -2]])
def test_capture_hears_a_module_that_calls_the_op(masked, rows, padding):
    own, x = Own(rows=rows), torch.randn(B, N, 16)
    mask = padding[:, None, None, :] if masked else None
    expected = own(x, mask)
    with torch.no_grad(), attnx.capture(own) as trace:
        torch.testing.assert_close(own(x, mask), expected)
    assert len(trace) == 1
    at = slice(None) if rows is None else torch.tensor(rows).reshape(-1) % N
    torch.testing.assert_close(trace[-1][:, at], own.map)
    if masked:
        assert not trace[-1][1, :, 3:].any()


def test_a_mode_sees_only_the_canonical_name(qkv, padding):
    seen = {}

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is attnx.attention:
                seen.update(kwargs)
            return func(*args, **(kwargs or {}))

    mask = padding[:, None, None, :]
    with Spy():
        attnx.attention(*qkv, attn_mask=mask, enable_gqa=True)
        with pytest.raises(ValueError, match="bias, attn_mask: expected one of the two"):
            attnx.attention(*qkv, attn_mask=mask, bias=mask)
    assert seen["bias"] is mask
    assert not {"attn_mask", "enable_gqa"} & set(seen)


@pytest.mark.parametrize("rows", [None, -1, [0, -2]])
def test_compiles_without_a_break(rows, padding):
    own, x = Own(rows=rows), torch.randn(B, N, 16)
    mask = padding[:, None, None, :]

    def call(x, mask):
        return own(x, mask), own.map

    expected = call(x, mask)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, mask)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("op", [attnx.attention, attnx.attention_lse])
def test_second_derivatives_raise(op, qkv):
    q, k, v = (t.requires_grad_() for t in qkv)
    (grad,) = torch.autograd.grad(op(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()
