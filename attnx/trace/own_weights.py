"""The weights that a block computed itself, and the tensors that it makes of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

# Functions whose result stands for their argument: dropout, other dtypes, copies.
COPIES = frozenset({
    F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.type, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.contiguous, Tensor.clone, torch.clone,
})  # fmt: skip


class Form(NamedTuple):
    """A tensor that a block made of its weights.

    Attributes:
        tensor: the tensor.
        unchanged: True for the weights themselves, or some of them; False if the block changed them.
        axes: its dimensions of the queries and the keys, counted from the end.
    """

    tensor: ref[Tensor]
    unchanged: bool = True
    axes: tuple[int, int] = (-2, -1)

    def straight(self, t: Tensor) -> Tensor:
        """A view [..., M, N] of a tensor with these axes."""
        return t.movedim(self.axes, (-2, -1))


class Weights:
    """The result of a softmax over the keys, and what the block makes of it."""

    __slots__ = ("forms", "p")

    def __init__(self, p: Tensor) -> None:
        self.p = p
        self.forms = {id(p): Form(ref(p))}

    def form(self, t: Tensor) -> Form | None:
        """The form that a tensor is; None if it was not made of the weights."""
        form = self.forms.get(id(t))
        return form if form is not None and form.tensor() is t else None

    def has_size(self, t: Tensor) -> bool:
        """True if a tensor [..., M, N] has the size of the weights, or of these without one column of sinks."""
        *leading, M, N = self.p.shape
        whole = t.numel() == self.p.numel() and t.shape[-2:] == (M, N)
        return whole or t.shape == (*leading, M, N - 1)

    def add_forms(self, func: Callable[..., Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Store the tensors that a function made of the weights, or of what the block made of them."""
        name = getattr(func, "__name__", "")
        if func in COPIES:
            operands = operands[:1]
        elif func is Tensor.__setitem__:
            results = operands[:1]
        source = next((form for t in operands if (form := self.form(t))), None)
        before = None if source is None else source.tensor()
        if source is None or before is None or name.endswith("_like") or name.startswith("new_"):
            return
        for result in results:
            if self.form(result) is not None:
                if func not in COPIES:
                    self._note_write(result)
                continue
            view = _is_view(result, before)
            if view or result.numel() in (before.numel(), self.p.numel()):
                unchanged = source.unchanged and (view or func in COPIES)
                self.forms[id(result)] = Form(ref(result), unchanged, _axes(result, before, source.axes, view))

    def _note_write(self, written: Tensor) -> None:
        """Mark the forms that differ from the weights after a tensor was written to: its views, or all copies."""
        memory = _memory(written)
        shares = {key for key, form in self.forms.items() if memory and _memory(form.tensor()) == memory}
        shares.add(id(written))
        changed = self.forms.keys() - shares if id(self.p) in shares else shares
        for key in changed:
            self.forms[key] = self.forms[key]._replace(unchanged=False)


def _axes(result: Tensor, source: Tensor, axes: tuple[int, int], view: bool) -> tuple[int, int]:
    """Dimensions of the queries and the keys of a tensor that was made of one with these axes."""
    if not view or result.dim() < 2:
        return axes if result.shape == source.shape else (-2, -1)
    found = []
    for axis in axes:
        fits = [
            i
            for i in range(-result.dim(), 0)
            if (result.shape[i], result.stride(i)) == (source.shape[axis], source.stride(axis))
        ]
        found.append(axis if axis in fits or not fits else fits[-1])
    return found[0], found[1]


def _memory(t: Tensor | None) -> int:
    """Address of the memory that a tensor shares with its views; 0 if it has none."""
    try:
        return 0 if t is None else t.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def _is_view(result: Tensor, source: Tensor) -> bool:
    """True if both start at the same place of memory; False for tensors without memory of their own."""
    try:
        return result.data_ptr() == source.data_ptr() != 0
    except RuntimeError:
        return False
