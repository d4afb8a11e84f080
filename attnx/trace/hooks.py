"""Module hooks of an interceptor: they record which module is running in each thread."""

import threading
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnx.trace.adapters.switches import DOES_NOTHING
from attnx.trace.explicit import note_unused
from attnx.trace.folding import Around
from attnx.trace.grids import grid_of, mixes_tokens
from attnx.trace.own_weights import Weights

if TYPE_CHECKING:
    from attnx.trace.interceptor import Interceptor
    from attnx.trace.trace import Trace


_UNKNOWN = object()


class Frame:
    """A running module and the arguments of its call.

    Attributes:
        hook: its hook, which knows the module's properties.
        attended: number of its calls of SDPA, in a traced graph.
        fused: True if it called SDPA or `nn.MultiheadAttention`'s function.
        products: shapes of its products of matrices.
        weights: results of its softmaxes over such products that have not multiplied values yet.
        other_softmax: True if it computed a softmax over something else.
    """

    __slots__ = (
        *("_input", "args", "attended", "fused", "hook", "kwargs", "module", "name", "other_softmax", "products"),
        "weights",
    )

    def __init__(self, hook: "Enter", module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.hook, self.name = hook, hook.name
        self.module, self.args, self.kwargs, self.attended = module, args, kwargs, 0
        self._input: Any = _UNKNOWN
        self.fused = self.other_softmax = False
        self.products: set[torch.Size] = set()
        self.weights: list[Weights] = []

    def has_scores(self, shape: torch.Size) -> bool:
        """True if a product has as many numbers as scores of this shape, or as those without one column of sinks."""
        (M, N), rows = shape[-2:], shape.numel() // max(1, shape[-1])
        return any(M in p and any(n in p and p.numel() == rows * n for n in (N, N - 1)) for p in self.products)

    def main_input(self) -> Tensor | None:
        """The module's input tensor: its first argument, or its first keyword argument that is a 3-D float tensor."""
        if self._input is _UNKNOWN:
            self._input = self._find_input()
        found: Tensor | None = self._input
        return found

    def _find_input(self) -> Tensor | None:
        if self.args:
            return self.args[0] if isinstance(self.args[0], Tensor) and self.args[0].is_floating_point() else None
        tensors = (t for t in self.kwargs.values() if isinstance(t, Tensor) and t.is_floating_point())
        return next((t for t in tensors if t.dim() == 3), None)


class Hook:
    """A hook of an interceptor. In a copy of its module it is replaced by a function that does nothing."""

    __slots__ = ("interceptor", "name")

    def __init__(self, interceptor: "Interceptor", name: str = "") -> None:
        self.interceptor = interceptor
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return DOES_NOTHING


class Enter(Hook):
    """Hook of each module: adds the module to the running modules before its forward.

    Args:
        attends: True for an attention layer that the capture should have a map of.
        watched: False if the module's own code can't attend, so that its functions need not be intercepted; see
            `attnx.trace.quiet`.
        norm: True for a norm.
        windows: True if the module's class may have windows.
    """

    __slots__ = ("attends", "norm", "watched", "windows")

    def __init__(
        self, interceptor: "Interceptor", name: str, attends: bool, watched: bool, norm: bool, windows: bool
    ) -> None:
        super().__init__(interceptor, name)
        self.attends, self.watched, self.norm, self.windows = attends, watched, norm, windows

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Add the module to the running modules. The outermost module also starts the capture."""
        interceptor = self.interceptor
        if interceptor.thread is not None and interceptor.thread != get_ident():
            return
        if torch.compiler.is_compiling():
            # Dynamo turns an exception into a graph break: the hooks then run uncompiled, with real tensors.
            raise RuntimeError("attnx: a patched model can't be compiled with fullgraph=True")
        if module is interceptor.model and interceptor.installed.routes and kwargs.get("output_attentions"):
            raise ValueError("output_attentions: expected False inside a capture; read the maps from the trace")
        local = interceptor.local
        frames = local.frames
        if frames and frames[0].module is module:
            # The last call was ended by a KeyboardInterrupt: torch calls no hooks after one.
            local.clear()
            interceptor.leave()
        if not frames:
            interceptor.enter(self.name, module)
        frames.append(Frame(self, module, args, kwargs))
        # What becomes of stored weights is followed in every module.
        watched = self.watched or local.has_weights
        if watched != local.watching:
            interceptor.watch(watched)
        if self.attends:
            interceptor.trace.tokens.ran.add(self.name)


class Leave(Hook):
    """Hook of each module: removes the module from the running modules after its forward."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Remove the module from the running modules. The outermost module also ends the capture."""
        interceptor = self.interceptor
        local = interceptor.local
        frames = local.frames
        if not frames:
            return  # Enter raised
        frame = frames.pop()
        if frame.weights or frame.other_softmax:
            note_unused(interceptor, frame)
            local.note_weights()
        if frame.hook.norm:
            interceptor.inputs.note_norm((*frame.args, *frame.kwargs.values()), output)
        if not frames:
            interceptor.leave()
            return
        watched = frames[-1].hook.watched or local.has_weights
        if watched != local.watching:
            interceptor.watch(watched)


class Done(Hook):
    """Hook of the whole model: torch calls it only if the forward pass finished."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Mark the pass as finished, and fold it into the trace."""
        if self.interceptor.thread in (None, get_ident()):
            self.interceptor.finished = True
            self.interceptor.trace.fold()


class NoteNorm(Hook):
    """Hook of a norm that is not followed, see `norms_to_hook`: stores its input and output."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Store the input and the output, if a call of the model is running in this thread."""
        if self.interceptor.local.frames:
            self.interceptor.inputs.note_norm(args, output)


class NoteGrid:
    """Hook of a module that passes `is_grid_module`: stores the grid of its output, and that it mixed tokens.

    A copy of the module gets a hook that does nothing.

    Args:
        trace: receives the grid.
        name: of the module.
        thread: id of the only thread whose calls count; None: all threads.
    """

    __slots__ = ("name", "thread", "trace")

    def __init__(self, trace: "Trace", name: str, thread: int | None) -> None:
        self.trace, self.name, self.thread = trace, name, thread

    def __reduce__(self) -> tuple[Any, ...]:
        return DOES_NOTHING

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Store the grid of the output, if it has one."""
        if self.thread not in (None, get_ident()):
            return
        if mixes_tokens(module):
            self.trace.tokens.note_mixing(self.name)
        grid = grid_of(module, args, output)
        if grid is not None:
            self.trace.tokens.add_grid(self.name, grid)


class CountMerge(Hook):
    """Hook of a patch merging: counts that it ran in this pass."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count the merging, if a call of the model is running in this thread."""
        if self.interceptor.local.frames:
            self.interceptor.merges += 1


class ThreadState(threading.local):
    """The state of one thread.

    Attributes:
        frames: the running modules, outermost first.
        has_weights: True if one of them has weights that have not multiplied values yet.
        watching: True while the interceptor's function mode is on.
        token: identifies the thread.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.has_weights = False
        self.watching = False
        self.token = object()

    def clear(self) -> None:
        """Forget the running modules."""
        self.frames.clear()
        self.has_weights = False

    def note_weights(self) -> None:
        """Set `has_weights`, after the weights of a frame changed."""
        self.has_weights = any(frame.weights for frame in self.frames)

    def around(self, frame: Frame) -> list[Around]:
        """The module of a running frame and the module around it, with their inputs."""
        place = self.frames.index(frame)
        return [(f.module, f.main_input()) for f in self.frames[max(0, place - 1) : place + 1][::-1]]
