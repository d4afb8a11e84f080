"""What of a model's forward pass a method needs: which layers, what is kept of each, where the model may stop."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import RLock, get_ident
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attnx.adapters import open_ears
from attnx.adapters.projections import projects, queries_and_keys
from attnx.adapters.rebind import SDPA, own_forward
from attnx.kept import Kept, KeptQK
from attnx.layers import Layers, attention_layers, clean_name
from attnx.layout import grid_of, patch_convolutions
from attnx.listener import Listener, heard
from attnx.ops import cast_as_sdpa
from attnx.recorder import Recorder, Stop

# One pass at a time of every model, known by the first of its blocks: bound blocks are of one thread.
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@dataclass(frozen=True)
class Step:
    """One attention layer of a plan."""

    layer: str
    runs: str
    keeps: str
    nbytes: int  # kept of one image


@dataclass(frozen=True)
class Plan:
    """The layers that a model runs for a method, and what is kept of each; `print(plan)` is a table.

    Attributes:
        steps: every attention layer, in the order of the calls.
        wanted: names of those that something is kept of.
        last: the one after which the model is left.
        row: the only query row of it that is wanted; None: as in the others.
        heads: H, Hk, D of the last layer, where its projections can be split; else None.
        scale: of its scores, as the block gives it.
        bound: whether the blocks' own forwards are run with another attention. Else all of the model is listened to.
        blocks: the modules that attend in the wanted layers, by name.
        convolutions: those that cut images into patches.
    """

    steps: tuple[Step, ...]
    wanted: tuple[str, ...]
    last: str
    row: int | None
    heads: tuple[int, int, int] | None
    scale: float | None
    bound: bool
    blocks: dict[str, nn.Module] = field(repr=False)
    convolutions: tuple[nn.Module, ...] = field(repr=False)

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
        return "\n".join([*lines, f"stops in {self.last}: nothing of the model runs after that; {how}"])

    def run(self, recorder: Recorder, model: nn.Module, call: Callable[[], Any]) -> None:
        """Runs the model as far as the plan needs; the trace is in the recorder.

        Raises:
            RuntimeError: the model took another way than when the plan was made.
        """
        lock = _LOCKS.setdefault(next(iter(self.blocks.values())), RLock())
        with lock, ExitStack() as stack:
            self._prepare(recorder, model, stack)
            with suppress(Stop):
                call()
        if tuple(recorder.trace) != self.wanted:
            raise RuntimeError(
                f"{type(model).__name__} took another way than when the plan was made: expected attention in "
                f"{', '.join(self.wanted)}; heard {', '.join(recorder.trace) or 'nothing'}; make a new Extractor"
            )

    def _prepare(self, recorder: Recorder, model: nn.Module, stack: ExitStack) -> None:
        """Has the pass of this thread recorded as long as the stack is open."""
        recorder.clear()
        # Another capture of the model is to see all of its pass.
        alone = not any(heard(block) for block in self.blocks.values())
        recorder.last, recorder.last_row = (self.last, self.row) if alone else (None, None)
        thread = get_ident()
        forwards = {name: own_forward(block, _answer(recorder, name, thread)) for name, block in self.blocks.items()}
        if alone and all(forwards.values()):
            for name, block in self.blocks.items():
                for undo in open_ears(block):
                    stack.callback(undo)
                # Not by setattr: nn.Module's takes longer than some layers.
                vars(block)["forward"] = MethodType(forwards[name], block)  # type: ignore[arg-type]
                stack.callback(vars(block).pop, "forward", None)
            for convolution in self.convolutions:
                hook = partial(_note_grid, recorder, thread)
                stack.callback(convolution.register_forward_hook(hook).remove)
        else:
            listener = Listener(model, list(self.blocks), recorder, thread)
            stack.callback(listener.uninstall)
            listener.install()
        if alone and self.heads is not None:
            split = partial(self._split, recorder, thread)
            stack.callback(self.blocks[self.last].register_forward_pre_hook(split, with_kwargs=True).remove)

    def _split(self, recorder: Recorder, thread: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = _only_tensor(args, kwargs)
        if x is not None and self.heads is not None and get_ident() == thread:
            split = queries_and_keys(module, x, self.row or 0, self.heads)
            if split is not None:
                recorder.keep_row(self.last, *cast_as_sdpa(*split), scale=self.scale, backend=recorder.backend)


def _only_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What a block is called with, if it is one tensor and no mask or other tensor beside."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def _answer(recorder: Recorder, layer: str, thread: int) -> Callable[..., Tensor]:
    """Attention that is recorded; in other threads, which may run the same model meanwhile, plain attention."""

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        if get_ident() != thread:
            return SDPA(*args, **kwargs)
        return recorder.answer(recorder.key(layer), SDPA, True, *args, **kwargs)

    return answer


def _note_grid(recorder: Recorder, thread: int, module: nn.Module, args: Any, output: Any) -> None:
    grid = grid_of(output)
    if grid is not None and get_ident() == thread:
        recorder.trace.add_grid(grid)


class Trial:
    """One pass of a whole model, for the length of a `with`: what is seen of it makes a plan.

    Args:
        model, layers: as in `attnx.capture`.
        recorder: what is asked of the layers; its trace is the pass's.
    """

    def __init__(self, model: nn.Module, layers: Layers, recorder: Recorder) -> None:
        self.model = model
        self.recorder = recorder
        self.listener = Listener(model, layers, recorder)
        self.inputs: dict[str, Tensor] = {}
        self.hooks: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self.recorder.last, self.recorder.calls = None, {}
        self.listener.install()
        for name, module in self.model.named_modules():
            hook = module.register_forward_pre_hook(partial(self._note, clean_name(name)), with_kwargs=True)
            self.hooks.append(hook.remove)

    def __exit__(self, kind: Any, *error: Any) -> None:
        while self.hooks:
            self.hooks.pop()()
        self.listener.uninstall()
        if kind is None:
            self.listener.check()

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = _only_tensor(args, kwargs)
        if x is not None and projects(module):
            self.inputs[name] = x

    def plan(self, wanted: Sequence[str], row: int | None) -> Plan:
        """The plan that keeps what is wanted of some layers, and of the last no more than a row, if one is said.

        Args:
            wanted: names in the trace, in its order.
            row: the only query row of the last of them that is wanted; None: what the recorder keeps of the others.
        """
        trace, calls, last = self.recorder.trace, self.recorder.calls or {}, wanted[-1]
        self.recorder.calls = None
        modules = {clean_name(name): module for name, module in self.model.named_modules()}
        blocks = {name.partition("#")[0]: modules[name.partition("#")[0]] for name in wanted}  # "x#2" is x again
        call, x = calls[last], self.inputs.get(last)
        heads = (call["q"].shape[1], call["k"].shape[1], call["q"].shape[3])
        split = False
        if row is not None and x is not None and call["bias"] is None and not call["is_causal"]:
            split = _as_projected(blocks[last], x, row, heads, call["q"], call["k"])
        names = [name for name in attention_layers(self.model) if name not in trace]
        order = sorted([*trace, *names], key=list(modules).index) if set(trace) <= set(modules) else [*trace, *names]
        steps, stopped = [], False
        for name in order:
            kept = trace.kept(name) if name in wanted else None
            if stopped:
                steps.append(Step(name, "nothing", "-", 0))
            elif kept is None:
                steps.append(Step(name, "its own attention", "-", 0))
            elif name != last:
                steps.append(Step(name, "attention with its map", _described(kept, trace.rows), kept.nbytes))
            else:
                runs = f"keys, and the query of row {row}" if split else "projections and its map"
                keeps, nbytes = _described(kept, trace.rows), kept.nbytes
                if row is not None and trace.rows is None:
                    keeps, nbytes = f"row {row}", 4 * kept.shape[-1]
                steps.append(Step(name, runs, keeps, nbytes))
            stopped = stopped or name == last
        return Plan(
            steps=tuple(steps),
            wanted=tuple(wanted),
            last=last,
            row=row,
            heads=heads if split else None,
            scale=call["scale"],
            bound=all(own_forward(block, SDPA) is not None for block in blocks.values()),
            blocks=blocks,
            convolutions=tuple(patch_convolutions(self.model)),
        )


def _described(kept: Kept, rows: tuple[int, ...] | None) -> str:
    if rows is not None:
        return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
    return "q, k" if isinstance(kept, KeptQK) else f"map {list(kept.shape[1:])}"


def _as_projected(module: nn.Module, x: Tensor, row: int, heads: tuple[int, int, int], q: Tensor, k: Tensor) -> bool:
    """Whether the block's projections alone give the queries and keys that it attended with."""
    try:
        split = queries_and_keys(module, x, row, heads)
    except RuntimeError:  # of shapes: these projections mean something else
        return False
    return split is not None and _close(split[0], q[:, :, row : row + 1]) and _close(split[1], k)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    allowed = max(1e-4, 8 * torch.finfo(a.dtype).eps) * float(b.float().abs().max())
    return float((a.float() - b.float()).abs().max()) <= allowed
