"""What of a model's forward pass a method needs: which layers, what is kept of each, where the model may stop."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from attnx.extract.projections import HeadDims, queries_and_keys
from attnx.extract.rebind import SDPA, own_forward
from attnx.ops.functional import cast_as_sdpa
from attnx.trace.adapters import route_to_sdpa
from attnx.trace.interceptor import Interceptor, is_intercepted, route_again
from attnx.trace.layers import clean_name
from attnx.trace.layout import grid_of
from attnx.trace.recorder import Call, Recorder, StopForward


class Step(NamedTuple):
    """One attention layer of a plan."""

    layer: str
    runs: str
    keeps: str
    nbytes: int  # kept of one image


class Split(NamedTuple):
    """How the last layer's own projections give the one query that is wanted, and the keys."""

    heads: HeadDims
    scale: float | None  # of the scores, as the block gives it to SDPA


@dataclass(frozen=True)
class Plan:
    """The layers that a model runs for a method, and what is kept of each; `print(plan)` is a table.

    Attributes:
        steps: every attention layer, in the order of the calls.
        wanted: names of those that something is kept of.
        last: the one after which the model is left.
        row: the only query row of it that is wanted; None: as in the others.
        split: how the last layer's projections are split, where they can be.
        bound: whether the blocks' own forwards can be run with another attention. Else all of the model is listened to.
        blocks: the modules that attend in the wanted layers, by name.
        convolutions: those that cut images into patches, by name.
        stops: whether the model is left after `last`; not where its weights are sharded by hooks that run at the end.
    """

    steps: tuple[Step, ...]
    wanted: tuple[str, ...]
    last: str
    row: int | None
    split: Split | None
    bound: bool
    blocks: dict[str, nn.Module] = field(repr=False)
    convolutions: dict[str, nn.Module] = field(repr=False)
    stops: bool = True

    @property
    def nbytes(self) -> int:
        """What is kept of one image."""
        return sum(step.nbytes for step in self.steps)

    def __str__(self) -> str:
        rows = [("layer", "runs", "keeps", "bytes/image")]
        rows += [(s.layer, s.runs, s.keeps, f"{s.nbytes:,}" if s.nbytes else "-") for s in self.steps]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join((*(c.ljust(w) for c, w in zip(row[:3], widths[:3], strict=True)), row[3].rjust(widths[3])))
            for row in rows
        ]
        how = "the blocks' own forwards, with attnx's attention" if self.bound else "listening to the whole model"
        end = f"stops in {self.last}: nothing of the model runs after that" if self.stops else "runs the whole model"
        return "\n".join([*lines, f"{end}; {how}"])

    def run(self, recorder: Recorder, model: nn.Module, call: Callable[[], Any]) -> None:
        """Runs the model as far as the plan needs; the trace is in the recorder.

        Raises:
            PlanMismatchError: the model took another way than when the plan was made.
        """
        with ExitStack() as stack:
            self._prepare(recorder, model, stack)
            with suppress(StopForward):
                call()
        if tuple(recorder.trace) != self.wanted:
            raise self._mismatch(model, recorder)

    def _mismatch(self, model: nn.Module, recorder: Recorder) -> "PlanMismatchError":
        return PlanMismatchError(
            f"{type(model).__name__} took another way than when the plan was made: expected attention in "
            f"{', '.join(self.wanted)}; heard {', '.join(recorder.trace) or 'nothing'}; make a new Extractor"
        )

    def _prepare(self, recorder: Recorder, model: nn.Module, stack: ExitStack) -> None:
        """Has the pass of this thread recorded as long as the stack is open."""
        recorder.clear()
        # Another capture of the model is to see all of its pass.
        alone = not is_intercepted(self.blocks.values())
        recorder.stop_after, recorder.stop_row = (self.last, self.row) if alone and self.stops else (None, None)
        stack.callback(setattr, recorder, "stop_after", None)
        thread = get_ident()
        forwards = {}
        if alone and self.bound:
            found = {
                name: own_forward(block, _answer(recorder, name, block, thread)) for name, block in self.blocks.items()
            }
            forwards = {name: forward for name, forward in found.items() if forward is not None}
        if len(forwards) == len(self.blocks):
            stack.callback(route_again)
            for name, block in self.blocks.items():
                for undo in route_to_sdpa(block):
                    stack.callback(undo)
                # Not by setattr: nn.Module's takes longer than some layers.
                vars(block)["forward"] = MethodType(forwards[name], block)
                stack.callback(vars(block).pop, "forward", None)
            for name, convolution in self.convolutions.items():
                hook = partial(_note_grid, recorder, name, thread)
                stack.callback(convolution.register_forward_hook(hook).remove)
        else:
            if not set(self.blocks) <= {clean_name(name) for name, _ in model.named_modules()}:
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
                q, k = cast_as_sdpa(*projected)
                recorder.keep_row(self.last, q, k, k.shape[2], scale=self.split.scale, backend=recorder.backend)


class PlanMismatchError(RuntimeError):
    """A model's pass was not the one that its plan was made for."""


def sole_input(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a block is called with, if nothing else is given to it but None, numbers and flags."""
    given = [value for value in (*args, *kwargs.values()) if not isinstance(value, (type(None), bool, int, float, str))]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def _answer(recorder: Recorder, layer: str, block: nn.Module, thread: int) -> Callable[..., Tensor]:
    """Attention that is recorded; in other threads, which may run the same model meanwhile, plain attention."""

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        if get_ident() != thread:
            return SDPA(*args, **kwargs)
        return recorder.answer(recorder.key(layer), Call.of(SDPA, block, args, kwargs), True)

    return answer


def _note_grid(recorder: Recorder, name: str, thread: int, module: nn.Module, args: Any, output: Any) -> None:
    grid = grid_of(output)
    if grid is not None and get_ident() == thread:
        recorder.trace.add_grid(name, grid)
