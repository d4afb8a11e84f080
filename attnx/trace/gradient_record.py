"""What a capture with `grad` keeps of a layer: what its gradient-weighted map is made of, once the gradient comes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnx.ops.functional import cast_as_sdpa, gradient_map
from attnx.ops.reducers import Reduction
from attnx.trace.adapters.checkpointing import is_checkpointed
from attnx.trace.records import MapRecord, no_autocast


@dataclass(eq=False)
class GradientRecord:
    """A layer whose map is weighted by its own gradient, see `attnx.gradient_map`: there is none until a backward pass.

    Every backward pass of the output `out` makes the map anew, from q, k, v and the gradient of the output. `call` are
    the other arguments of `gradient_map`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    call: dict[str, Any]
    amap: Tensor | None = None

    def weigh(self, grad: Tensor) -> None:
        """A hook on the output: the gradient has come."""
        with no_autocast(self.q):
            # transformers packs the heads of a group into rows.
            grad = grad.reshape(*self.q.shape[:3], -1)
            self.amap = gradient_map(grad, self.q, self.k, self.v, **self.call)

    @property
    def shape(self) -> tuple[int, ...]:
        (B, H, M, _), rows = self.q.shape, self.call["rows"]
        M = M if rows is None else len(rows)
        return (B, H, M, self.k.shape[2]) if self.call["heads"] == "each" else (B, M, self.k.shape[2])

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.q, self.k, self.v, self.amap) if t is not None)

    @property
    def rows_sum_to_one(self) -> bool:
        return False

    def map(self) -> Tensor:
        if self.amap is None:
            raise RuntimeError("no gradient has come to this layer: call trace.backward(a score), or its backward()")
        return self.amap

    def row(self, i: int) -> Tensor:
        return MapRecord(self.map()).row(i)

    def fused(self, heads: Reduction) -> MapRecord:
        return MapRecord(self.map()).fused(heads)

    def row_sums(self) -> Tensor:
        return MapRecord(self.map()).row_sums()

    def vecmat(self, r: Tensor) -> Tensor:
        return MapRecord(self.map()).vecmat(r)


def attend_with_gradient(
    sdpa: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, **call: Any
) -> tuple[Tensor, GradientRecord]:
    """SDPA's own output, and a map that comes with its gradient. Where nothing below asks for one, the graph begins.

    Raises:
        ValueError: gradients are off; the graph would begin inside of what gradient checkpointing runs again.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "grad: expected gradients to be on; they are off: leave torch.no_grad, torch.inference_mode, and "
            "torch.utils.checkpoint with use_reentrant=True"
        )
    out = sdpa()
    if not out.requires_grad:
        if is_checkpointed():
            raise ValueError(
                "grad: expected no torch.utils.checkpoint around layers whose input needs no gradient; turn gradient "
                "checkpointing off, or let the model's input or parameters require gradients"
            )
        out = out.detach().requires_grad_()
    q, k, v = (t.detach() for t in cast_as_sdpa(q, k, v))
    kept = GradientRecord(q, k, v, out, call)
    out.register_hook(kept.weigh)
    return out, kept
