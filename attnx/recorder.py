"""Answers the attention calls of a forward pass, and keeps of each what was asked for."""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from attnx.kept import KeptMap, KeptRows, attend, check_keep, qk_bytes
from attnx.layout import TokenLayout
from attnx.ops import attention_map, cast_as_sdpa
from attnx.reducers import Heads
from attnx.trace import Trace
from attnx.weighted import attend_with_gradient


class Stop(Exception):  # noqa: N818  (no error: it leaves a model's forward where nothing more of it is wanted)
    """All that was asked for is recorded."""


class Recorder:
    """What is asked of every layer of one model, and the trace of its last pass.

    Attributes:
        last: the layer after which nothing is wanted: its output is not computed, and `Stop` is raised in its place.
        last_row: the only query row of it that is wanted; None: as in the other layers.
        calls: if a dict, it is given what every layer attended with: bias, is_causal, scale, backend, nbytes (of q, k
            and what else would be kept with them), and of the last one q and k.

    Args:
        model, heads, rows, keep, layout, backend: as in `attnx.capture`.
        private: nobody but this package's methods is given the maps, so that nobody writes to them.
        grad: as in `attnx.capture`.

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
        private: bool = False,
        grad: bool | str = False,
    ) -> None:
        Heads.parse(heads)
        if grad not in (False, True, "signed"):
            raise ValueError(f"grad: expected False, True or 'signed'; got {grad!r}")
        if grad and keep == "qk":
            raise ValueError("keep: expected 'map' beside grad, whose maps come with the backward pass; got 'qk'")
        try:
            chosen = None if rows is None else tuple(index(row) for row in rows)
        except TypeError as error:
            raise ValueError(f"rows: expected a sequence of integers; got {rows!r}") from error
        self.trace = Trace(model, heads, chosen, layout)
        self.keep = check_keep(keep)
        self.backend = backend
        self.last: str | None = None
        self.last_row: int | None = None
        self.private = private
        self.grad = grad
        self.calls: dict[str, dict[str, Any]] | None = None
        self._rows: dict[tuple[Any, ...], Tensor] = {}

    def clear(self) -> None:
        """Forgets the last pass."""
        self.trace.clear()

    def key(self, layer: str) -> str:
        """The layer's name, numbered when it attends again in the same pass."""
        again = sum(name.partition("#")[0] == layer for name in self.trace)
        return f"{layer}#{again + 1}" if again else layer

    def answer(
        self,
        layer: str,
        sdpa: Callable[..., Tensor],
        alone: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What the layer asked `sdpa` for; keeps what is wanted of it.

        Args:
            layer: its name in the trace.
            sdpa: gives the output where somebody else is to hear the call, which is to say unless `alone`.

        Raises:
            ValueError, NotImplementedError: as in `attnx.attention`, with the layer's name; dropout that is active.
            Stop: this was the last layer that is wanted.
        """
        if dropout_p:
            raise ValueError(f"{layer}: expected dropout_p = 0; got {dropout_p}; call model.eval()")
        if query.dim() != 4:
            raise NotImplementedError(f"{layer}: expected q of [B, H, M, D]; got {list(query.shape)}; leave it out")
        q, k, v = query, key, value
        if not len(q) == len(k) == len(v):
            batch = torch.broadcast_shapes(q.shape[:1], k.shape[:1], v.shape[:1])[0]
            q, k, v = (t.expand(batch, -1, -1, -1) for t in (q, k, v))
        call: dict[str, Any] = dict(bias=attn_mask, is_causal=is_causal, scale=scale, backend=self.backend)

        def asked() -> Tensor:
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        if self.calls is not None:
            # q and k of one layer at a time: they are views of a qkv that would be kept whole.
            for earlier in self.calls.values():
                earlier.pop("q", None), earlier.pop("k", None)
            self.calls[layer] = dict(call, q=q, k=k, nbytes=qk_bytes(q, k, attn_mask))
        if layer == self.last and self.last_row is not None:
            self.keep_row(layer, *cast_as_sdpa(q, k), rows=self._index((self.last_row,), q), **call)
        try:
            rows = None if self.trace.rows is None else self._index(self.trace.rows, q)
            options = dict(heads=self.trace.heads, rows=rows, **call)
            if self.grad:
                answer, weighted = attend_with_gradient(asked, q, k, v, clamp=self.grad != "signed", **options)
                self.trace.add(layer, weighted)
                return answer
            out, kept = attend(q, k, v, self.keep, output=alone and layer != self.last, **options)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        if isinstance(kept, KeptMap) and not self.private:
            kept = KeptMap(kept.amap)  # who captured it may write to it: its rows need not sum to 1 for long
        self.trace.add(layer, kept)
        if layer == self.last:
            raise Stop
        return asked() if out is None else out

    def keep_row(self, layer: str, q: Tensor, k: Tensor, **call: Any) -> None:
        """Keeps the last layer's only wanted row, and stops.

        Args:
            q: [B, H, M, D], of which `rows` are wanted; k, call: as in `attnx.attention_map`.

        Raises:
            Stop: always.
        """
        try:
            amap = attention_map(q, k, heads=self.trace.heads, **call)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{layer}: {error}") from error
        whole = self.trace.rows is None  # else the trace is of this row anyway
        self.trace.add(layer, KeptRows(amap, (self.last_row or 0,), k.shape[2]) if whole else amap)
        raise Stop

    def _index(self, rows: tuple[int, ...], q: Tensor) -> Tensor:
        """The chosen rows as a tensor on q's device, copied there once and not in every layer."""
        if not all(isinstance(row, int) and 0 <= row < q.shape[2] for row in rows):
            raise ValueError(f"rows: expected integers in 0..{q.shape[2] - 1}; got {list(rows)}")
        key = (rows, q.device)
        if key not in self._rows:
            self._rows[key] = torch.tensor(rows, dtype=torch.int64, device=q.device)
        return self._rows[key]
