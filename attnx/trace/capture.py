"""Capture of the maps of a model's own forward pass: inside a `with` (`capture`), or until removed (`patch`)."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from attnx.trace.interceptor import Interceptor
from attnx.trace.layers import Layers, check_model
from attnx.trace.layout import TokenLayout
from attnx.trace.recorder import Recorder
from attnx.trace.trace import Trace


class Handle:
    """Handle of a patched model, as returned by `patch`: `trace` holds its maps, `remove()` restores the model."""

    def __init__(self, interceptor: Interceptor) -> None:
        self._interceptor = interceptor

    @property
    def trace(self) -> Trace:
        """The maps of the last call.

        Raises:
            RuntimeError: the model was not called, or requested layers were not intercepted.
        """
        self._interceptor.check()
        return self._interceptor.trace

    def remove(self) -> None:
        """Remove the patch; further calls do nothing."""
        self._interceptor.uninstall()


@contextmanager
def capture(
    model: nn.Module,
    layers: Layers = None,
    heads: str = "mean",
    rows: int | Sequence[int] | None = None,
    *,
    keep: str = "map",
    grad: bool | str = False,
    calls: str = "last",
    stats: Sequence[str] = (),
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Iterator[Trace]:
    """A context manager that captures the attention maps of the model's own forward pass.

    The output of the model does not change. Inside the `with`, compiled models run uncompiled and
    `nn.TransformerEncoder` runs without its fast path. If gradients are enabled, the output comes from the model's own
    attention, so a backward pass inside or after the `with` is the model's own. With `grad`, gradient checkpointing is
    switched off inside the `with`.

    Args:
        model: any torch model whose attention calls `F.scaled_dot_product_attention`, `nn.MultiheadAttention` or
            `attnx.attention`, or multiplies its values by a softmax over the keys. timm and Hugging Face models that
            were built without SDPA are switched to it inside the `with`. A `nn.MultiheadAttention` called with
            need_weights=True (the default) computes its attention twice.
        layers: the layers to capture: module names ("blocks.11.attn", or "blocks.11" for the attention inside), globs
            ("blocks.*"), or depth indices among the self-attention blocks (-1 is the last). None: every layer that can
            be intercepted.
        heads: "mean", "max" or "min" over the heads, or "each".
        rows: indices of the queries to capture ([0] is the class token, [-1] the last query), or one index; None: all.
        keep: "map" stores the maps. "qk" stores q, k and the log-sum-exp of the rows instead, so memory is linear in
            the number of tokens; `rollout` works from these, and a map is computed each time it is read. q and k are
            copied if they are views of a larger tensor, such as a packed qkv; a bias is not copied. "auto" stores q and
            k of a layer if its maps take more than 64 MB and more memory than q and k; it stores maps otherwise, for
            chosen rows, and for heads other than "mean". "stats" stores no maps, only the statistics of `stats`.
        grad: True: the maps are weighted by their own gradients, see `attnx.gradient_map`. They are computed in each
            backward pass, `trace.backward(score)` or `score.backward()`. Nothing below the first captured layer needs a
            gradient unless the model's parameters do. "signed": without the clamp.
        calls: the passes to store. "last": a new pass replaces the maps of the last one. "all": `trace.calls` holds a
            Trace of each pass in order, as for `generate()`; the trace itself holds the last pass. "mean": the trace
            holds the mean of each layer over the passes in which it attended. A part of the model that is called by
            itself, such as an encoder in `generate()`, is a separate pass.
        stats: statistics of every row of each head, beside the maps: names of `attnx.attention_stats`. `trace.stats`
            holds them. Layers over other tokens than patches have no distances, and layers whose prefix tokens are
            unknown no mass; reading those raises KeyError with the reason. "importance", with `grad`, is that of
            `attnx.row_importance`; each backward pass computes it.
        layout: the tokens of the maps, if they cannot be inferred from the model.
        backend: as in `attnx.attention`.

    Yields:
        the `Trace` that receives the maps: float32 [B, M, N] per layer, or [B, R, N] for R rows, or [B, H, M, N] for
        heads="each". For a layer with nW windows B is the number of images times nW, see `Trace.windows`.

    Raises:
        ValueError: a pattern or index that matches nothing, active dropout, an unknown `keep`, `heads` or `calls`; grad
            with gradients disabled; calls="mean" with maps of different shapes.
        NotImplementedError: a requested layer whose q has not 4 dimensions, and whose heads attnx can't tell; keep="qk"
            of a layer that computes its softmax itself.
        RuntimeError: on exit, if a requested layer was not intercepted (with the reason, or the earlier pass in which
            it was), if no layer was intercepted, or if several threads ran the same layer at once.

    Warns:
        UserWarning: on exit, with layers=None, if attention blocks were not intercepted; gives the reasons. Once for
            each model: it computes its softmax itself, so it holds the weights of all heads.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model, layers=[-1], rows=[0]) as trace:
        ...     logits = model(torch.zeros(2, 3, 96, 96))
        >>> trace["blocks.3.attn"].shape
        torch.Size([2, 1, 145])
    """
    recorder = Recorder(model, heads, rows, keep, layout, backend, grad=grad, calls=calls, stats=stats)
    interceptor = Interceptor(model, layers, recorder, binds=True)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.callback(interceptor.uninstall)
        interceptor.install()
        yield interceptor.trace
        interceptor.check()


def uncompiled() -> AbstractContextManager[Any]:
    """A context manager in which compiled models run uncompiled; may be nested and used from several threads."""
    return _uncompiled() if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _uncompiled() -> Iterator[None]:
    # The stance is global to the process: the first user sets it and the last one restores it.
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
    rows: int | Sequence[int] | None = None,
    *,
    keep: str = "map",
    grad: bool | str = False,
    calls: str = "last",
    stats: Sequence[str] = (),
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Handle:
    """Capture the maps of every call of a model until `handle.remove()`.

    With calls="all" the maps of every pass stay in memory. If a patched model is compiled afterwards, its graph breaks
    around every hook.

    Args:
        model, layers, heads, rows, keep, grad, calls, stats, layout, backend: as in `capture`.

    Returns:
        a `Handle`: `handle.trace` holds the maps of the last call.

    Raises:
        ValueError: the model is compiled (use `capture`, or patch the original model); and as in `capture`. Errors that
            `capture` raises on exit are raised when `handle.trace` is read.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> handle = attnx.patch(model)
        >>> with torch.no_grad():
        ...     logits = model(torch.zeros(1, 3, 96, 96))
        >>> handle.trace[-1].shape
        torch.Size([1, 145, 145])
        >>> handle.remove()
    """
    check_model(model)
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ValueError("patch: expected a model that is not compiled; use attnx.capture, or patch model._orig_mod")
    interceptor = Interceptor(
        model, layers, Recorder(model, heads, rows, keep, layout, backend, grad=grad, calls=calls, stats=stats)
    )
    interceptor.install()
    return Handle(interceptor)
