"""Comparison of a capture with the softmax that a model computes itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_reference import eager_maps
from test_families import assert_same, tensors
from torch import Tensor, nn

import attnx


def assert_restored(model: nn.Module) -> None:
    assert not any("forward" in vars(module) for module in model.modules())


def assert_captured(model: nn.Module, call: Callable[[], Any], *classes: str) -> None:
    """The output and the maps of a capture are the model's own, one for each call; nothing is left."""
    with torch.no_grad():
        want, plain = eager_maps(model, call)
        with attnx.capture(model, calls="all") as trace:
            assert_same(call(), plain, 1e-5)
        assert_restored(model)
        assert_same(call(), plain, 0)
    assert {type(model.get_submodule(name)).__name__ for name in want} == set(classes)
    assert len(trace.calls) == 1
    # A layer that attends twice in a pass, as LXMERT's cross-attention does, has a second map: "name#2".
    calls = {f"{name}#{i}" if i > 1 else name: p for name, maps in want.items() for i, p in enumerate(maps, 1)}
    assert sorted(trace) == sorted(calls)
    for name, p in calls.items():
        torch.testing.assert_close(trace[name], p, rtol=0, atol=1e-5)
        assert float((p - 1 / p.shape[-1]).abs().max()) > 0.01  # far from uniform


def assert_same_gradients(model: nn.Module, call: Callable[[], Any]) -> None:
    """Gradients of the parameters inside a capture are those without one."""

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        parts = [t for t in tensors(call()) if t.requires_grad and bool(t.isfinite().all())]
        weights = [torch.linspace(-1, 1, t.numel()).view_as(t) for t in parts]
        torch.stack([(t * w).sum() for t, w in zip(parts, weights, strict=True)]).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model.requires_grad_(True)
    plain = gradients()
    with attnx.capture(model):
        ours = gradients()
    assert set(ours) == set(plain)
    largest = max(float(g.abs().max()) for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def assert_own_code_with_dropout(model: nn.Module, call: Callable[[], Any]) -> None:
    """With active dropout the class's own code runs in a capture; the maps are the weights before dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    torch.manual_seed(3)
    plain = call()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="holds the weights of all heads"), attnx.capture(model) as trace:
        assert_same(call(), plain, 0)
    for amap in trace.values():
        torch.testing.assert_close(amap.sum(-1), torch.ones(amap.shape[:2]))
    assert_restored(model)
