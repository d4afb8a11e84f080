"""Listens to a model's attention while it runs, and has it answered by attention that keeps the map.

Two hooks a module tell the name of the layer at work; while one is, a `TorchFunctionMode` hears the calls of
`F.scaled_dot_product_attention`. Nothing of the model is replaced, and nothing is left when the capture ends.
"""

import threading
import warnings
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from attnx.adapters import open_ears
from attnx.layers import Layers, attention_layers, clean_name, matches, resolve
from attnx.layout import grid_of, patch_convolutions
from attnx.recorder import Recorder


class Listener(TorchFunctionMode):
    """Hooks and mode of one capture: knows which module is at work, hears its SDPA calls, keeps what was asked for."""

    def __init__(self, model: nn.Module, layers: Layers, recorder: Recorder, thread: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self.thread = thread  # the only one that is listened to; None: all
        self.recorder = recorder
        self.trace = recorder.trace
        self.wanted = resolve(model, layers)
        self.heard: set[str] = set()
        self.undo: list[Callable[[], None]] = []
        self.ears: list[Callable[[], None]] = []
        self.local = _Local()
        self.called = False
        self.finished = True

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
        if self.local.names:
            # A KeyboardInterrupt, after which torch calls no hooks.
            self.local.names.clear()
            self._unhear()
        while self.undo:
            self.undo.pop()()
        while self.ears:
            self.ears.pop()()
        _LIVE.discard(self)
        reopen_ears()

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
            if self.thread not in (None, get_ident()):
                return
            if torch.compiler.is_compiling():
                # Dynamo answers an exception with a graph break: the hooks then run uncompiled, with real tensors.
                raise RuntimeError("attnx: a patched model can't be compiled with fullgraph=True")
            if module is self.model:
                if self.ears and kwargs.get("output_attentions"):
                    raise ValueError("output_attentions: expected False inside a capture; the trace has the maps")
                self.recorder.clear()
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
            self._unhear()

    def _unhear(self) -> None:
        self.__exit__(None, None, None)
        _ACTIVE.listeners.remove(self)

    def _note_grid(self, module: nn.Module, args: Any, output: Any) -> None:
        grid = grid_of(output)
        if grid is not None and self.thread in (None, get_ident()):
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
        # Another capture that listens to this call too must hear it: then its output is SDPA's.
        alone = all(other is self for other in _ACTIVE.listeners)
        whole = self.local.names[0] == ""
        return self.recorder.answer(self.recorder.key(name) if whole else name, func, alone, *args, **kwargs)


def reopen_ears() -> None:
    """For captures that go on when another one of the same blocks has ended."""
    for listener in list(_LIVE):
        listener.ears += open_ears(listener.model)


def heard(module: nn.Module) -> bool:
    """Whether a capture that is installed, in any thread, listens to the module."""
    return any(module is other for listener in list(_LIVE) for other in listener.model.modules())


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
