"""Answers the attention calls of a forward pass, and keeps of each what was asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from attnx.ops.functional import attention, attention_map, cast_as_sdpa
from attnx.ops.reducers import MASK_THRESHOLD, Reduction
from attnx.trace.adapters.huggingface import unpacked
from attnx.trace.gradient_record import attend_with_gradient
from attnx.trace.layout import TokenLayout
from attnx.trace.records import MapRecord, RowsRecord, attend, check_keep, qk_bytes
from attnx.trace.sides import Facts
from attnx.trace.trace import CALLS, Trace


@dataclass
class Call:
    """One attention call of a model: its scores, and what gives the output that the model would have.

    Attributes:
        q, k, v, bias: as in `attnx.attention`; with one row a query, whatever the model packs into its rows.
        dropout: of the weights.
        scores: the arguments of `attnx.attention` that say more of the scores: is_causal, scale; softcap and sinks of a
            model that calls it.
        own: runs the model's own attention.
        shape: of the output's leading dimensions, as the model wants it.
        ours: whether the model called `attnx.attention`, which gives a map beside the output.
        found: what the model's own attention gave.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dropout: float
    scores: dict[str, Any]
    own: Callable[[], Any]
    shape: tuple[int, ...]
    ours: bool = False
    found: Any = field(default=None)

    @classmethod
    def of(cls, func: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "Call":
        """The call of `F.scaled_dot_product_attention`, or of `attnx.attention`, with these arguments."""
        if func is attention:
            q, k, v, *_ = args
            names = ("is_causal", "scale", "softcap", "sinks")
            scores = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            return cls(q, k, v, kwargs.get("bias"), 0.0, scores, lambda: func(*args, **kwargs), q.shape[:3], True)
        return cls._of_sdpa(func, module, *args, **kwargs)

    @classmethod
    def _of_sdpa(
        cls,
        func: Callable[..., Tensor],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Call":
        def own() -> Tensor:
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        q, bias = query, attn_mask
        if query.dim() == 4:
            q, bias = unpacked(module, query, key, attn_mask) or (query, attn_mask)
        scores: dict[str, Any] = dict(is_causal=is_causal, scale=scale)
        return cls(q, key, value, bias, dropout_p, scores, own, query.shape[:3])

    def output(self) -> Tensor:
        """The output of the model's own attention."""
        self.found = self.own()
        return self.found[0] if self.ours else self.found


class StopForward(Exception):  # noqa: N818  (no error: it leaves a model's forward where nothing more of it is wanted)
    """All that was asked for is recorded."""


class Recorder:
    """The options of a capture, and the trace of the model's passes.

    Attributes:
        stop_after: the last layer that is wanted. `StopForward` is raised in place of its output.
        stop_row: the only query row of it that is wanted; None: as in the other layers.
        attended: if a dict, it is given what every layer attended with: bias, is_causal, scale, backend, nbytes (of q,
            k and what else would be kept with them), and of the last one q and k.
        calls: "last", "all" or "mean", see `attnx.capture`.

    Args:
        model, heads, rows, keep, layout, backend: as in `attnx.capture`.
        internal: nobody but this package's methods is given the maps, so that nobody writes to them.
        grad: as in `attnx.capture`.
        calls: which passes are kept, as in `attnx.capture`.

    Raises:
        ValueError: an unknown `keep`, `heads` or `grad`, rows that are no integers.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: str,
        rows: Sequence[int] | None,
        keep: str,
        layout: TokenLayout | None,
        backend: str,
        internal: bool = False,
        grad: bool | str = False,
        calls: str = "last",
    ) -> None:
        Reduction.parse(heads)
        if calls not in CALLS:
            raise ValueError(f"calls: expected one of {', '.join(CALLS)}; got {calls!r}")
        if calls == "mean" and (grad or keep != "map"):
            raise ValueError("calls: expected 'last' or 'all' beside grad and keep='qk' or 'auto', which keep no maps")
        if grad not in (False, True, "signed"):
            raise ValueError(f"grad: expected False, True or 'signed'; got {grad!r}")
        if grad and keep == "qk":
            raise ValueError("keep: expected 'map' beside grad, whose maps come with the backward pass; got 'qk'")
        try:
            chosen = None if rows is None else tuple(index(row) for row in rows)
        except TypeError as error:
            raise ValueError(f"rows: expected a sequence of integers; got {rows!r}") from error
        self.trace = Trace(model, heads, chosen, layout, calls)
        self.calls = calls
        self.keep = check_keep(keep)
        self.backend = backend
        self.stop_after: str | None = None
        self.stop_row: int | None = None
        self.internal = internal
        self.grad = grad
        self.attended: dict[str, dict[str, Any]] | None = None
        self._rows: dict[tuple[Any, ...], Tensor] = {}
        self._hides: dict[int, tuple[ref[Tensor], int, bool]] = {}  # of masks: whether they hide whole rows

    def clear(self) -> None:
        """Forgets every pass."""
        self.trace.clear()
        self._hides.clear()

    def begin_call(self, finished: bool) -> None:
        """Another pass of the model begins; finished: whether the last one came to its end."""
        self.trace.begin_call(finished)
        self._hides.clear()

    def key(self, layer: str) -> str:
        """The layer's name, numbered when it attends again in the same pass."""
        again = sum(name.partition("#")[0] == layer for name in self.trace)
        return f"{layer}#{again + 1}" if again else layer

    def answer(self, layer: str, call: Call, alone: bool, facts: Facts | None = None) -> Tensor:
        """The output that the layer asked for; keeps what is wanted of the call.

        Args:
            layer: its name in the trace.
            alone: nobody else is to hear the call: the model's own attention need not be run.
            facts: what the call shows of the map's sides, if that is not known already.

        Raises:
            ValueError, NotImplementedError: as in `attnx.attention`, with the layer's name; dropout that is active.
            StopForward: this was the last layer that is wanted.
        """
        if call.dropout:
            raise ValueError(f"{layer}: expected dropout_p = 0; got {call.dropout}; call model.eval()")
        q, k, v = call.q, call.k, call.v
        if not len(q) == len(k) == len(v):
            batch = torch.broadcast_shapes(q.shape[:1], k.shape[:1], v.shape[:1])[0]
            q, k, v = (t.expand(batch, -1, -1, -1) for t in (q, k, v))
        given: dict[str, Any] = dict(bias=call.bias, backend=self.backend, **call.scores)
        if self.attended is not None:
            # q and k of one layer at a time: they are views of a qkv that would be kept whole.
            for earlier in self.attended.values():
                earlier.pop("q", None), earlier.pop("k", None)
            self.attended[layer] = dict(given, q=q, k=k, nbytes=qk_bytes(q, k, call.bias))
        if facts is not None:
            self.trace.note(layer, facts)
        if layer == self.stop_after and self.stop_row is not None:
            cast_q, cast_k = cast_as_sdpa(q, k)
            self.keep_row(layer, cast_q, cast_k, q.shape[2], rows=self._index((self.stop_row,), q), **given)
        try:
            rows = None if self.trace.rows is None else self._index(self.trace.rows, q)
            options = dict(heads=self.trace.heads, rows=rows, **given)
            if self.grad:
                answer, weighted = attend_with_gradient(call.output, q, k, v, clamp=self.grad != "signed", **options)
                self.trace.add(layer, weighted, q.shape[2])
                return answer
            ours = alone and not call.ours and layer != self.stop_after and not self._is_theirs(q, k, v, call.bias)
            out, kept = attend(q, k, v, self.keep, output=ours, **options)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        if isinstance(kept, MapRecord) and not self.internal:
            kept = MapRecord(kept.amap)  # who captured it may write to it: its rows need not sum to 1 for long
        self.trace.add(layer, kept, q.shape[2])
        if layer == self.stop_after:
            raise StopForward
        if out is None:
            return call.output()
        return out if out.shape[:3] == call.shape else out.reshape(len(out), *call.shape[1:], -1)

    def _is_theirs(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
        """True if the output must be that of the model's own attention, and not the kernel's that gives the map.

        Where a graph is recorded: gradients are the model's own, and checkpointing computes the same again. Where
        finite numbers mask a whole row, to which SDPA still gives weights.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias) if t is not None):
            return True
        if bias is None or bias.dtype == torch.bool or not bias.numel():
            return False
        if bias.device.type != "cpu" and (bias.dim() == 4 and bias.shape[1] > 1):
            return False  # one of every layer's own, as a rule of relative positions: a GPU is not waited for each time
        version = 0 if bias.is_inference() else bias._version
        known = self._hides.get(id(bias))
        if known is None or known[0]() is not bias or known[1] != version:
            if bias.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            top = bias.detach().amax(-1)
            hides = bool(((top < MASK_THRESHOLD) & (top > -torch.inf)).any())
            known = self._hides[id(bias)] = ref(bias), version, hides
        return known[2]

    def keep_row(self, layer: str, q: Tensor, k: Tensor, queries: int, **call: Any) -> None:
        """Keeps the last layer's only wanted row, and stops.

        Args:
            q: [B, H, M, D], of which `rows` are wanted; k, call: as in `attnx.attention_map`.
            queries: how many the layer has.

        Raises:
            StopForward: always.
        """
        try:
            amap = attention_map(q, k, heads=self.trace.heads, **call)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        whole = self.trace.rows is None  # else the trace is of this row anyway
        self.trace.add(layer, RowsRecord(amap, (self.stop_row or 0,), queries) if whole else amap, queries)
        raise StopForward

    def _index(self, rows: tuple[int, ...], q: Tensor) -> Tensor:
        """The chosen rows as a tensor on q's device, copied there once and not in every layer."""
        if not all(isinstance(row, int) and 0 <= row < q.shape[2] for row in rows):
            raise ValueError(f"rows: expected integers in 0..{q.shape[2] - 1}; got {list(rows)}")
        key = (rows, q.device)
        if key not in self._rows:
            self._rows[key] = torch.tensor(rows, dtype=torch.int64, device=q.device)
        return self._rows[key]
