"""A call uses torch's dispatcher whenever the difference could be observed."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnx
from attnx.ops import operators
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
        with mode:
            out, amap = attnx.attention(q, k, v)
        assert direct.pop() == "attention"
        assert not direct
        assert_attention(out, amap, q, k, v)


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
