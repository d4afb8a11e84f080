"""The maps of a model's own forward pass: for the length of a `with` (`capture`), or until removed (`patch`)."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from attnx.trace.interceptor import Interceptor
from attnx.trace.layers import Layers
from attnx.trace.layout import TokenLayout
from attnx.trace.recorder import Recorder
from attnx.trace.trace import Trace


class Handle:
    """A patched model: `trace` has the maps of its last call, `remove()` leaves the model as it was."""

    def __init__(self, interceptor: Interceptor) -> None:
        self._listener = interceptor

    @property
    def trace(self) -> Trace:
        """Raises RuntimeError when the model was not called, or layers that were asked for were not heard."""
        self._listener.check()
        return self._listener.trace

    def remove(self) -> None:
        """Undoes the patch; a second call does nothing."""
        self._listener.uninstall()


@contextmanager
def capture(
    model: nn.Module,
    layers: Layers = None,
    heads: str = "mean",
    rows: Sequence[int] | None = None,
    *,
    keep: str = "map",
    grad: bool | str = False,
    calls: str = "last",
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Iterator[Trace]:
    """The attention maps of the model's own forward pass, for the length of a `with`.

    The model gives its own output; inside the `with` compiled models run uncompiled, and `nn.TransformerEncoder` runs
    without its fast path. Where gradients are on, the output is that of the model's own attention, so a backward pass,
    inside the `with` or after it, is the model's own. With `grad`, gradient checkpointing is off inside the `with`.

    Args:
        model: any torch model whose attention ends in `F.scaled_dot_product_attention`, `nn.MultiheadAttention` or
            `attnx.attention`; timm and Hugging Face models that were built without are switched to it inside the
            `with`. A `nn.MultiheadAttention` that is asked for its weights (as it is by default) attends twice.
        layers: which layers: module names ("blocks.11.attn", or "blocks.11" for the attention inside), globs
            ("blocks.*"), depth indices among the self-attention blocks (-1 is the last). None: every one heard.
        heads: "mean", "max", "min" over the heads, or "each".
        rows: indices of the queries whose map is wanted ([0] is the class token's); None: all.
        keep: "map" keeps the layers' maps. "qk" keeps q, k and the log-sum-exp of the rows instead, memory linear in
            the tokens: `rollout` needs no more, and a map is made when it is read. q and k are copied where they are
            views of a larger tensor (a packed qkv, which v would keep alive); a bias is kept as it is. "auto": q and
            k of a layer whose maps take more than 64 MB and more than they; maps otherwise, for chosen rows, and for
            heads other than "mean".
        grad: True: the maps are weighted by their own gradients, see `attnx.gradient_map`. They come with the backward
            pass, `trace.backward(score)` or `score.backward()`, and anew with every one; below the first layer that is
            captured nothing needs a gradient, if the model's parameters don't. "signed": without the clamp.
        calls: which of the model's passes inside the `with` are kept. "last": a new pass replaces the last one's maps.
            "all": `trace.calls` has a Trace of each, in order, as around `generate()`; the trace itself is the last
            one's. "mean": the trace has each layer's mean over the passes in which it attended. A part of the model
            that is called by itself, such as an encoder in `generate()`, is a pass of its own.
        layout: the tokens of the maps, where the model can't tell.
        backend: as in `attnx.attention`.

    Raises:
        ValueError: a pattern or index that matches nothing, dropout that is active, an unknown `keep`, `heads` or
            `calls`; grad where gradients are off; calls="mean" of maps whose shapes differ.
        NotImplementedError: a layer that was asked for attends in a shape that is not [B, H, M, D].
        RuntimeError: at the end, if a layer that was asked for was not heard (says why, or in which earlier pass it
            was), if nothing was, or if several threads ran the same layer at once.

    Warns:
        UserWarning: at the end, of attention blocks that were not heard while layers=None asked for every one that is;
            says why.
    """
    interceptor = Interceptor(
        model, layers, Recorder(model, heads, rows, keep, layout, backend, grad=grad, calls=calls)
    )
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.callback(interceptor.uninstall)
        interceptor.install()
        yield interceptor.trace
        interceptor.check()


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled models run uncompiled inside the `with`, in whatever threads and order such `with`s end."""
    return _uncompiled() if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _uncompiled() -> Iterator[None]:
    # The stance is one of the process: the first sets it, and the last sets it back.
    with _STANCE.lock:
        if not _STANCE.users:
            _STANCE.before = torch.compiler.set_stance("force_eager")
        _STANCE.users += 1
    try:
        yield
    finally:
        with _STANCE.lock:
            _STANCE.users -= 1
            if not _STANCE.users:
                _STANCE.before.__exit__(None, None, None)


class _Stance:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before: Any = None


_STANCE = _Stance()


def patch(
    model: nn.Module,
    layers: Layers = None,
    heads: str = "mean",
    rows: Sequence[int] | None = None,
    *,
    keep: str = "map",
    grad: bool | str = False,
    calls: str = "last",
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Handle:
    """`capture` for as long as you like: the maps of the last call are in `handle.trace`, until `handle.remove()`.

    Arguments and errors as in `capture`; with calls="all" the maps of every pass stay in memory. A patched model that
    is compiled breaks its graph around every hook.

    Raises:
        ValueError: the model is compiled; use `capture`, or patch the original.
    """
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ValueError("patch: expected a model that is not compiled; use attnx.capture, or patch model._orig_mod")
    interceptor = Interceptor(
        model, layers, Recorder(model, heads, rows, keep, layout, backend, grad=grad, calls=calls)
    )
    interceptor.install()
    return Handle(interceptor)
