"""Comparison of a capture with the softmax that a model computes itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from test_families import assert_same, tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import attnx

Maps = dict[str, list[Tensor]]


class _Softmaxes(TorchFunctionMode):
    """Stores the results of softmax under the name of the attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.maps: Maps = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # F.softmax calls Tensor.softmax, and the mode is off while it does.
        if getattr(func, "__name__", "") == "softmax":
            self.maps.setdefault(self.name, []).append(result.detach().mean(1))
        return result


@contextmanager
def own_maps(model: nn.Module, *classes: str) -> Iterator[Maps]:
    """{layer: the maps [B, M, N] of its own softmax, one a call} of a model that runs in the with block."""
    recorder = _Softmaxes()

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: setattr(recorder, "name", name)

    layers = {name: module for name, module in model.named_modules() if type(module).__name__ in classes}
    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in layers.items()]
    with recorder:
        yield recorder.maps
    for hook in hooks:
        hook.remove()
    assert set(recorder.maps) == set(layers)


def assert_restored(model: nn.Module) -> None:
    assert not any("forward" in vars(module) for module in model.modules())


def assert_captured(model: nn.Module, call: Callable[[], Any], *classes: str) -> None:
    """The output and the maps of a capture are the model's own, one for each call; nothing is left."""
    with torch.no_grad():
        with own_maps(model, *classes) as want:
            plain = call()
        with attnx.capture(model, calls="all") as trace:
            assert_same(call(), plain, 1e-5)
        assert_restored(model)
        assert_same(call(), plain, 0)
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
