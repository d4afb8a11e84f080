"""Listens to a model's attention while it runs, and has it answered by attention that keeps the map.

Two hooks a module tell the name of the layer at work; while one is, a `TorchFunctionMode` hears the calls of
`F.scaled_dot_product_attention`, of `F.multi_head_attention_forward`, and of `attnx.attention`. Nothing of the model is
replaced, and nothing is left when the capture ends. A copy of the model that is made meanwhile is not listened to.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from attnx.ops.functional import attention
from attnx.trace.adapters import route_to_sdpa, unfused_blocks
from attnx.trace.adapters.checkpointing import recomputes, switch_off
from attnx.trace.adapters.mha import MHA, SDPA, multi_head_attention
from attnx.trace.adapters.switches import DOES_NOTHING
from attnx.trace.layers import Layers, attention_layers, clean_name, matches, names_in_graph, resolve
from attnx.trace.layout import grid_of, patch_convolutions
from attnx.trace.recorder import Call, Recorder
from attnx.trace.sides import facts_of


class Interceptor(TorchFunctionMode):
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
        self.intercepted: dict[str, object] = {}  # in the last call: by which thread
        self.before: dict[str, int] = {}  # layers that were heard, and in which call they were last
        self.calls = 0  # that have begun
        self.skipped: dict[str, str] = {}  # layers that no map can be made of, and why
        self.undo: list[Callable[[], None]] = []
        self.routes: list[Callable[[], None]] = []
        self.local = _Local()
        self.running: dict[object, threading.Thread] = {}  # threads that are inside the model
        self.entered: set[str] = set()  # modules that were called from outside of the model, in this call
        self.inputs: dict[str, dict[str, ref[Tensor]]] = {}  # of the modules in a module, in this call
        self.torn: str | None = None  # a layer that several threads ran in one call
        self.lock = threading.Lock()
        self.graphs: dict[nn.Module, tuple[str, ...]] = {}  # names of the layers that graphs were traced from
        self.finished = True

    def install(self) -> None:
        """Two hooks a module: the first thing of a call, and, whatever happens, the last; nested captures nest."""
        self.routes += route_to_sdpa(self.model)
        if self.recorder.grad:
            self.undo += switch_off(self.model)
        _LIVE.add(self)
        self.undo.append(self.model.register_forward_hook(_Done(self)).remove)
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
            self.leave()
        while self.undo:
            self.undo.pop()()
        while self.routes:
            self.routes.pop()()
        _LIVE.discard(self)
        route_again()

    def check(self) -> None:
        """Raises RuntimeError unless everything that was asked for was heard."""
        if not self.calls:
            raise RuntimeError("nothing was captured: the model was not called")
        if self.torn is not None:
            raise RuntimeError(
                f"{self.torn}: several threads ran it at once, so the order of its maps is unknown; capture one copy "
                "of the model in one thread (of nn.DataParallel its .module), or use DistributedDataParallel"
            )
        if not self.finished:
            raise RuntimeError("the model's last call did not finish: its maps are not complete")
        self.trace.fold()
        there = self.intercepted if self.recorder.calls == "last" else self.before
        silent = [str(w) for w in self.wanted or [] if not any(matches(w, name) for name in there)]
        if silent:
            left = unfused_blocks(self.model)
            told = "; ".join(f"{w}: {self._why_silent(w, left)}" for w in silent)
            raise RuntimeError(f"not heard: {told}; heard: {', '.join(sorted(there)) or f'nothing; {_WAY_OUT}'}")
        if self.wanted is None and self.before:
            names = dict.fromkeys([*attention_layers(self.model), *self.skipped])
            left = unfused_blocks(self.model) if any(name not in there for name in names) else {}
            reasons = {name: self._why_silent(name, left) for name in names if name not in there}
            if reasons:
                plain = set(reasons.values()) == {_NEVER}
                told = ", ".join(reasons) if plain else "; ".join(f"{name}: {why}" for name, why in reasons.items())
                warnings.warn(f"attnx: attention layers that were not heard: {told}", stacklevel=3)
        if not self.before:
            raise RuntimeError(f"nothing was captured: {type(self.model).__name__} ran, but {self._why_nothing()}")

    def _why_nothing(self) -> str:
        """Error text where nothing was captured."""
        if self.skipped:
            name, why = next(iter(self.skipped.items()))
            others = f" and {len(self.skipped) - 1} other layers" if len(self.skipped) > 1 else ""
            return f"no map can be made of {name}{others}: {why}; attnx takes no other dimensions yet"
        if isinstance(self.model, fx.GraphModule) and "scaled_dot_product_attention" in self.model.code:
            return "its graph calls attention by torch.ops.aten, which can't be heard: capture the model it was made of"
        layers, left = attention_layers(self.model), unfused_blocks(self.model)
        reasons = dict.fromkeys(self._why_silent(name, left) for name in layers)
        told = "; ".join(reason for reason in reasons if reason != _NEVER)
        return (
            f"never called F.scaled_dot_product_attention; its attention modules: {', '.join(layers) or 'none'}; "
            + (f"{told}; {_WAY_OUT}" if told else _WAY_OUT)
        )

    def _why_silent(self, pattern: str, left: dict[str, str]) -> str:
        """Reason that a layer has no map in the trace; left: the parts of the model that kept their own attention."""
        earlier = [call for name, call in self.before.items() if matches(pattern, name)]
        if earlier:
            return (
                f"it attended in call {max(earlier) + 1} of {self.calls}, and not in the last; "
                "calls='all' keeps every call's maps"
            )
        for name, why in self.skipped.items():
            if matches(pattern, name):
                return why
        around = [name for name in left if not name or pattern == name or pattern.startswith(name + ".")]
        return left[max(around, key=len)] if around else _NEVER

    def enter(self, name: str, module: nn.Module) -> None:
        """A module is called from outside of the model, in this thread."""
        with self.lock:
            others = any(thread.is_alive() for thread in self.running.values())
            if not others and not recomputes():
                self.running.clear()
                self._begin(name)
            elif module is self.model and not recomputes():
                self.torn = type(module).__name__
            self.running[self.local.token] = threading.current_thread()
        _ACTIVE.interceptors.append(self)
        self.__enter__()

    def leave(self) -> None:
        """The call is over, in this thread."""
        self.__exit__(None, None, None)
        _ACTIVE.interceptors.remove(self)
        with self.lock:
            self.running.pop(self.local.token, None)

    def _begin(self, name: str) -> None:
        """A new call of the model begins, or a part of one is called by itself (`forward_features`)."""
        if self.calls and name and self.entered.isdisjoint(("", name)):
            self.entered.add(name)
            return
        self.entered = {name}
        self.inputs.clear()
        if self.recorder.calls == "last":
            self.torn = None
        self.recorder.begin_call(self.finished)
        self.intercepted.clear()
        self.calls += 1
        self.finished = name != ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func is not SDPA and func is not MHA and func is not attention) or not self.local.frames:
            return func(*args, **kwargs)
        if recomputes():
            return func(*args, **kwargs)
        frame = self.local.frames[-1]
        name = self._name(frame) if func is SDPA else frame.name
        if self.torn is not None or (self.wanted is not None and not any(matches(w, name) for w in self.wanted)):
            self._note_layer(name)
            return func(*args, **kwargs)
        if func is MHA:
            exact = not self.recorder.grad
            sdpa = partial(self._answer_sdpa, frame, name)
            return multi_head_attention(sdpa, exact, *args, **kwargs)
        return self._answer(func, frame, name, args, kwargs)

    def _answer_sdpa(self, frame: "_Frame", name: str, *args: Any, **kwargs: Any) -> Any:
        return self._answer(SDPA, frame, name, args, kwargs)

    def _answer(self, func: Callable[..., Any], frame: "_Frame", name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a wanted layer's attention; the recorder keeps what is wanted of the call."""
        # Another capture that listens to this call too must hear it: then its output is SDPA's.
        alone = all(other is self for other in _ACTIVE.interceptors)
        call = Call.of(func, frame.module, args, kwargs)
        if call.q.dim() != 4:
            why = f"expected q of [B, H, M, D]; got {list(call.q.shape)}"
            if self.wanted is not None:
                raise NotImplementedError(f"{name}: {why}; leave the layer out")
            self.skipped[name] = why
            return func(*args, **kwargs)
        self._note_layer(name)
        facts = None
        if not torch.compiler.is_compiling():
            self._compare_inputs()
            facts = facts_of(frame.module, frame.args, frame.kwargs)
        whole = self.local.frames[0].name == ""
        key = self.recorder.key(name) if whole else name
        out = self.recorder.answer(key, call, alone, facts)
        return (out, call.found[1]) if func is attention else out

    def _compare_inputs(self) -> None:
        """Tells the trace of modules around this call that were given the same input as another one before."""
        for outer, frame in pairwise(self.local.frames):
            given = frame.main_input()
            if given is None:
                continue
            others = self.inputs.setdefault(outer.name, {})
            for other, earlier in others.items():
                if other != frame.name and earlier() is given:
                    self.trace.note_beside(other, frame.name)
            others[frame.name] = ref(given)

    def _note_layer(self, name: str) -> None:
        if self.intercepted.setdefault(name, self.local.token) is not self.local.token:
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
    "attnx can't capture blocks that compute their softmax themselves: use the model's own maps "
    "(output_attentions=True), or a version of it that calls F.scaled_dot_product_attention"
)


class _Frame:
    """A module at work."""

    __slots__ = ("args", "attended", "kwargs", "module", "name")

    def __init__(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.name, self.module, self.args, self.kwargs, self.attended = name, module, args, kwargs, 0

    def main_input(self) -> Tensor | None:
        """The tensor that the module works on: its first argument, or the first of tokens among those with a name."""
        if self.args:
            return self.args[0] if isinstance(self.args[0], Tensor) and self.args[0].is_floating_point() else None
        tensors = (t for t in self.kwargs.values() if isinstance(t, Tensor) and t.is_floating_point())
        return next((t for t in tensors if t.dim() == 3), None)


class _Hook:
    """A hook of a interceptor's. What a copy of its module has in its place does nothing."""

    __slots__ = ("interceptor", "name")

    def __init__(self, interceptor: Interceptor, name: str = "") -> None:
        self.interceptor = interceptor
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return DOES_NOTHING


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        interceptor = self.interceptor
        if interceptor.thread not in (None, get_ident()):
            return
        if torch.compiler.is_compiling():
            # Dynamo answers an exception with a graph break: the hooks then run uncompiled, with real tensors.
            raise RuntimeError("attnx: a patched model can't be compiled with fullgraph=True")
        if module is interceptor.model and interceptor.routes and kwargs.get("output_attentions"):
            raise ValueError("output_attentions: expected False inside a capture; the trace has the maps")
        local = interceptor.local
        if local.frames and local.frames[0].module is module:
            # The last call ended by a KeyboardInterrupt, after which torch calls no hooks.
            local.frames.clear()
            interceptor.leave()
        if not local.frames:
            interceptor.enter(self.name, module)
        local.frames.append(_Frame(self.name, module, args, kwargs))


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        interceptor = self.interceptor
        local = interceptor.local
        if not local.frames:
            return  # _Enter refused the call
        local.frames.pop()
        if not local.frames:
            interceptor.leave()


class _Done(_Hook):
    """Of the whole model: called only where its call came to an end."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.interceptor.thread in (None, get_ident()):
            self.interceptor.finished = True
            self.interceptor.trace.fold()


class _NoteGrid(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        grid = grid_of(output)
        if grid is not None and self.interceptor.thread in (None, get_ident()):
            self.interceptor.trace.add_grid(self.name, grid)


def route_again() -> None:
    """For captures that go on when another one of the same blocks has ended."""
    for interceptor in list(_LIVE):
        interceptor.routes += route_to_sdpa(interceptor.model)
        if interceptor.recorder.grad:
            interceptor.undo += switch_off(interceptor.model)


def is_intercepted(modules: Iterable[nn.Module]) -> bool:
    """True if a capture that is installed, in any thread, listens to one of the modules."""
    wanted = {id(module) for module in modules}
    return any(id(other) in wanted for interceptor in list(_LIVE) for other in interceptor.model.modules())


class _Local(threading.local):
    """Modules at work, outermost first, in this thread; and what tells the thread from others."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.token = object()


class _Active(threading.local):
    """Listeners whose mode is on, in this thread."""

    def __init__(self) -> None:
        self.interceptors: list[Interceptor] = []


_ACTIVE = _Active()
_LIVE: "weakref.WeakSet[Interceptor]" = weakref.WeakSet()  # installed, in any thread
