"""Inputs of the modules that run in a pass, to find those that run side by side."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn

if TYPE_CHECKING:
    from attnx.trace.hooks import Frame

# Functions that write to a tensor, as residual connections may.
WRITES = frozenset({
    Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__, Tensor.mul_, Tensor.__imul__, Tensor.copy_,
    Tensor.__setitem__,
})  # fmt: skip

State = tuple[ref[Tensor], int]
"""A tensor, and how often it was changed in place."""


def is_norm(module: nn.Module) -> bool:
    """True if the class name says that a module without parts is a norm."""
    return "Norm" in type(module).__name__ and next(module.children(), None) is None


class Inputs:
    """The main inputs of the modules of one pass, where a norm's output stands for the norm's input.

    Two siblings with the same input run side by side, as the attention layers in ``x + a(norm1(x)) + b(norm2(x))``.
    """

    def __init__(self) -> None:
        self._children: dict[str, dict[str, State]] = {}  # {module: {child: its input}}
        self._normed: dict[int, tuple[ref[Tensor], State]] = {}  # {id of a norm's output: the output, the norm's input}
        self._writes: dict[int, int] = {}  # {id of an inference tensor: how often it was changed}

    def clear(self) -> None:
        """Begin a new pass."""
        self._children.clear()
        self._normed.clear()
        self._writes.clear()

    def note_norm(self, arguments: Iterable[Any], output: Any) -> None:
        """Store the input of a norm that has run, if it is the only one."""
        inputs = [value for value in arguments if isinstance(value, Tensor)]
        if len(inputs) == 1 and isinstance(output, Tensor) and output.shape == inputs[0].shape:
            self._normed[id(output)] = ref(output), self._state(inputs[0])

    def note_write(self, x: Any) -> None:
        """Store that a tensor was changed in place. Inference tensors do not count their changes themselves."""
        if isinstance(x, Tensor) and x.is_inference():
            self._writes[id(x)] = self._writes.get(id(x), 0) + 1

    def shared(self, frames: Sequence["Frame"]) -> list[tuple[str, str]]:
        """Pairs of names: a running module, and an earlier sibling that had the same input."""
        pairs = []
        for outer, frame in pairwise(frames):
            x = frame.main_input()
            if x is None:
                continue
            source, version = self._state(x)
            others = self._children.setdefault(outer.name, {})
            for other, earlier in others.items():
                if other != frame.name and earlier[0]() is source() and earlier[1] == version:
                    pairs.append((other, frame.name))
            others[frame.name] = source, version
        return pairs

    def _state(self, x: Tensor) -> State:
        output, state = self._normed.get(id(x), (None, None))
        if output is not None and state is not None and output() is x and state[0]() is not None:
            return state
        return ref(x), self._writes.get(id(x), 0) if x.is_inference() else x._version
