"""Record of a layer captured with `grad`: its gradient-weighted map is computed in the backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnx.ops.checks import cast_as_sdpa
from attnx.ops.functional import gradient_map
from attnx.ops.reducers import Reduction
from attnx.trace.adapters.checkpointing import is_checkpointed
from attnx.trace.records import LayerRecord, MapRecord, no_autocast


@dataclass(eq=False)
class GradientRecord:
    """A layer whose map is weighted by its own gradient, see `attnx.gradient_map`.

    Each backward pass through the output `out` computes the map from q, k, v and the gradient of `out`. Before the
    first one there is no map.

    Attributes:
        q, k, v: detached inputs of the attention, as in `attnx.attention`.
        out: output of the attention, with its graph; None once the graph was freed.
        call: the other arguments of `gradient_map`.
        amap: the map; None before the first backward pass.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    call: dict[str, Any]
    amap: Tensor | None = None

    def weigh(self, grad: Tensor) -> None:
        """Compute the map; a hook that autograd calls with the gradient of the output."""
        with no_autocast(self.q):
            # transformers packs the heads of a group into rows of the output.
            grad = grad.reshape(*self.q.shape[:3], -1)
            self.amap = gradient_map(grad, self.q, self.k, self.v, **self.call)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map."""
        (B, H, M, _), rows = self.q.shape, self.call["rows"]
        M = M if rows is None else len(rows)
        return (B, H, M, self.k.shape[2]) if self.call["heads"] == "each" else (B, M, self.k.shape[2])

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return self.q.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in (self.q, self.k, self.v, self.amap) if t is not None)

    @property
    def rows_sum_to_one(self) -> bool:
        """False: the rows are weighted by gradients."""
        return False

    def map(self) -> Tensor:
        """The map. Raises RuntimeError before the backward pass."""
        if self.amap is None:
            raise RuntimeError("no gradient reached this layer: call trace.backward(score) or score.backward()")
        return self.amap

    def row(self, i: int) -> Tensor:
        """Row `i` of the map."""
        return MapRecord(self.map()).row(i)

    def fused(self, heads: Reduction) -> MapRecord:
        """A `MapRecord` with the heads fused."""
        return MapRecord(self.map()).fused(heads)

    def row_sums(self) -> Tensor:
        """Row sums of the map: [B, M]."""
        return MapRecord(self.map()).row_sums()

    def vecmat(self, r: Tensor) -> Tensor:
        """Row vectors times the map: [B, R, M] -> [B, R, N]."""
        return MapRecord(self.map()).vecmat(r)


def attend_with_gradient(
    sdpa: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, **call: Any
) -> tuple[Tensor, GradientRecord]:
    """Output of SDPA, and a record whose map is computed in the backward pass.

    If nothing below the layer requires a gradient, the graph starts at this output.

    Raises:
        ValueError: gradients are off, or the graph would start inside a checkpointed function.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "grad: expected gradients to be enabled; got them disabled: leave torch.no_grad, torch.inference_mode, and "
            "torch.utils.checkpoint with use_reentrant=True"
        )
    out = sdpa()
    if not out.requires_grad:
        if is_checkpointed():
            raise ValueError(
                "grad: expected no torch.utils.checkpoint around layers whose input needs no gradient; switch gradient "
                "checkpointing off, or let the model's input or parameters require gradients"
            )
        out = out.detach().requires_grad_()
    q, k, v = (t.detach() for t in cast_as_sdpa(q, k, v))
    record = GradientRecord(q, k, v, out, call)
    out.register_hook(record.weigh)
    return out, record


def backward(records: Sequence[LayerRecord], score: Tensor, retain_graph: bool) -> None:
    """See `Trace.backward`; the hooks on the outputs of the records compute the maps.

    Raises:
        ValueError: no record holds a graph, or the score is not one number that depends on a captured layer.
    """
    weighted = [record for record in records if isinstance(record, GradientRecord)]
    outs = [record.out for record in weighted if record.out is not None]
    if not records:
        raise ValueError(
            "backward: no attention was captured: the model was not called inside the capture, or it calls neither "
            "F.scaled_dot_product_attention nor nn.MultiheadAttention"
        )
    if not outs:
        raise ValueError("backward: expected a capture with grad=True and a graph that was not freed; got none")
    if not score.requires_grad or score.numel() != 1:
        raise ValueError(
            f"score: expected one number that depends on the captured layers; got {list(score.shape)}"
            + ("" if score.requires_grad else ", which needs no gradient")
        )
    grads = torch.autograd.grad(score, outs, retain_graph=retain_graph, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError("score: expected one that depends on a captured layer; got one that depends on none")
    if not retain_graph:
        for record in weighted:
            record.out = None
