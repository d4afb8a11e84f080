"""Adds hooks, clones of forwards and switches to SDPA to the modules of a model for a capture, and removes them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from attnx.trace.adapters import route_to_sdpa
from attnx.trace.adapters.checkpointing import switch_off
from attnx.trace.adapters.clones import Clones
from attnx.trace.adapters.switches import bind
from attnx.trace.followed import is_followed, norms_to_hook, quiet_modules, sdpa_modules
from attnx.trace.grids import is_grid_module
from attnx.trace.hooks import CountMerge, Done, Enter, Leave, NoteGrid, NoteNorm
from attnx.trace.inputs import is_norm
from attnx.trace.layers import is_attention
from attnx.trace.quiet import holds_functions, sdpa_is_on
from attnx.trace.structure import structure_of
from attnx.trace.window_readers import may_have_windows
from attnx.trace.windows import merges

if TYPE_CHECKING:
    from attnx.trace.interceptor import Interceptor


class Installation:
    """The hooks, clones and switches of an interceptor. Several captures of a model may be nested.

    Attributes:
        routes: undo the switches to SDPA.

    Args:
        interceptor: the hooks call it.
    """

    def __init__(self, interceptor: "Interceptor") -> None:
        self.interceptor = interceptor
        self.routes: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._bound: list[tuple[Callable[[], None], Enter]] = []  # removes a clone; the hook of its module

    def install(self, sdpa: Callable[..., Any] | None) -> None:
        """Add two hooks to each module to follow: one runs first in a call, one runs last even after an error.

        sdpa: called in place of SDPA by attention layers whose code calls nothing else that a capture notes; None: by
            no layers. The functions that other layers call are watched.
        """
        interceptor = self.interceptor
        model, recorder = interceptor.model, interceptor.recorder
        structure = interceptor.trace.tokens.structure = structure_of(model)
        self.routes += route_to_sdpa(model, structure)
        if recorder.grad:
            self._undo += switch_off(model)
        self._undo.append(model.register_forward_hook(Done(interceptor)).remove)
        leave, clones = Leave(interceptor), None if sdpa is None else Clones(sdpa)
        quiet, norms = structure.derived(quiet_modules), structure.derived(norms_to_hook)
        direct = structure.derived(sdpa_modules) if clones is not None else ()
        for name, module in structure.where(is_followed) or [("", model)]:
            kind: Any = type(module)
            attends = is_attention(module) and interceptor.is_wanted(name)
            watched = name not in quiet or holds_functions(module)
            enter = Enter(interceptor, name, attends, watched, is_norm(module), may_have_windows(kind))
            if clones is not None and attends and name in direct:
                self._bind(module, enter, clones)
            self._undo += [
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove,
                module.register_forward_hook(leave, always_call=True).remove,
            ]
        for name, module in structure.where(is_norm) if norms else ():
            if name in norms:
                self._undo.append(module.register_forward_hook(NoteNorm(interceptor)).remove)
        for _, module in structure.where(merges):
            self._undo.append(module.register_forward_hook(CountMerge(interceptor)).remove)
        for name, module in structure.where(is_grid_module):
            note = NoteGrid(interceptor.trace, name, interceptor.thread)
            self._undo.append(module.register_forward_hook(note).remove)

    def route_again(self) -> None:
        """Switch the blocks to SDPA again, after another capture of them ended."""
        self.routes += route_to_sdpa(self.interceptor.model)
        if self.interceptor.recorder.grad:
            self._undo += switch_off(self.interceptor.model)

    def unbind(self) -> None:
        """Remove the clones; the functions of their modules are watched instead."""
        while self._bound:
            undo, enter = self._bound.pop()
            undo()
            enter.watched = True

    def remove(self) -> None:
        """Remove everything."""
        self.unbind()
        for undo in (self._undo, self.routes):
            while undo:
                undo.pop()()

    def _bind(self, module: nn.Module, enter: Enter, clones: Clones) -> None:
        """Bind a clone to an attention layer, whose functions then need not be watched."""
        if holds_functions(module) or not sdpa_is_on(module):
            return
        clone = clones.of(module)
        if not isinstance(clone, str):
            self._bound.append((bind(module, clone), enter))
            enter.watched = False
