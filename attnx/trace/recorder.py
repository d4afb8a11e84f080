"""Computes the attention calls of a forward pass and stores a record of each."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from attnx.ops.checks import in_range, row_indices
from attnx.ops.functional import attention_map
from attnx.ops.known_calls import known, signature
from attnx.ops.reducers import MASK_THRESHOLD, Reduction, fuse_heads
from attnx.trace.attend import attend, attend_with_stats, check_keep, is_small, without_map
from attnx.trace.attention_call import Call
from attnx.trace.facts import Facts
from attnx.trace.gradient_record import attend_with_gradient, weigh_weights
from attnx.trace.layout import TokenLayout
from attnx.trace.qk_record import qk_bytes
from attnx.trace.records import LayerRecord, MapRecord, RowsRecord
from attnx.trace.row_stats import Wanted, check_stats, wanted_of
from attnx.trace.trace import CALLS, Trace


class StopForward(Exception):  # noqa: N818  (not an error: it ends a forward pass early)
    """Ends a forward pass after everything requested was recorded."""


class Recorder:
    """The options of a capture, and the trace of the model's passes.

    Attributes:
        stop_after: the layer after which the forward pass stops: `StopForward` is raised in place of its output.
        stop_row: the only query row that is recorded of that layer; None: the same rows as in the other layers.
        attended: if a dict, the arguments of each layer's attention are stored in it: bias, is_causal, scale, backend,
            nbytes (of the record with keep="qk"), and q and k of the last layer.
        calls: "last", "all" or "mean", see `attnx.capture`.

    Args:
        model, heads, rows, keep, layout, backend: as in `attnx.capture`.
        internal: True if only this package reads the maps. Then their rows can be assumed to sum to 1.
        grad, calls, stats: as in `attnx.capture`.

    Raises:
        ValueError: an unknown `keep`, `heads`, `grad` or `calls`, rows that are not integers, or no TokenLayout.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: str,
        rows: int | Sequence[int] | None,
        keep: str,
        layout: TokenLayout | None,
        backend: str,
        internal: bool = False,
        grad: bool | str = False,
        calls: str = "last",
        stats: Sequence[str] = (),
    ) -> None:
        Reduction.parse(heads)
        if calls not in CALLS:
            raise ValueError(f"calls: expected one of {', '.join(CALLS)}; got {calls!r}")
        if calls == "mean" and (grad or keep != "map"):
            raise ValueError(
                "calls: expected 'last' or 'all' with grad or keep='qk' or 'auto', which store no maps; got 'mean'"
            )
        if calls == "mean" and stats:
            raise ValueError("calls: expected 'last' or 'all' with stats, of which no mean is stored; got 'mean'")
        if grad not in (False, True, "signed"):
            raise ValueError(f"grad: expected False, True or 'signed'; got {grad!r}")
        if grad and keep == "qk":
            raise ValueError("keep: expected 'map' with grad, whose maps are computed in the backward pass; got 'qk'")
        if layout is not None and not isinstance(layout, TokenLayout):
            raise ValueError(f"layout: expected a TokenLayout; got {layout!r}")
        self.trace = Trace(model, heads, None if rows is None else row_indices(rows), layout, calls)
        self.calls = calls
        self.stats = check_stats(stats, grad)
        self.keep = check_keep(keep, self.stats)
        self.backend = backend
        self.stop_after: str | None = None
        self.stop_row: int | None = None
        self.internal = internal
        self.grad = grad
        self.attended: dict[str, dict[str, Any]] | None = None
        self._whole_maps = not grad and not stats and rows is None and self.keep in ("map", "auto")
        self._rows: dict[tuple[Any, ...], Tensor] = {}
        # {id of a mask: (mask, version, True if it masks whole rows)}
        self._masks_rows: dict[int, tuple[ref[Tensor], int, bool]] = {}

    def clear(self) -> None:
        """Drop all passes."""
        self.trace.clear()
        self._masks_rows.clear()

    def begin_call(self, finished: bool) -> None:
        """Start a new pass; `finished`: True if the last pass finished."""
        self.trace.begin_call(finished)
        self._masks_rows.clear()

    def key(self, layer: str) -> str:
        """Name of the layer in the trace: numbered if it attended before in the same pass."""
        if layer not in self.trace:
            return layer
        return f"{layer}#{sum(name.partition('#')[0] == layer for name in self.trace) + 1}"

    def answer(self, layer: str, call: Call, alone: bool, facts: Facts | None = None) -> Tensor:
        """Output of the layer's attention; stores the record of the call.

        Args:
            layer: name in the trace.
            call: the attention call.
            alone: True if no other capture intercepts the call, so the model's own attention need not run.
            facts: facts about the sides of the map, unless stored before.

        Raises:
            ValueError, NotImplementedError: as in `attnx.attention`, with the layer's name; dropout that is active.
            StopForward: this was the last layer that is wanted.
        """
        if call.dropout:
            raise ValueError(f"{layer}: expected dropout_p = 0; got {call.dropout}; call model.eval()")
        q, k, v = call.q, call.k, call.v
        if not q.shape[0] == k.shape[0] == v.shape[0]:
            batch = torch.broadcast_shapes(q.shape[:1], k.shape[:1], v.shape[:1])[0]
            q, k, v = (t.expand(batch, -1, -1, -1) for t in (q, k, v))
        if facts is not None:
            self.trace.tokens.note(layer, facts)
        own = call.ours or not alone or layer == self.stop_after
        if self._whole_maps and self.attended is None and not own:
            out = self._answer_again(layer, q, k, v, call)
            if out is not None:
                return call.unfold(out)
        given: dict[str, Any] = dict(bias=call.bias, backend=self.backend, **call.scores)
        if self.attended is not None:
            # Only q and k of the last layer are kept: they are views that keep a whole qkv alive.
            for earlier in self.attended.values():
                earlier.pop("q", None), earlier.pop("k", None)
            self.attended[layer] = dict(given, q=q, k=k, nbytes=qk_bytes(q, k, call.bias))
        if layer == self.stop_after and self.stop_row is not None:
            self.keep_row(layer, q, k, q.shape[2], rows=self._index((self.stop_row,), q), **given)
        try:
            rows = None if self.trace.rows is None else self._index(self.trace.rows, q)
            options = dict(heads=self.trace.heads, rows=rows, **given)
            wanted = self._wanted(layer, (q.shape[0], q.shape[2], k.shape[2]), q.device) if self.stats else None
            if self.grad:
                stats = attend_with_stats(q, k, v, "stats", wanted, output=False, **options)[2] if wanted else None
                answer, weighted = attend_with_gradient(
                    call.output, call.fold, q, k, v, clamp=self.grad != "signed", keep=self.keep, stats=stats, **options
                )
                self.trace.add(layer, weighted, q.shape[2], stats)
                return answer
            use_kernel = not own and not self._needs_own_output(q, k, v, call.bias)
            record: LayerRecord
            if wanted:
                out, record, stats = attend_with_stats(q, k, v, self.keep, wanted, output=use_kernel, **options)
            else:
                (out, record), stats = attend(q, k, v, self.keep, output=use_kernel, **options), None
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        if isinstance(record, MapRecord) and not self.internal:
            record = MapRecord(record.amap)  # users may write to the map, so its rows need not sum to 1
        self.trace.add(layer, record, q.shape[2], stats)
        if layer == self.stop_after:
            raise StopForward
        if out is None:
            return call.output()
        return call.unfold(out)

    def _answer_again(self, layer: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        """Output of a call without a bias that was checked before and whose map is stored; None for other calls."""
        if call.bias is not None or not (self.keep == "map" or is_small(q, k)):
            return None
        scores = call.scores
        key = signature(q, k, v, None, scores["is_causal"], scores["scale"], None, self.trace.heads, self.backend)
        checked = known(key)
        if checked is None or checked.prepared is None:
            return None
        out, amap = checked.prepared(q, k, v, None)
        self.trace.add(layer, MapRecord(amap, self.internal and self.trace.heads == "mean"), q.shape[2])
        return out

    def answer_weights(
        self, layer: str, p: Tensor, weights: Tensor, fold: Callable[[Tensor], Tensor], facts: Facts | None
    ) -> None:
        """Store the record of a layer that computed its weights itself.

        Args:
            layer: name in the trace.
            p: [B, H, M, N], the weights.
            weights: the same in the model's shape, with their graph if gradients are enabled.
            fold: turns tensors of the model's shape into [B, H, M, N].
            facts: facts about the sides of the map.

        Raises:
            NotImplementedError: keep="qk".
            ValueError: rows out of range.
            StopForward: this was the last layer that is wanted.
        """
        if self.keep == "qk":
            raise NotImplementedError(
                f"{layer}: expected keep='map' or 'auto', since it computes its softmax itself; got keep='qk'"
            )
        if facts is not None:
            self.trace.tokens.note(layer, facts)
        alone = self.stop_row is not None and layer == self.stop_after and self.trace.rows is None
        chosen = in_range((self.stop_row or 0,), p.shape[2]) if alone else self.trace.rows
        record: LayerRecord
        wanted = self._wanted(layer, (len(p), *p.shape[2:]), p.device) if self.stats else None
        try:
            rows = None if chosen is None else self._index(chosen, p)
            stats = wanted.of_weights(p) if wanted else None
            if self.grad:
                clamp = self.grad != "signed"
                record = weigh_weights(weights, fold, rows, self._fused, clamp, self.keep, stats)
            elif self.keep == "stats":
                record = without_map(p[..., :0], p[:, :, 0, :, None])
            else:
                amap = self._fused(p if rows is None else p[..., rows, :])
                record = RowsRecord(amap, chosen or (), p.shape[2]) if alone else MapRecord(amap)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        self.trace.add(layer, record, p.shape[2], stats)
        if layer == self.stop_after:
            raise StopForward

    def _wanted(self, layer: str, shape: Sequence[int], device: torch.device) -> Wanted:
        """The request for the statistics of a layer with maps of this shape, [items, M, N]."""
        tokens, layers = self.trace.tokens, [*self.trace, layer]
        sides = tokens.sides(layer, (shape[0], shape[1], shape[2]), layers)
        each = tokens.grids_of_items(layer, sides[1], layers)
        return wanted_of(self.stats, layer, sides, tokens.windows(layer), device, each, tokens.places)

    def _fused(self, p: Tensor) -> Tensor:
        """[B, H, M, N] weights with their heads fused, in a tensor of its own: float32."""
        kind = Reduction.parse(self.trace.heads)
        if kind is Reduction.MEAN:
            return p.mean(1, dtype=torch.float32)
        fused = fuse_heads(p, kind).float()
        return fused.clone() if kind is Reduction.EACH and fused.dtype == p.dtype else fused

    def _needs_own_output(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
        """True if the output must come from the model's own attention instead of the kernel that computes the map.

        This is the case if a graph is recorded, so that gradients are the model's own and checkpointing computes the
        same values again; and if finite numbers mask a whole row, to which SDPA still assigns weights.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias) if t is not None):
            return True
        if bias is None or bias.dtype == torch.bool or not bias.numel():
            return False
        if bias.device.type != "cpu" and (bias.dim() == 4 and bias.shape[1] > 1):
            return False  # usually relative positions, one bias per layer: checking each would wait for the GPU
        version = 0 if bias.is_inference() else bias._version
        known = self._masks_rows.get(id(bias))
        if known is None or known[0]() is not bias or known[1] != version:
            if bias.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            top = bias.detach().amax(-1)
            masks_rows = bool(((top < MASK_THRESHOLD) & (top > -torch.inf)).any())
            known = self._masks_rows[id(bias)] = ref(bias), version, masks_rows
        return known[2]

    def keep_row(self, layer: str, q: Tensor, k: Tensor, queries: int, **call: Any) -> None:
        """Store the map of the only requested row of the last layer, and stop the forward pass.

        Args:
            layer: name in the trace.
            q: [B, H, M, D]; `rows` selects the requested rows.
            k, call: as in `attnx.attention_map`.
            queries: number of queries of the layer.

        Raises:
            StopForward: always.
        """
        try:
            amap = attention_map(q, k, heads=self.trace.heads, **call)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        whole = self.trace.rows is None  # otherwise the trace holds only this row in any case
        row = in_range((self.stop_row or 0,), queries)
        self.trace.add(layer, RowsRecord(amap, row, queries) if whole else amap, queries)
        raise StopForward

    def _index(self, rows: tuple[int, ...], q: Tensor) -> Tensor:
        """The chosen rows as a tensor on q's device, not negative; copied to the device only once."""
        key = (in_range(rows, q.shape[2]), q.device)
        if key not in self._rows:
            self._rows[key] = torch.tensor(key[0], dtype=torch.int64, device=q.device)
        return self._rows[key]
