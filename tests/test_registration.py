"""A call uses torch's dispatcher whenever the difference could be observed."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnx
from attnx.ops import known_calls, operators
from attnx.testing import Case, assert_attention, random_inputs


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def direct(monkeypatch):
    """Names of the operators whose functions were called without the dispatcher."""
    called = []
    for name in ("attention", "attention_map"):
        operator = getattr(operators, name)
        spied = partial(lambda name, direct, *args: (called.append(name), direct(*args))[1], name, operator.direct)
        monkeypatch.setattr(operator, "direct", spied)
    return called


def test_nobody_watches(direct):
    q, k, v, _ = random_inputs(Case())
    for mode in (torch.no_grad(), torch.inference_mode()):
        known_calls._KNOWN.clear()
        with mode:
            out, amap = attnx.attention(q, k, v)
        assert direct.pop() == "attention"
        assert not direct
        assert_attention(out, amap, q, k, v)


def test_a_known_call_is_prepared(direct, monkeypatch):
    """The second call of the same shapes, strides and dtypes is not checked, nor does it choose a backend."""
    first, second = random_inputs(Case(bias="B1MN")), random_inputs(Case(bias="B1MN"), seed=1)
    with torch.no_grad():
        attnx.attention(*first[:3], bias=first.bias, backend="native")
        assert direct == ["attention"]
        (call,) = known_calls._KNOWN.values()
        assert call.prepared is not None
        out, amap = attnx.attention(*second[:3], bias=second.bias, backend="native")
        assert direct == ["attention"]
        assert_attention(out, amap, *second)
        # Other strides, options and dtypes are other calls.
        turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in second[:3])
        out, amap = attnx.attention(*turned, bias=second.bias, backend="native")
        assert_attention(out, amap, *second)
        out, amap = attnx.attention(*second[:3], bias=second.bias, backend="native", is_causal=True)
        assert_attention(out, amap, *second, is_causal=True)
        assert len(known_calls._KNOWN) == len(direct) == 3
        with pytest.raises(ValueError, match="k: expected"):
            attnx.attention(second.q, second.k[:1], second.v, bias=second.bias, backend="native")
    monkeypatch.setattr(known_calls, "_MOST", 3)
    with torch.no_grad():
        attnx.attention(*(t[:1] for t in second[:3]))
    assert len(known_calls._KNOWN) == 1


@pytest.mark.parametrize("heads", ["mean", "max", "min", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_calls_give_the_same(heads, dtype):
    for mask in ("", "B11N"):
        for seed in range(2):
            inputs = random_inputs(Case(H=4, Hk=2, dtype=dtype, mask=mask, layout="contiguous"), seed=seed)
            with torch.inference_mode():
                out, amap = attnx.attention(*inputs[:3], bias=inputs.bias, heads=heads)
            assert_attention(out, amap, *inputs, heads=heads)


def test_tensors_that_need_a_gradient_are_no_known_calls(direct):
    q, k, v, _ = random_inputs(Case())
    for _ in range(2):
        assert not attnx.attention(q, k, v)[0].requires_grad
    q.requires_grad_()
    out, _ = attnx.attention(q, k, v)
    out.sum().backward()
    assert q.grad is not None
    assert direct == ["attention"]


def test_a_gradient(direct):
    q, k, v, _ = random_inputs(Case())
    out, amap = attnx.attention(q.requires_grad_(), k, v)
    assert out.requires_grad
    assert not amap.requires_grad
    assert not direct


def test_a_mode(direct):
    q, k, _, _ = random_inputs(Case())
    with torch.no_grad(), Watch() as watch:
        attnx.attention_map(q, k)
    assert "attnx.attention_map.default" in watch.seen
    assert not direct


@pytest.mark.filterwarnings("ignore")
def test_a_trace(direct):
    q, k, v, _ = random_inputs(Case())
    with torch.no_grad():
        traced = torch.jit.trace(lambda q, k, v: attnx.attention(q, k, v), (q, k, v), check_trace=False)
    assert "attnx::attention" in str(traced.graph)
    assert not direct


def test_a_subclass(direct):
    class Marked(torch.Tensor):
        pass

    q, k, v, _ = random_inputs(Case())
    with torch.no_grad():
        attnx.attention(q.as_subclass(Marked), k, v)
    assert not direct
