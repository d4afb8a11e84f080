"""Record of a layer captured with `grad`: its gradient-weighted map is computed in the backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnx.ops.checks import cast_as_sdpa
from attnx.ops.functional import gradient_map
from attnx.ops.reducers import Reduction
from attnx.ops.row_importance import row_importance
from attnx.trace.adapters.checkpointing import is_checkpointed
from attnx.trace.records import NO_MAP, LayerRecord, MapRecord, no_autocast
from attnx.trace.row_stats import RowStats


@dataclass(eq=False)
class GradientRecord:
    """A layer whose map is weighted by its own gradient, see `attnx.gradient_map`.

    Each backward pass through `out` computes the map from the gradient of `out`. Before the first one there is no map.

    Attributes:
        shape: shape of the map.
        held: the detached tensors from which `weigh` computes the map.
        weigh: gradient of `out` -> the map; None: no map is computed any more, or none at all.
        out: output of the attention, or its weights, with its graph; None once the graph was freed.
        amap: the map; None before the first backward pass.
        importance: gradient of `out` -> the importance of the rows, which is added to `stats`; None: not computed.
        stats: the statistics of the layer.
    """

    shape: tuple[int, ...]
    held: tuple[Tensor, ...]
    weigh: Callable[[Tensor], Tensor] | None
    out: Tensor | None
    amap: Tensor | None = None
    importance: Callable[[Tensor], Tensor] | None = None
    stats: RowStats | None = None

    @staticmethod
    def finished(amap: Tensor) -> "GradientRecord":
        """A record of a map that a backward pass has computed, without the tensors that it was computed from."""
        return GradientRecord(tuple(amap.shape), (), None, None, amap)

    def note(self, grad: Tensor) -> None:
        """Compute the map and the importance; a hook that autograd calls with the gradient of `out`."""
        with no_autocast(grad):
            if self.weigh is not None:
                self.amap = self.weigh(grad)
            if self.importance is not None and self.stats is not None:
                self.stats.add("importance", self.importance(grad))

    def set_importance(self, importance: Callable[[Tensor], Tensor], stats: RowStats | None) -> None:
        """Let the backward pass compute the importance of the rows, if `stats` expects it."""
        if stats is not None and "importance" in stats.missing:
            self.importance, self.stats = importance, stats

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return next(t for t in (*self.held, self.amap) if t is not None).device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in (*self.held, self.amap) if t is not None)

    @property
    def rows_sum_to_one(self) -> bool:
        """False: the rows are weighted by gradients."""
        return False

    @property
    def has_no_map(self) -> bool:
        """True if no map is stored: keep="stats"."""
        return self.weigh is None and self.amap is None

    def map(self) -> Tensor:
        """The map. Raises RuntimeError before the backward pass, or if none is stored."""
        if self.has_no_map:
            raise RuntimeError(NO_MAP)
        if self.amap is None:
            raise RuntimeError("no gradient reached this layer: call trace.backward(score) or score.backward()")
        return self.amap

    def row(self, i: int) -> Tensor:
        """Row `i` of the map."""
        return MapRecord(self.map()).row(i)

    def column(self, i: int) -> Tensor:
        """Column `i` of the map."""
        return self.map()[..., i]

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
    sdpa: Callable[[], Tensor],
    fold: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: str,
    rows: Tensor | None,
    clamp: bool,
    keep: str,
    stats: RowStats | None,
    **call: Any,
) -> tuple[Tensor, GradientRecord]:
    """Output of SDPA, and a record whose map is computed in the backward pass.

    If nothing below the layer requires a gradient, the graph starts at this output.

    Args:
        sdpa: computes the output.
        fold: turns a gradient of the output into [B, H, M, Dv].
        q, k, v, heads, rows, clamp, call: as in `attnx.gradient_map`.
        keep: "stats": no map is computed.
        stats: receives the importance of the rows, if that was requested.

    Raises:
        ValueError: as `starts_graph`.
    """
    _check_enabled()
    out = starts_graph(sdpa())
    q, k, v = (t.detach() for t in cast_as_sdpa(q, k, v))
    (B, H, M, _), N = q.shape, k.shape[2]
    M = M if rows is None else len(rows)
    shape = (B, H, M, N) if heads == "each" else (B, M, N)

    def weigh(grad: Tensor) -> Tensor:
        return gradient_map(fold(grad), q, k, v, heads=heads, rows=rows, clamp=clamp, **call)

    def importance(grad: Tensor) -> Tensor:
        return row_importance(fold(grad), q, k, v, **call)

    record = GradientRecord(shape, (q, k, v), None if keep == "stats" else weigh, out)
    record.set_importance(importance, stats)
    out.register_hook(record.note)
    return out, record


def weigh_weights(
    weights: Tensor,
    fold: Callable[[Tensor], Tensor],
    rows: Tensor | None,
    fuse: Callable[[Tensor], Tensor],
    clamp: bool,
    keep: str,
    stats: RowStats | None,
) -> GradientRecord:
    """A record of weights that the model computed itself: dP P with the heads fused, computed in the backward pass.

    Args:
        weights: the weights with their graph.
        fold: turns weights, or their gradient, into [B, H, M, N].
        rows: indices of the queries; None: all.
        fuse: fuses the heads of a detached [B, H, M, N].
        clamp: set negative products to 0.
        keep, stats: as in `attend_with_gradient`.

    Raises:
        ValueError: gradients are off.
    """
    _check_enabled()
    whole = fold(weights.detach())
    p = whole if rows is None else whole[..., rows, :]

    def weigh(grad: Tensor) -> Tensor:
        dp = fold(grad)
        weighted = (dp if rows is None else dp[..., rows, :]).float() * p.float()
        return fuse(weighted.clamp(min=0) if clamp else weighted)

    def importance(grad: Tensor) -> Tensor:
        return (fold(grad).float() * whole.float()).abs().sum(-1)

    record = GradientRecord(tuple(fuse(p.to("meta")).shape), (p,), None if keep == "stats" else weigh, weights)
    record.set_importance(importance, stats)
    # register_hook of a view that was written to crashes torch 2.14 unless its grad_fn was read before.
    _ = weights.grad_fn
    weights.register_hook(record.note)
    return record


def starts_graph(out: Tensor) -> Tensor:
    """The tensor if it has a graph, else a copy without one that requires a gradient.

    Raises:
        ValueError: gradients are off, or the graph would start inside a checkpointed function.
    """
    _check_enabled()
    if out.requires_grad:
        return out
    if is_checkpointed():
        raise ValueError(
            "grad: expected no torch.utils.checkpoint around layers whose input needs no gradient; switch gradient "
            "checkpointing off, or let the model's input or parameters require gradients"
        )
    return out.detach().requires_grad_()


def _check_enabled() -> None:
    if not torch.is_grad_enabled():
        raise ValueError(
            "grad: expected gradients to be enabled; got them disabled: leave torch.no_grad, torch.inference_mode, and "
            "torch.utils.checkpoint with use_reentrant=True"
        )


def backward(records: Sequence[LayerRecord], score: Tensor, retain_graph: bool) -> None:
    """See `Trace.backward`; the hooks on the outputs of the records compute the maps.

    Raises:
        ValueError: no record holds a graph, or the score is not one number that depends on a captured layer.
    """
    weighted = [record for record in records if isinstance(record, GradientRecord)]
    outs = [record.out for record in weighted if record.out is not None]
    if not records:
        raise ValueError(
            "backward: no attention was captured: the model was not called inside the capture, or it "
            "computes no attention that can be intercepted"
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
