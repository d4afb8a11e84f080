"""Listens to a model's attention while it runs, and answers it with attention that keeps the map.

Two hooks a module tell the name of the layer at work; while one is, a `TorchFunctionMode` hears the calls of
`F.scaled_dot_product_attention`. Nothing of the model is replaced, and nothing is left when the capture ends.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnx.adapters import open_ears
from attnx.layers import Layers, attention_layers, clean_name, matches, resolve
from attnx.layout import TokenLayout, grid_of, patch_convolutions
from attnx.ops import attention, attention_map
from attnx.reducers import Heads
from attnx.trace import Trace


class Handle:
    """A patched model: `trace` has the maps of its last call, `remove()` leaves the model as it was."""

    def __init__(self, listener: "_Listener") -> None:
        self._listener = listener

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
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Iterator[Trace]:
    """The attention maps of the model's own forward pass, for the length of a `with`.

    The model runs as it always did and gives its own output. A compiled model runs uncompiled inside the `with`.

    Args:
        model: any torch model whose attention ends in `F.scaled_dot_product_attention`; timm and Hugging Face models
            that were built without it are switched to it inside the `with`.
        layers: which layers: module names ("blocks.11.attn", or "blocks.11" for the attention inside), globs
            ("blocks.*"), depth indices among the self-attention blocks (-1 is the last). None: every one heard.
        heads: "mean", "max", "min" over the heads, or "each".
        rows: indices of the queries whose map is wanted ([0] is the class token's); None: all.
        layout: the tokens of the maps, where the model can't tell.
        backend: as in `attnx.attention`.

    Raises:
        ValueError: a pattern or index that matches nothing, dropout that is active.
        RuntimeError: at the end, if a layer that was asked for was not heard, or nothing was.

    Warns:
        UserWarning: at the end, of attention blocks that were not heard while layers=None asked for every one that is.
    """
    listener = _Listener(model, layers, heads, rows, layout, backend)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(listener.uninstall)
        listener.install()
        yield listener.trace
        listener.check()


def patch(
    model: nn.Module,
    layers: Layers = None,
    heads: str = "mean",
    rows: Sequence[int] | None = None,
    *,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Handle:
    """`capture` for as long as you like: the maps of the last call are in `handle.trace`, until `handle.remove()`.

    Arguments and errors as in `capture`. A patched model that is compiled breaks its graph around every hook.

    Raises:
        ValueError: the model is compiled; use `capture`, or patch the original.
    """
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ValueError("patch: expected a model that is not compiled; use attnx.capture, or patch model._orig_mod")
    listener = _Listener(model, layers, heads, rows, layout, backend)
    listener.install()
    return Handle(listener)


class _Listener(TorchFunctionMode):
    """Hooks and mode of one capture: knows which module is at work, hears its SDPA calls, keeps their maps."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        heads: str,
        rows: Sequence[int] | None,
        layout: TokenLayout | None,
        backend: str,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        Heads.parse(heads)
        try:
            chosen = None if rows is None else tuple(index(row) for row in rows)
        except TypeError as error:
            raise ValueError(f"rows: expected a sequence of integers; got {rows!r}") from error
        self.model = model
        self.backend = backend
        self.trace = Trace(model, heads, chosen, layout)
        self.wanted = resolve(model, layers)
        self.heard: set[str] = set()
        self.undo: list[Callable[[], None]] = []
        self.ears: list[Callable[[], None]] = []
        self.local = _Local()
        self.called = False
        self.finished = True
        self.rows: Tensor | None = None

    def install(self) -> None:
        """Two hooks a module: the first thing of a call, and, whatever happens, the last; nested captures nest."""
        self.ears += open_ears(self.model)
        _LIVE.add(self)
        for name, module in self.model.named_modules(remove_duplicate=True):
            enter = module.register_forward_pre_hook(self._enter(clean_name(name)), prepend=True, with_kwargs=True)
            leave = module.register_forward_hook(self._leave, always_call=True)
            self.undo += [enter.remove, leave.remove]
        for module in patch_convolutions(self.model):
            self.undo.append(module.register_forward_hook(self._note_grid).remove)

    def uninstall(self) -> None:
        """Undoes everything; another patch of the same blocks keeps them open."""
        while self.undo:
            self.undo.pop()()
        while self.ears:
            self.ears.pop()()
        _LIVE.discard(self)
        for other in list(_LIVE):
            other.ears += open_ears(other.model)

    def check(self) -> None:
        """Raises RuntimeError unless everything that was asked for was heard."""
        if not self.called:
            raise RuntimeError("nothing was captured: the model was not called")
        if not self.finished:
            raise RuntimeError("the model's last call did not finish: its maps are not complete")
        silent = [str(w) for w in self.wanted or [] if not any(matches(w, name) for name in self.heard)]
        if silent:
            raise RuntimeError(
                f"not heard: {', '.join(silent)}: no call of F.scaled_dot_product_attention there; "
                f"heard: {', '.join(sorted(self.heard)) or 'nothing'}"
            )
        missed = [name for name in attention_layers(self.model) if name not in self.heard]
        if self.wanted is None and self.trace and missed:
            warnings.warn(f"attnx: attention layers that were not heard: {', '.join(missed)}", stacklevel=3)
        if not self.trace:
            known = ", ".join(attention_layers(self.model)) or "none"
            raise RuntimeError(
                f"nothing was captured: {type(self.model).__name__} ran, but never called "
                f"F.scaled_dot_product_attention; its attention modules: {known}"
            )

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                # Dynamo answers an exception with a graph break: the hooks then run uncompiled, with real tensors.
                raise RuntimeError("attnx: a patched model can't be compiled with fullgraph=True")
            if module is self.model:
                if self.ears and kwargs.get("output_attentions"):
                    raise ValueError("output_attentions: expected False inside a capture; the trace has the maps")
                self.trace.clear()
                self.heard.clear()
                self.finished = False
            self.called = True
            if not self.local.names:
                _ACTIVE.listeners.append(self)
                self.__enter__()
            self.local.names.append(name)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.local.names:
            return  # _enter refused the call
        self.local.names.pop()
        if module is self.model:
            self.finished = output is not None
        if not self.local.names:
            self.__exit__(None, None, None)
            _ACTIVE.listeners.remove(self)

    def _note_grid(self, module: nn.Module, args: Any, output: Any) -> None:
        grid = grid_of(output)
        if grid is not None:
            self.trace.add_grid(grid)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.local.names:
            return func(*args, **kwargs)
        name = self.local.names[-1]
        self.heard.add(name)
        if self.wanted is not None and not any(matches(w, name) for w in self.wanted):
            return func(*args, **kwargs)
        return self._answer(name, func, *args, **kwargs)

    def _answer(
        self,
        layer: str,
        sdpa: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Does what the layer asked SDPA for, and keeps the map."""
        if dropout_p:
            raise ValueError(f"{layer}: expected dropout_p = 0; got {dropout_p}; call model.eval()")
        if query.dim() != 4:
            raise NotImplementedError(f"{layer}: expected q of [B, H, M, D]; got {list(query.shape)}; leave it out")
        batch = torch.broadcast_shapes(query.shape[:1], key.shape[:1], value.shape[:1])[0]
        q, k, v = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
        options: dict[str, Any] = dict(bias=attn_mask, is_causal=is_causal, scale=scale, heads=self.trace.heads)
        try:
            options["rows"] = self._rows_of(q)
            if any(other is not self for other in _ACTIVE.listeners):
                # Another capture listens to this call too and must hear it: here only the map is made.
                amap = attention_map(q, k, backend=self.backend, **options)
                out = sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            else:
                out, amap = attention(q, k, v, backend=self.backend, **options)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        self.trace.add(self._key(layer), amap)
        return out

    def _rows_of(self, q: Tensor) -> Tensor | None:
        """The chosen rows as a tensor on q's device, copied there once and not in every layer."""
        rows = self.trace.rows
        if rows is None:
            return None
        if not all(isinstance(row, int) and 0 <= row < q.shape[2] for row in rows):
            raise ValueError(f"rows: expected integers in 0..{q.shape[2] - 1}; got {list(rows)}")
        if self.rows is None or self.rows.device != q.device:
            self.rows = torch.tensor(rows, dtype=torch.int64, device=q.device)
        return self.rows

    def _key(self, layer: str) -> str:
        """The layer's name, numbered when it attends again in the same pass of the whole model."""
        inside = len(self.local.names) > 0 and self.local.names[0] == ""
        again = sum(name.partition("#")[0] == layer for name in self.trace) if inside else 0
        return f"{layer}#{again + 1}" if again else layer


class _Local(threading.local):
    """Names of the modules at work, outermost first, in this thread."""

    def __init__(self) -> None:
        self.names: list[str] = []


class _Active(threading.local):
    """Listeners whose mode is on, in this thread."""

    def __init__(self) -> None:
        self.listeners: list[_Listener] = []


_ACTIVE = _Active()
_LIVE: "weakref.WeakSet[_Listener]" = weakref.WeakSet()  # installed, in any thread
