"""Capped scores and attention sinks against float64; transforms of `torch.func`; overrides of `attnx.attention`."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import attnx
from attnx.testing import (
    Case,
    assert_attention,
    assert_attention_lse,
    assert_gradient_map,
    assert_vecmat,
    random_gradient,
    random_inputs,
)
from attnx.testing.oracle import oracle

CASES = (
    Case(),
    Case(bias="1HMN", heads="max", N=30),
    Case(mask="B1MN", heads="each", H=4, Hk=2),
    Case(is_causal=True, rows=(19, 0, 3), heads="min"),
    Case(bias="B1MN", is_causal=True, rows=(1, 5)),
    Case(dtype=torch.bfloat16, H=4, Hk=2),
    Case(dtype=torch.float16, mask="B11N"),
    Case(dtype=torch.float64, bias="B11N", is_causal=True),
)


def sinks_of(case, device="cpu", dtype=None):
    return torch.linspace(-1.0, 2.0, case.H, device=device).to(dtype or case.dtype)


def check(case, backend, extra, device):
    q, k, v, bias = random_inputs(case, device=device)
    short = dict(bias=bias, is_causal=case.is_causal, scale=case.scale, **extra)
    call = dict(case.options, bias=bias, **extra)
    out, amap = attnx.attention(q, k, v, **call, backend=backend)
    assert_attention(out, amap, q, k, v, **call)
    assert_attention(None, attnx.attention_map(q, k, **call, backend=backend), q, k, v, **call)
    out, lse = attnx.attention_lse(q, k, v, **short, backend=backend)
    assert_attention_lse(out, lse, q, k, v, **short)
    grad, r = random_gradient(case, device=device), torch.rand(case.B, case.M, device=device)
    for given in (None, lse):
        amap = attnx.attention_map(q, k, **call, lse=given, backend=backend)
        assert_attention(None, amap, q, k, v, **call)
        assert_vecmat(attnx.vecmat(r, q, k, **short, lse=given, backend=backend), r, q, k, **short)
        if backend != "triton":
            ours = attnx.gradient_map(grad, q, k, v, **call, lse=given, backend=backend)
            assert_gradient_map(ours, grad, q, k, v, **call)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_softcap(case, backend, sinks, device):
    check(case, backend, dict(softcap=1.5, sinks=sinks_of(case, device) if sinks else None), device)


@pytest.mark.parametrize(
    "backend", ["eager", "auto", "native", pytest.param("triton", marks=pytest.mark.triton_kernels)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sinks(case, backend, device):
    if backend in ("native", "triton") and case.dtype in (torch.float64, torch.float16):
        pytest.skip("the backend does not take this dtype, or eager has shown it")
    check(case, backend, dict(sinks=sinks_of(case, device)), device)


def test_a_row_without_keys_is_zero_beside_any_sink():
    q, k, v, _ = random_inputs(Case())
    for sink in (-torch.inf, 0.5):
        sinks = torch.full((3,), sink, requires_grad=True)
        out, amap = attnx.attention(q, k, v, bias=torch.tensor(False), sinks=sinks)
        assert not out.any()
        assert not amap.any()
        (grad,) = torch.autograd.grad(out.sum(), sinks)
        assert not grad.any()
        assert (attnx.attention_lse(q, k, v, bias=torch.tensor(False), sinks=sinks)[1] == sink).all()


@pytest.mark.parametrize(("softcap", "sinks"), [(1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 2, 3, 7)], ids=str)
@pytest.mark.parametrize("op", [attnx.attention, attnx.attention_lse])
def test_gradients_are_autograds(case, softcap, sinks, op):
    q, k, v, bias = random_inputs(case)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    if case.bias:
        bias = bias.double().requires_grad_()
        leaves.append(bias)
    if sinks:
        leaves.append(sinks_of(case, dtype=torch.float64).requires_grad_())
    call = dict(bias=bias, is_causal=case.is_causal, softcap=softcap, sinks=leaves[-1] if sinks else None)
    ours, exact = op(*leaves[:3], **call)[0], oracle(*leaves[:3], **call)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, leaves, weight)
    for t, want in zip(torch.autograd.grad(ours, leaves, weight), wanted, strict=True):
        torch.testing.assert_close(t, want, rtol=1e-10, atol=1e-12)


def test_as_transformers_computes_it():
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    gpt = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v, _ = random_inputs(Case(H=4, Hk=2))
    sinks = torch.randn(4)
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    mask = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)[None, None]
    theirs = gemma.eager_attention_forward(module, q, k, v, mask, scaling=0.3, softcap=2.0)
    ours = attnx.attention(q, k, v, is_causal=True, scale=0.3, softcap=2.0, heads="each")
    torch.testing.assert_close((ours[0].transpose(1, 2), ours[1]), theirs)
    theirs = gpt.eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    ours = attnx.attention(q, k, v, is_causal=True, scale=0.3, sinks=sinks, heads="each")
    torch.testing.assert_close((ours[0].transpose(1, 2), ours[1]), theirs)


def test_errors():
    q = torch.ones(1, 2, 3, 4)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match=r"softcap: expected a finite number above 0, or None; got"):
            attnx.attention(q, q, q, softcap=wrong)
    for wrong in (torch.ones(3), torch.ones(2, 1), torch.ones(2).long(), torch.ones(2, device="meta"), [1.0, 2.0]):
        for call in (
            lambda sinks: attnx.attention(q, q, q, sinks=sinks),
            lambda sinks: attnx.attention_map(q, q, sinks=sinks),
            lambda sinks: attnx.attention_lse(q, q, q, sinks=sinks),
            lambda sinks: attnx.vecmat(torch.ones(1, 3), q, q, sinks=sinks),
            lambda sinks: attnx.gradient_map(q, q, q, q, sinks=sinks),
        ):
            with pytest.raises(ValueError, match=r"sinks: expected a floating-point tensor \[2\] on cpu; got"):
                call(wrong)
    with pytest.raises(NotImplementedError, match=r"backend='native' can't .*softcap"):
        attnx.attention(q, q, q, softcap=2.0, backend="native")
    with pytest.raises(ValueError, match="q: expected a tensor; got list"):
        attnx.attention([1.0], q, q)


@pytest.mark.parametrize("name", ["attention", "attention_lse"])
def test_forward_mode_is_refused(name):
    q, k, v, _ = random_inputs(Case())

    def out(z):
        return getattr(attnx, name)(z, k, v)[0]

    message = "forward-mode derivatives are not supported"
    for transformed in (
        lambda: torch.func.jvp(out, (q,), (q,)),
        lambda: torch.func.jacfwd(out)(q),
        lambda: torch.func.jvp(torch.func.grad(lambda z: out(z).sum()), (q,), (q,)),
    ):
        with pytest.raises(NotImplementedError, match=message):
            transformed()
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=message):
            out(forward_ad.make_dual(q, q))
        assert out(q).isfinite().all()


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0])])
def test_reverse_transforms(sinks):
    q, k, v, _ = random_inputs(Case(B=1))

    def loss(z):
        return attnx.attention(z, k, v, sinks=sinks, backend="eager")[0].sin().sum()

    leaf = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), wanted)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.grad(lambda z: torch.func.grad(loss)(z).sum())(q)
    many = torch.stack([q, 2 * q, -q])
    torch.testing.assert_close(torch.func.vmap(loss)(many), torch.stack([loss(z) for z in many]))
    each = torch.stack([torch.func.grad(loss)(z) for z in many])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many), each)


def test_overrides_see_the_call():
    q, k, v, _ = random_inputs(Case())
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is attnx.attention:
                seen.append((args, sorted(kwargs)))
            return func(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "seen" if func is attnx.attention else super().__torch_function__(func, types, args, kwargs or {})

    with Watch():
        out, _ = attnx.attention(q, k, v, softcap=2.0)
    assert torch.equal(out, attnx.attention(q, k, v, softcap=2.0)[0])
    ((args, names),) = seen
    assert args[0] is q
    assert names == ["backend", "bias", "heads", "is_causal", "rows", "scale", "sinks", "softcap"]
    assert attnx.attention(q, k.as_subclass(Marked), v) == "seen"
