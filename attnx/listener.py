"""Listens to a model's attention while it runs, and has it answered by attention that keeps the map.

Two hooks a module tell the name of the layer at work; while one is, a `TorchFunctionMode` hears the calls of
`F.scaled_dot_product_attention`, of `F.multi_head_attention_forward`, and of `attnx.attention`. Nothing of the model is
replaced, and nothing is left when the capture ends. A copy of the model that is made meanwhile is not listened to.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from attnx.adapters import left_alone, open_ears
from attnx.adapters.checkpointing import recomputes, switch_off
from attnx.adapters.mha import MHA, multi_head_attention
from attnx.adapters.rebind import SDPA
from attnx.adapters.switches import DOES_NOTHING
from attnx.layers import Layers, attention_layers, clean_name, matches, names_in_graph, resolve
from attnx.layout import grid_of, patch_convolutions
from attnx.ops import attention
from attnx.recorder import Call, Recorder
from attnx.sides import facts_of


class Listener(TorchFunctionMode):
    """Hooks and mode of one capture: knows which module is at work, hears its attention, keeps what was asked for."""

    def __init__(self, model: nn.Module, layers: Layers, recorder: Recorder, thread: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self.thread = thread  # the only one that is listened to; None: all
        self.recorder = recorder
        self.trace = recorder.trace
        self.wanted = resolve(model, layers)
        self.heard: dict[str, object] = {}  # in the last call: by which thread
        self.before: dict[str, int] = {}  # layers that were heard, and in which call they were last
        self.calls = 0  # that have begun
        self.skipped: dict[str, str] = {}  # layers that no map can be made of, and why
        self.undo: list[Callable[[], None]] = []
        self.ears: list[Callable[[], None]] = []
        self.local = _Local()
        self.running: dict[object, threading.Thread] = {}  # threads that are inside the model
        self.entered: set[str] = set()  # modules that were called from outside of the model, in this call
        self.torn: str | None = None  # a layer that several threads ran in one call
        self.graphs: dict[nn.Module, tuple[str, ...]] = {}  # names of the layers that graphs were traced from
        self.finished = True

    def install(self) -> None:
        """Two hooks a module: the first thing of a call, and, whatever happens, the last; nested captures nest."""
        self.ears += open_ears(self.model)
        if self.recorder.grad:
            self.undo += switch_off(self.model)
        _LIVE.add(self)
        leave = _Leave(self)
        for name, module in self.model.named_modules(remove_duplicate=True):
            enter = _Enter(self, clean_name(name))
            self.undo += [
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove,
                module.register_forward_hook(leave, always_call=True).remove,
            ]
        names = {id(module): clean_name(name) for name, module in self.model.named_modules()}
        for module in patch_convolutions(self.model):
            self.undo.append(module.register_forward_hook(_NoteGrid(self, names[id(module)])).remove)

    def uninstall(self) -> None:
        """Undoes everything; another patch of the same blocks keeps them open."""
        if self.local.frames:
            # A KeyboardInterrupt, after which torch calls no hooks.
            self.local.frames.clear()
            self._unhear()
        while self.undo:
            self.undo.pop()()
        while self.ears:
            self.ears.pop()()
        _LIVE.discard(self)
        reopen_ears()

    def check(self) -> None:
        """Raises RuntimeError unless everything that was asked for was heard."""
        if not self.calls:
            raise RuntimeError("nothing was captured: the model was not called")
        if self.torn is not None:
            raise RuntimeError(
                f"{self.torn} attended in several threads at once, and nobody knows the order of their maps: capture "
                "one copy of the model in one thread (of nn.DataParallel its .module; or use DistributedDataParallel)"
            )
        if not self.finished:
            raise RuntimeError("the model's last call did not finish: its maps are not complete")
        self.trace.fold()
        there = self.heard if self.recorder.calls == "last" else self.before
        silent = [str(w) for w in self.wanted or [] if not any(matches(w, name) for name in there)]
        if silent:
            told = "; ".join(f"{w}: {self._why_silent(w)}" for w in silent)
            raise RuntimeError(f"not heard: {told}; heard: {', '.join(sorted(there)) or f'nothing; {_WAY_OUT}'}")
        unheard = [name for name in attention_layers(self.model) if name not in there]
        if self.wanted is None and self.before and unheard:
            told = "; ".join(f"{w}: {self._why_silent(w)}" for w in unheard)
            plain = all(self._why_silent(w) == _NEVER for w in unheard)
            warnings.warn(
                f"attnx: attention layers that were not heard: {', '.join(unheard) if plain else told}", stacklevel=3
            )
        if not self.before:
            raise RuntimeError(f"nothing was captured: {type(self.model).__name__} ran, but {self._why_nothing()}")

    def _why_nothing(self) -> str:
        """Why no attention of the model was heard at all."""
        if self.skipped:
            name, why = next(iter(self.skipped.items()))
            others = f" and {len(self.skipped) - 1} other layers" if len(self.skipped) > 1 else ""
            return f"no map can be made of {name}{others}: {why}"
        layers = attention_layers(self.model)
        reasons = dict.fromkeys(self._why_silent(name) for name in layers)
        told = "; ".join(reason for reason in reasons if reason != _NEVER)
        return (
            f"never called F.scaled_dot_product_attention; its attention modules: {', '.join(layers) or 'none'}; "
            + (f"{told}; {_WAY_OUT}" if told else _WAY_OUT)
        )

    def _why_silent(self, pattern: str) -> str:
        """Why no map of a layer is in the trace."""
        earlier = [call for name, call in self.before.items() if matches(pattern, name)]
        if earlier:
            return (
                f"it attended in call {max(earlier) + 1} of {self.calls}, and not in the last; "
                "calls='all' keeps every call's maps"
            )
        for name, why in self.skipped.items():
            if matches(pattern, name):
                return why
        return left_alone(self.model, pattern) or _NEVER

    def _begin(self, name: str) -> None:
        """A module is called from outside of the model: as a new call, or as a part of one (`forward_features`)."""
        if self.calls and name not in self.entered and not {"", name} & self.entered and name:
            self.entered.add(name)
            return
        self.entered = {name}
        self.recorder.begin_call()
        self.heard.clear()
        self.calls += 1
        self.finished = name != ""

    def _unhear(self) -> None:
        self.__exit__(None, None, None)
        _ACTIVE.listeners.remove(self)
        self.running.pop(self.local.token, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func is not SDPA and func is not MHA and func is not attention) or not self.local.frames:
            return func(*args, **kwargs)
        if recomputes():
            return func(*args, **kwargs)
        frame = self.local.frames[-1]
        name = self._name(frame)
        if self.torn is not None or (self.wanted is not None and not any(matches(w, name) for w in self.wanted)):
            self._hear(name)
            return func(*args, **kwargs)
        if func is MHA:
            return multi_head_attention(lambda *a, **k: self._answer(SDPA, frame, name, a, k), *args, **kwargs)
        return self._answer(func, frame, name, args, kwargs)

    def _answer(self, func: Callable[..., Any], frame: "_Frame", name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a wanted layer asked attention for; the recorder keeps what is wanted of it."""
        # Another capture that listens to this call too must hear it: then its output is SDPA's.
        alone = all(other is self for other in _ACTIVE.listeners)
        call = Call.of(func, frame.module, args, kwargs)
        if call.q.dim() != 4:
            why = f"expected q of [B, H, M, D]; got {list(call.q.shape)}"
            if self.wanted is not None:
                raise NotImplementedError(f"{name}: {why}; leave the layer out")
            self.skipped[name] = why
            return func(*args, **kwargs)
        self._hear(name)
        whole = self.local.frames[0].name == ""
        key = self.recorder.key(name) if whole else name
        out = self.recorder.answer(key, call, alone, facts_of(frame.module, frame.args, frame.kwargs))
        return (out, call.found[1]) if func is attention else out

    def _hear(self, name: str) -> None:
        if self.heard.setdefault(name, self.local.token) is not self.local.token:
            self.torn = name
        self.before[name] = self.calls - 1

    def _name(self, frame: "_Frame") -> str:
        """The layer's: the module's at work; of a traced graph, that of the module which the code was traced from."""
        if not isinstance(frame.module, fx.GraphModule):
            return frame.name
        if frame.module not in self.graphs:
            self.graphs[frame.module] = names_in_graph(frame.module)
        names = self.graphs[frame.module]
        frame.attended += 1
        traced = names[frame.attended - 1] if frame.attended <= len(names) else ""
        return ".".join(part for part in (frame.name, traced) if part)


_NEVER = "no call of F.scaled_dot_product_attention there"
_WAY_OUT = (
    "blocks that write their softmax out can't be captured: use the model's own maps (output_attentions=True), or a "
    "version of it that calls F.scaled_dot_product_attention"
)


class _Frame:
    """A module at work."""

    __slots__ = ("args", "attended", "kwargs", "module", "name")

    def __init__(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.name, self.module, self.args, self.kwargs, self.attended = name, module, args, kwargs, 0


class _Hook:
    """A hook of a listener's. What a copy of its module has in its place does nothing."""

    __slots__ = ("listener", "name")

    def __init__(self, listener: Listener, name: str = "") -> None:
        self.listener = listener
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return DOES_NOTHING


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        listener = self.listener
        if listener.thread not in (None, get_ident()):
            return
        if torch.compiler.is_compiling():
            # Dynamo answers an exception with a graph break: the hooks then run uncompiled, with real tensors.
            raise RuntimeError("attnx: a patched model can't be compiled with fullgraph=True")
        if module is listener.model and listener.ears and kwargs.get("output_attentions"):
            raise ValueError("output_attentions: expected False inside a capture; the trace has the maps")
        local = listener.local
        if not local.frames:
            others = [thread for thread in listener.running.values() if thread.is_alive()]
            if not others and not recomputes():
                listener.running.clear()
                listener._begin(self.name)
            elif module is listener.model and not recomputes():
                listener.torn = type(module).__name__
            listener.running[local.token] = threading.current_thread()
            _ACTIVE.listeners.append(listener)
            listener.__enter__()
        local.frames.append(_Frame(self.name, module, args, kwargs))


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        listener = self.listener
        local = listener.local
        if not local.frames:
            return  # _Enter refused the call
        local.frames.pop()
        if module is listener.model:
            listener.finished = output is not None
        if not local.frames:
            listener._unhear()
            if module is listener.model:
                listener.trace.fold()


class _NoteGrid(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        grid = grid_of(output)
        if grid is not None and self.listener.thread in (None, get_ident()):
            self.listener.trace.add_grid(self.name, grid)


def reopen_ears() -> None:
    """For captures that go on when another one of the same blocks has ended."""
    for listener in list(_LIVE):
        listener.ears += open_ears(listener.model)


def heard(modules: Iterable[nn.Module]) -> bool:
    """Whether a capture that is installed, in any thread, listens to one of the modules."""
    wanted = {id(module) for module in modules}
    return any(id(other) in wanted for listener in list(_LIVE) for other in listener.model.modules())


class _Local(threading.local):
    """Modules at work, outermost first, in this thread; and what tells the thread from others."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.token = object()


class _Active(threading.local):
    """Listeners whose mode is on, in this thread."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []


_ACTIVE = _Active()
_LIVE: "weakref.WeakSet[Listener]" = weakref.WeakSet()  # installed, in any thread
