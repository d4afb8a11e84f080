"""A trial pass of a whole model: it records which layers attend and in which order, and makes a plan."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from attnx.extract.plan import Plan, Split, Step, sole_input
from attnx.extract.projections import HeadDims, projects, queries_and_keys
from attnx.ops.checks import in_range
from attnx.trace.adapters.clones import Clones
from attnx.trace.adapters.mha import SDPA
from attnx.trace.adapters.sharding import is_sharded
from attnx.trace.explain import unintercepted
from attnx.trace.grids import is_grid_module
from attnx.trace.interceptor import Interceptor
from attnx.trace.layers import Layers, attention_layers, matches
from attnx.trace.qk_record import QKRecord
from attnx.trace.recorder import Recorder
from attnx.trace.records import LayerRecord, MapRecord
from attnx.trace.structure import structure_of


class Trial:
    """A context manager that records the pass of the model inside the `with`, in this thread.

    Args:
        model, layers: as in `attnx.capture`.
        recorder: stores the records of the layers in its trace.
    """

    def __init__(self, model: nn.Module, layers: Layers, recorder: Recorder) -> None:
        self.model = model
        self.recorder = recorder
        self.thread = get_ident()
        self.interceptor = Interceptor(model, layers, recorder, self.thread)
        self.inputs: dict[str, Tensor] = {}
        self.calls: dict[str, dict[str, Any]] = {}
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            self.recorder.stop_after, self.recorder.attended = None, self.calls
            stack.callback(setattr, self.recorder, "attended", None)
            stack.callback(self.interceptor.uninstall)
            self.interceptor.install()
            for name, module in structure_of(self.model).where(projects):
                hook = partial(self._note, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            self.stack = stack.pop_all()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.stack.close()
        if kind is None:
            self.interceptor.check()

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = self.interceptor.wanted
        if get_ident() == self.thread and (wanted is None or any(matches(w, name) for w in wanted)):
            x = sole_input(args, kwargs)
            self.inputs = {} if x is None else {name: x}  # of one layer at a time, to save memory

    def plan(self, wanted: Sequence[str], row: int | None) -> Plan:
        """Plan for the layers `wanted`; only `row` of the last layer is recorded.

        Args:
            wanted: names of layers in the trace, in its order.
            row: the only query row that is recorded of the last layer; None: the same rows as in the other layers.
        """
        last = wanted[-1]
        structure = structure_of(self.model)
        modules = dict(structure.named_modules())
        convolutions = {id(module) for _, module in structure.where(is_grid_module)}
        blocks = {name.partition("#")[0]: modules[name.partition("#")[0]] for name in wanted}  # "x#2" is x again
        split = None if row is None else self._split(last, modules.get(last), row)
        clones = Clones(SDPA)
        reasons = {name: clone for name, block in blocks.items() if isinstance(clone := clones.of(block), str)}
        reasons |= dict.fromkeys(self.interceptor.folded & blocks.keys(), "its heads are read from its input")
        tokens = self.recorder.trace.tokens
        return Plan(
            steps=tuple(self._steps(wanted, row, split, list(modules))),
            wanted=tuple(wanted),
            last=last,
            row=row,
            split=split if isinstance(split, Split) else None,
            blocks=blocks,
            stops=not is_sharded(structure),
            convolutions={name: module for name, module in modules.items() if id(module) in convolutions},
            of_one_size=any(tokens.depends_on_size(name) for name in wanted),
            unbound=reasons,
        )

    def _split(self, last: str, block: nn.Module | None, row: int) -> Split | str:
        """The `Split` of the last layer, or the reason that one query and the keys can't be projected alone."""
        call, x = self.calls.get(last, {}), self.inputs.get(last)
        if block is None:
            return "all its projections run: it attends several times in a pass"
        if not projects(block):
            return f"all its projections run: attnx does not know those of {type(block).__name__}"
        if x is None or "q" not in call:
            return "all its projections run: it has more inputs than one tensor, or another layer attends after it"
        if call["bias"] is not None or call["is_causal"] or not {"softcap", "sinks"}.isdisjoint(call):
            return "all its projections run: its scores have a mask, a bias, a softcap or sinks"
        q, k = call["q"], call["k"]
        (at,) = in_range([row], q.shape[2])
        heads = HeadDims(q.shape[1], k.shape[1], q.shape[3])
        projected = queries_and_keys(block, x, row, heads)
        if projected is None:
            return "all its projections run: they are replaced, hooked, quantised or sharded"
        if not (_close(projected[0], q[:, :, at : at + 1]) and _close(projected[1], k)):
            return "all its projections run: alone they do not give the queries and keys that it attended with"
        return Split(heads, call["scale"])

    def _steps(
        self, wanted: Sequence[str], row: int | None, split: Split | str | None, modules: list[str]
    ) -> list[Step]:
        trace, last, steps = self.recorder.trace, wanted[-1], list[Step]()
        order = self._order(modules)
        reasons = unintercepted(self.interceptor, trace) if self.interceptor.wanted is None else {}
        stop = order.index(last)
        for i, name in enumerate(order):
            if name in reasons:
                steps.append(Step(name, "nothing" if i > stop else "its own attention", "-", 0, reasons[name]))
            elif i > stop:
                steps.append(Step(name, "nothing", "-", 0, f"the method reads no layer after {last}"))
            elif name not in wanted:
                steps.append(Step(name, "its own attention", "-", 0, "the method does not read it"))
            else:
                record, why = trace.kept(name), ""
                runs, keeps = "attention with its map", self._description(name, record)
                windows = trace.windows(name)
                images = record.shape[0] // (1 if windows is None else windows.count)
                nbytes = record.nbytes // max(1, images)
                if name == last:
                    alone = isinstance(split, Split)
                    runs = f"keys, and the query of row {row}" if alone else "projections and its map"
                    why = split if isinstance(split, str) else ""
                if name == last and row is not None and trace.rows is None:
                    keeps, nbytes = f"row {row}", 4 * record.shape[-1]
                steps.append(Step(name, runs, keeps, nbytes, why))
        return steps

    def _order(self, modules: list[str]) -> list[str]:
        """All attention layers in the order of their calls; others are placed by their position in the model."""
        trace = self.recorder.trace
        order = list(trace)
        for name in attention_layers(self.model):
            if name not in trace:
                before = [
                    i for i, other in enumerate(order) if modules.index(other.partition("#")[0]) < modules.index(name)
                ]
                order.insert(before[-1] + 1 if before else 0, name)
        return order

    def _description(self, name: str, record: LayerRecord) -> str:
        """The stored part of a layer, in words."""
        if self.recorder.trace.rows is not None:
            return "row " + ", ".join(map(str, self.recorder.trace.rows))
        if isinstance(record, QKRecord):
            return "q, k"
        # A layer that computes its softmax itself has no q and k.
        call = self.calls.get(name)
        smaller = call is not None and call["nbytes"] < record.nbytes and self.recorder.trace.heads == "mean"
        later = " (q, k for large batches)" if self.recorder.keep == "auto" and smaller else ""
        windows = self.recorder.trace.windows(name)
        many = "map" if windows is None else f"{windows.count} maps"
        return f"{many} {list(record.shape[1:])}{later}" if isinstance(record, MapRecord) else "rows"


def _close(a: Tensor, b: Tensor) -> bool:
    """True if the tensors are equal up to the rounding of another order of summation."""
    if a.shape != b.shape or a.dtype != b.dtype or not a.numel():
        return False
    allowed = max(1e-5, 2 * torch.finfo(a.dtype).eps) * float(b.float().abs().max())
    return float((a.float() - b.float()).abs().max()) <= allowed
