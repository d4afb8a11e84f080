"""Listens to a model's attention while it runs, and answers it with attention that keeps the map.

Two hooks a module tell the name of the layer at work; while one is, a `TorchFunctionMode` hears the calls of
`F.scaled_dot_product_attention`. Nothing of the model is replaced, and nothing is left when the capture ends.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnx.adapters import open_ears
from attnx.kept import attend, check_keep
from attnx.layers import Layers, attention_layers, clean_name, matches, resolve
from attnx.layout import TokenLayout, grid_of, patch_convolutions
from attnx.reducers import Heads
from attnx.trace import Trace


class Listener(TorchFunctionMode):
    """Hooks and mode of one capture: knows which module is at work, hears its SDPA calls, keeps what was asked for."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        heads: str,
        rows: Sequence[int] | None,
        keep: str,
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
        self.keep = check_keep(keep)
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
        call: dict[str, Any] = dict(bias=attn_mask, is_causal=is_causal, scale=scale, backend=self.backend)
        # Another capture that listens to this call too must hear it: then its output is SDPA's.
        alone = all(other is self for other in _ACTIVE.listeners)
        try:
            rows = self._rows_of(q)
            out, kept = attend(q, k, v, self.keep, heads=self.trace.heads, rows=rows, output=alone, **call)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        if out is None:
            out = sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        self.trace.add(self._key(layer), kept)
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
        self.listeners: list[Listener] = []


_ACTIVE = _Active()
_LIVE: "weakref.WeakSet[Listener]" = weakref.WeakSet()  # installed, in any thread
