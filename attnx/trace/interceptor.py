"""Intercepts a model's attention calls and passes them to a recorder, which computes the output and stores the map.

Two hooks on each module that may attend (`followed`) track which layer is running (`hooks`). A layer whose code calls
`F.scaled_dot_product_attention`, and nothing else that matters, runs a clone of its forward that calls the interceptor
in its place (`adapters.clones`). While another layer runs, a `TorchFunctionMode` intercepts that function,
`F.multi_head_attention_forward` and `attnx.attention`, and the softmax of blocks that call none of these (`explicit`).
No module is replaced, and hooks and clones are removed when the capture ends (`installation`). Copies of the model made
during a capture are not captured.
"""

import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from attnx.ops.functional import attention
from attnx.trace import explain, explicit
from attnx.trace.adapters.checkpointing import recomputes
from attnx.trace.adapters.mha import MHA, SDPA, multi_head_attention
from attnx.trace.attention_call import Call, sdpa_in_four
from attnx.trace.facts import Facts, facts_of
from attnx.trace.followed import NORMS
from attnx.trace.grids import MIXERS, function_mixes, is_grid_module
from attnx.trace.hooks import Frame, ThreadState
from attnx.trace.inputs import WRITES, Inputs
from attnx.trace.installation import Installation
from attnx.trace.layers import Layers, check_model, matches, names_in_graph, resolve
from attnx.trace.live import ACTIVE, INSTALLED, route_again, unbind
from attnx.trace.recorder import Recorder
from attnx.trace.window_readers import windows_of

_INTERCEPTED = frozenset({SDPA, MHA, attention}) | explicit.SOFTMAX | explicit.PRODUCTS
_NOTED = WRITES | MIXERS


class Interceptor(TorchFunctionMode):
    """Hooks and function mode of one capture.

    Args:
        model: the model to capture.
        layers: as in `attnx.capture`.
        recorder: computes the output of each intercepted call and stores its record.
        thread: id of the only thread that is captured; None: all threads.
        binds: bind clones of forwards that name SDPA, instead of watching the functions that they call. No module may
            be compiled then.
    """

    def __init__(
        self, model: nn.Module, layers: Layers, recorder: Recorder, thread: int | None = None, binds: bool = False
    ) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        self.thread = thread
        self.binds = binds
        self.recorder = recorder
        self.trace = recorder.trace
        self.wanted = resolve(model, layers)
        self.intercepted: dict[str, object] = {}  # layers of the last call: token of the thread that ran it
        self.before: dict[str, int] = {}  # every intercepted layer: index of its last call
        self.calls = 0  # number of calls that have begun
        self.skipped: dict[str, str] = {}  # layers without a map: reason
        self.explicit: set[str] = set()  # layers that computed their softmax themselves
        self.folded: set[str] = set()  # layers whose q had not 4 dimensions
        self.installed = Installation(self)
        self.local = ThreadState()
        self.running: dict[object, threading.Thread] = {}  # threads that are running the model
        self.entered: set[str] = set()  # modules called from outside the model, in this call
        self.inputs = Inputs()  # of the modules that ran in this call
        self.merges = 0  # number of patch mergings that ran in this call
        self.torn: str | None = None  # a layer that several threads ran in one call
        self.lock = threading.Lock()
        self.graphs: dict[nn.Module, tuple[str, ...]] = {}  # names of the layers in traced graphs
        self.finished = True

    def install(self) -> None:
        """Add the hooks to the model. Captures of a model may be nested."""
        alone = not unbind(self.model)
        INSTALLED.add(self)
        self.installed.install(self._sdpa if self.binds and alone else None)

    def is_wanted(self, name: str) -> bool:
        """True if the capture should have a map of the layer."""
        return self.wanted is None or any(matches(pattern, name) for pattern in self.wanted)

    def uninstall(self) -> None:
        """Remove all hooks and restore the blocks; other captures of the same blocks continue to work."""
        if self.local.frames:
            # torch calls no hooks after a KeyboardInterrupt.
            self.local.clear()
            self.leave()
        self.installed.remove()
        INSTALLED.discard(self)
        route_again()

    def check(self) -> None:
        """Raise RuntimeError unless every requested layer was intercepted."""
        if not self.calls:
            raise RuntimeError("nothing was captured: the model was not called")
        if self.torn is not None:
            raise RuntimeError(
                f"{self.torn}: several threads ran it at once, so the order of its maps is unknown; capture one copy "
                "of the model in one thread (for nn.DataParallel, its .module), or use DistributedDataParallel"
            )
        if not self.finished:
            raise RuntimeError("the model's last call did not finish: its maps are not complete")
        self.trace.fold()
        intercepted = self.intercepted if self.recorder.calls == "last" else self.before
        missing = [str(pattern) for pattern in self.wanted or [] if not any(matches(pattern, n) for n in intercepted)]
        if missing:
            raise RuntimeError(explain.missing_layers(self, missing, sorted(intercepted)))
        if self.wanted is None and self.before:
            message = explain.unintercepted_layers(self, intercepted)
            if message is not None:
                warnings.warn(message, stacklevel=3)
        if not self.before:
            raise RuntimeError(explain.nothing_captured(self))
        if self.explicit and not self.recorder.internal and self.model not in _REPORTED:
            _REPORTED.add(self.model)
            warnings.warn(explain.own_weights(self), stacklevel=3)

    def enter(self, name: str, module: nn.Module) -> None:
        """Start capturing in this thread: a module was called from outside the model.

        Raises:
            RuntimeError: the module is a copy by nn.DataParallel, which would run clones of the original's forwards.
        """
        if "_is_replica" in vars(module):
            raise RuntimeError(
                f"{type(module).__name__}: expected one copy of the model; got copies by nn.DataParallel; capture its "
                ".module in one thread, or use DistributedDataParallel"
            )
        with self.lock:
            others = any(thread.is_alive() for thread in self.running.values())
            if not others and not recomputes():
                self.running.clear()
                self._begin(name)
            elif module is self.model and not recomputes():
                self.torn = type(module).__name__
            self.running[self.local.token] = threading.current_thread()
        ACTIVE.interceptors.append(self)

    def leave(self) -> None:
        """Stop capturing in this thread: the call has ended."""
        self.watch(False)
        ACTIVE.interceptors.remove(self)
        with self.lock:
            self.running.pop(self.local.token, None)

    def watch(self, on: bool) -> None:
        """Begin or stop to intercept the functions that this thread calls.

        Modes are a stack: below the mode of another capture, or of a user, this one stays on.
        """
        local = self.local
        if on and not local.watching:
            local.watching = True
            self.__enter__()  # type: ignore[no-untyped-call]  # inherited from torch
        elif not on and local.watching and (not local.frames or _top_mode() is self):
            local.watching = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # inherited from torch

    def _begin(self, name: str) -> None:
        """Start a new pass, unless the call is of a part of the model that belongs to the current pass."""
        if self.calls and name and self.entered.isdisjoint(("", name)):
            self.entered.add(name)
            return
        self.entered = {name}
        self.inputs.clear()
        self.merges = 0
        if self.recorder.calls == "last":
            self.torn = None
        self.recorder.begin_call(self.finished)
        self.intercepted.clear()
        self.calls += 1
        self.finished = name != ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _INTERCEPTED:
            if func in _NOTED:
                self._note(func, args, kwargs)
            out = explicit.followed(self, func, args, kwargs) if self.local.has_weights else func(*args, **kwargs)
            if func in NORMS:
                self.inputs.note_norm(args[:1], out)
            return out
        if not self.local.frames or recomputes():
            return func(*args, **kwargs)
        if func in explicit.SOFTMAX:
            return explicit.softmax(self, func, args, kwargs)
        if func in explicit.PRODUCTS:
            return explicit.product(self, func, args, kwargs)
        frame = self.local.frames[-1]
        frame.fused = True
        name = self._name(frame) if func is SDPA else frame.name
        if self.torn is not None or not self.is_wanted(name):
            self.note_layer(name)
            return sdpa_in_four(func, *args, **kwargs) if func is SDPA else func(*args, **kwargs)
        if func is MHA:
            exact = not self.recorder.grad
            sdpa = partial(self._answer_sdpa, frame, name)
            return multi_head_attention(sdpa, exact, *args, **kwargs)
        return self._answer(func, frame, name, args, kwargs)

    def _sdpa(self, *args: Any, **kwargs: Any) -> Any:
        """SDPA as a clone calls it. A mode that is on intercepts the call itself."""
        if self.local.watching or not self.local.frames:
            return SDPA(*args, **kwargs)
        return self.__torch_function__(SDPA, (), args, kwargs)

    def _answer_sdpa(self, frame: Frame, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._answer(SDPA, frame, name, args, kwargs)

    def _answer(
        self, func: Callable[..., Any], frame: Frame, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of a requested layer's attention, whose record the recorder stores."""
        # If another capture intercepts this call too, the output must come from SDPA, so that it sees the call.
        only_capture = all(other is self for other in ACTIVE.interceptors)
        try:
            call = Call.of(func, frame.module, args, kwargs, self.local.around(frame))
        except NotImplementedError as error:
            self.skip(name, str(error))
            return func(*args, **kwargs)
        self.note_layer(name)
        if call.folded:
            self.folded.add(name)
        facts = self.facts(frame, (len(call.q), call.q.shape[2], call.k.shape[2]))
        out = self.recorder.answer(self.key(name), call, only_capture, facts)
        return (out, call.result[1]) if func is attention else out

    def skip(self, name: str, reason: str) -> None:
        """Store the reason that a layer has no map; raises NotImplementedError if the layer was requested."""
        if self.wanted is not None:
            raise NotImplementedError(f"{name or 'the model itself'}: {reason}; exclude the layer")
        self.skipped[name] = reason

    def key(self, name: str) -> str:
        """Name of the layer in the trace; parts that are called by themselves number no calls."""
        return self.recorder.key(name) if self.local.frames[0].name == "" else name

    def facts(self, frame: Frame, shape: tuple[int, ...]) -> Facts | None:
        """Facts about a call with maps of this shape, [items, M, N]."""
        if torch.compiler.is_compiling():
            return None
        self.trace.tokens.beside += self.inputs.shared(self.local.frames)
        facts = facts_of(frame.module, frame.args, frame.kwargs, shape[0])
        windowed = [f for f in reversed(self.local.frames) if f.hook.windows]
        around = (windows_of(f.module, f.args, f.kwargs) for f in windowed)
        windows = next((w for w in around if w is not None and w.fits(shape)), None)
        return facts._replace(windows=windows, merges=self.merges) if windows or self.merges else facts

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store that a function wrote to a tensor, or mixed tokens outside a module that has a hook for that."""
        if func in WRITES:
            self.inputs.note_write(args[0])
        elif self.local.frames and function_mixes(func, args, kwargs):
            frame = self.local.frames[-1]
            if not is_grid_module(frame.module):
                self.trace.tokens.note_mixing(f"{frame.name}.{func.__name__}".removeprefix("."))

    def note_layer(self, name: str) -> None:
        """Store that a layer attended in this call."""
        if self.intercepted.setdefault(name, self.local.token) is not self.local.token:
            self.torn = name
        self.before[name] = self.calls - 1

    def _name(self, frame: Frame) -> str:
        """Name of the running layer; in a traced graph, name of the module that the code was traced from."""
        if not isinstance(frame.module, fx.GraphModule):
            return frame.name
        if frame.module not in self.graphs:
            self.graphs[frame.module] = names_in_graph(frame.module)
        names = self.graphs[frame.module]
        frame.attended += 1
        traced = names[frame.attended - 1] if frame.attended <= len(names) else ""
        return ".".join(part for part in (frame.name, traced) if part)


def _top_mode() -> object:
    """The function mode of this thread that sees a call first; None if there is none."""
    count = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(count - 1) if count else None


_REPORTED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models whose own weights were reported
