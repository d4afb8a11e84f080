"""Plans: the layers that a method reads, what is stored of each, and the layer after which the pass stops."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

from torch import Tensor, nn

from attnx.extract.projections import HeadDims, queries_and_keys
from attnx.trace.adapters import route_to_sdpa
from attnx.trace.adapters.clones import Clones
from attnx.trace.adapters.mha import SDPA
from attnx.trace.adapters.switches import bind
from attnx.trace.attention_call import Call
from attnx.trace.hooks import NoteGrid
from attnx.trace.interceptor import Interceptor
from attnx.trace.live import is_intercepted, route_again
from attnx.trace.recorder import Recorder, StopForward
from attnx.trace.structure import structure_of


class Step(NamedTuple):
    """One attention layer of a plan."""

    layer: str
    runs: str
    keeps: str
    nbytes: int  # stored for one image
    why: str = ""  # reason that no map of it is made, or that all its projections run; else empty


class Split(NamedTuple):
    """The head dimensions and the scale for projecting one query and all keys of the last layer."""

    heads: HeadDims
    scale: float | None  # of the scores, as the block passes it to SDPA


@dataclass(frozen=True)
class Plan:
    """The layers that a model runs for a method, and what is stored of each; `print(plan)` prints a table.

    Attributes:
        steps: all attention layers, in the order of the calls.
        wanted: names of the layers that are recorded.
        last: name of the last recorded layer, after which the forward pass stops.
        row: the only query row that is recorded of `last`; None: the same rows as in the other layers.
        split: how to project one query and the keys of `last`; None if its projections are unknown.
        blocks: {name: module} of the attention blocks of the recorded layers.
        convolutions: {name: module} of the patch convolutions.
        stops: True if the forward pass stops after `last`; False for sharded models, whose hooks must run to the end.
        of_one_size: True if what is known of the tokens holds for images of one size: windows, or feature maps.
        unbound: {name: reason} of the blocks whose forward can't be bound.
    """

    steps: tuple[Step, ...]
    wanted: tuple[str, ...]
    last: str
    row: int | None
    split: Split | None
    blocks: dict[str, nn.Module] = field(repr=False)
    convolutions: dict[str, nn.Module] = field(repr=False)
    stops: bool = True
    of_one_size: bool = False
    unbound: dict[str, str] = field(default_factory=dict)

    def intercepting(self, reason: str) -> "Plan":
        """The same plan, with the whole model intercepted."""
        return replace(self, unbound=dict.fromkeys(self.blocks, reason))

    @property
    def bound(self) -> bool:
        """True if the blocks' own forwards run with attnx's attention; otherwise the whole model is intercepted."""
        return not self.unbound

    @property
    def nbytes(self) -> int:
        """Bytes that are stored for one image."""
        return sum(step.nbytes for step in self.steps)

    def __str__(self) -> str:
        rows = [("layer", "runs", "keeps", "bytes/image")]
        rows += [(s.layer, s.runs, s.keeps, f"{s.nbytes:,}" if s.nbytes else "-") for s in self.steps]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join((*(c.ljust(w) for c, w in zip(row[:3], widths[:3], strict=True)), row[3].rjust(widths[3])))
            for row in rows
        ]
        how = "the blocks' own forwards, with attnx's attention" if self.bound else "the whole model is intercepted"
        end = f"stops in {self.last}: nothing of the model runs after that" if self.stops else "runs the whole model"
        reasons = {**self.unbound, **{step.layer: step.why for step in self.steps if step.why}}
        by_reason: dict[str, list[str]] = {}
        for layer, reason in reasons.items():
            by_reason.setdefault(reason, []).append(layer)
        for reason, layers in by_reason.items():
            if set(layers) == set(self.blocks):
                by_reason[reason] = ["every layer"]
        notes = [f"{', '.join(layers)}: {reason}" for reason, layers in by_reason.items()]
        return "\n".join([*lines, f"{end}; {how}", *notes])

    def run(self, recorder: Recorder, model: nn.Module, call: Callable[[], Any]) -> None:
        """Run the model as far as the plan requires; the recorder, which knows its structure, receives the trace.

        Raises:
            PlanMismatchError: other layers attended than when the plan was made.
        """
        with ExitStack() as stack:
            self._prepare(recorder, model, stack)
            with suppress(StopForward):
                call()
        if tuple(recorder.trace) != self.wanted:
            raise self._mismatch(model, recorder)

    def _mismatch(self, model: nn.Module, recorder: Recorder) -> "PlanMismatchError":
        return PlanMismatchError(
            f"{type(model).__name__} ran other layers than when the plan was made: expected attention in "
            f"{', '.join(self.wanted)}; got {', '.join(recorder.trace) or 'none'}; make a new Extractor"
        )

    def _prepare(self, recorder: Recorder, model: nn.Module, stack: ExitStack) -> None:
        """Record the passes of this thread until the stack is closed."""
        recorder.clear()
        # Other captures of the model must see the whole pass.
        alone = not is_intercepted(self.blocks.values())
        recorder.stop_after, recorder.stop_row = (self.last, self.row) if alone and self.stops else (None, None)
        stack.callback(setattr, recorder, "stop_after", None)
        thread = get_ident()
        bound = _Bound(recorder, thread).bind(self.blocks) if alone and self.bound else None
        if bound is not None:
            stack.callback(route_again)
            for undo in bound:
                stack.callback(undo)
            for undo in route_to_sdpa(model, recorder.trace.tokens.structure):
                stack.callback(undo)
            for name, convolution in self.convolutions.items():
                note = NoteGrid(recorder.trace, name, thread)
                stack.callback(convolution.register_forward_hook(note).remove)
        else:
            if not set(self.blocks) <= set(structure_of(model).names):
                raise self._mismatch(model, recorder)
            interceptor = Interceptor(model, list(self.blocks), recorder, thread)
            stack.callback(interceptor.uninstall)
            interceptor.install()
        if alone and self.stops and self.split is not None:
            hook = partial(self._project, recorder, thread)
            stack.callback(self.blocks[self.last].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _project(self, recorder: Recorder, thread: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = sole_input(args, kwargs)
        if x is not None and self.split is not None and get_ident() == thread:
            projected = queries_and_keys(module, x, self.row or 0, self.split.heads)
            if projected is not None:
                q, k = projected
                recorder.keep_row(self.last, q, k, k.shape[2], scale=self.split.scale, backend=recorder.backend)


class PlanMismatchError(RuntimeError):
    """Other layers attended than those of the plan."""


def sole_input(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The only tensor among a call's arguments, if all others are None, numbers, flags or strings; else None."""
    others = [
        value for value in (*args, *kwargs.values()) if not isinstance(value, (type(None), bool, int, float, str))
    ]
    return others[0] if len(others) == 1 and isinstance(others[0], Tensor) else None


class _Bound:
    """Clones of the blocks' forwards, whose attention a recorder computes in one thread; others run plain SDPA."""

    def __init__(self, recorder: Recorder, thread: int) -> None:
        self.recorder, self.thread = recorder, thread
        self.clones = Clones(self._sdpa)
        self.running: tuple[str, nn.Module] | None = None  # the block that attends, and its name

    def bind(self, blocks: Mapping[str, nn.Module]) -> list[Callable[[], None]] | None:
        """Bind a clone to each block; returns functions that undo it, or None if a block has no clone."""
        forwards = {}
        for name, block in blocks.items():
            clone = self.clones.of(block)
            if isinstance(clone, str):
                return None
            forwards[name] = self._forward(name, clone)
        return [bind(block, forwards[name]) for name, block in blocks.items()]

    def _forward(self, name: str, clone: Callable[..., Any]) -> Callable[..., Any]:
        """The clone, which also notes that the block runs."""

        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if get_ident() != self.thread:
                return clone(block, *args, **kwargs)
            around, self.running = self.running, (name, block)
            try:
                return clone(block, *args, **kwargs)
            finally:
                self.running = around

        return forward

    def _sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        if get_ident() != self.thread or self.running is None:
            return SDPA(*args, **kwargs)
        name, block = self.running
        return self.recorder.answer(self.recorder.key(name), Call.of(SDPA, block, args, kwargs), True)
