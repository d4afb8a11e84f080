"""One attention call of a model: its arguments as [B, H, M, D], and the way back to the model's shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from attnx.ops.functional import attention
from attnx.trace.adapters.huggingface import unpacked
from attnx.trace.folding import Around, folding, has_other_heads, same, unknown_heads


@dataclass
class Call:
    """One attention call of a model.

    Attributes:
        q, k, v, bias: as in `attnx.attention`. Heads that the model packed into rows are unpacked: one row per query.
        dropout: dropout probability of the weights.
        scores: further arguments of `attnx.attention`: is_causal and scale, and softcap and sinks of a model that calls
            `attnx.attention`.
        own: runs the model's own attention.
        unfold: turns an output [B, H, M, Dv] into one of the model's shape.
        fold: turns a gradient of the model's output into [B, H, M, Dv].
        folded: True if q had not 4 dimensions, so that the input of the module is needed to find its heads.
        ours: True if the model called `attnx.attention`, which returns a map with the output.
        result: return value of the model's own attention, once it ran.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dropout: float
    scores: dict[str, Any]
    own: Callable[[], Any]
    unfold: Callable[[Tensor], Tensor] = same
    fold: Callable[[Tensor], Tensor] = same
    folded: bool = False
    ours: bool = False
    result: Any = field(default=None)

    @classmethod
    def of(
        cls,
        func: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outer: Sequence[Around] = (),
    ) -> "Call":
        """A call of `F.scaled_dot_product_attention` or `attnx.attention` with these arguments.

        Args:
            func, args, kwargs: the call.
            module: the module that attends.
            outer: this module and the one around it, with their inputs; they give the number of heads.

        Raises:
            NotImplementedError: it is unknown which dimension of q holds the heads.
        """
        if func is attention:
            q, k, v, *_ = args
            names = ("is_causal", "scale", "softcap", "sinks")
            scores = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            return cls(q, k, v, kwargs.get("bias"), 0.0, scores, lambda: func(*args, **kwargs), ours=True)
        return cls._of_sdpa(func, module, outer, *args, **kwargs)

    @classmethod
    def _of_sdpa(
        cls,
        func: Callable[..., Tensor],
        module: nn.Module,
        outer: Sequence[Around],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Call":
        def own() -> Any:
            options: dict[str, Any] = dict(scale=scale, enable_gqa=enable_gqa)
            return sdpa_in_four(func, query, key, value, attn_mask, dropout_p, is_causal, **options)

        scores: dict[str, Any] = dict(is_causal=is_causal, scale=scale)
        if query.dim() == 4:
            q, bias = unpacked(module, query, key, attn_mask) or (query, attn_mask)
            packed, heads = query.shape[:3], q.shape[:3]
            # Grouped heads are heads, whatever number the module stores.
            if q.shape[1] == key.shape[1] and has_other_heads(q, outer):
                raise unknown_heads((*query.shape[:-1], key.shape[-2]), outer)
            if packed == heads:
                return cls(q, key, value, bias, dropout_p, scores, own)
            return cls(q, key, value, bias, dropout_p, scores, own, _reshaped(packed), _reshaped(heads))
        folded = folding((*query.shape[:-1], key.shape[-2]), outer or [(module, None)])
        if key.shape[:-2] != query.shape[:-2] or value.shape[:-2] != query.shape[:-2]:
            raise NotImplementedError(
                f"expected q, k and v of the same leading dimensions; got {list(query.shape)}, {list(key.shape)} and "
                f"{list(value.shape)}"
            )
        q, k, v = (folded.fold(t) for t in (query, key, value))
        bias = None if attn_mask is None else folded.fold(attn_mask)
        return cls(q, k, v, bias, dropout_p, scores, own, folded.unfold, folded.fold, folded=True)

    def output(self) -> Tensor:
        """The output of the model's own attention."""
        self.result = self.own()
        output: Tensor = self.result[0] if self.ours else self.result
        return output


def sdpa_in_four(
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """SDPA's output; over 5 dimensions with a mask, that of SDPA over 4, whose kernels are 2 to 3 times as fast.

    The mask is copied for every item, [B * windows, H, M, N].

    Args:
        func: `F.scaled_dot_product_attention`; the others are its arguments.
    """
    sizes = query.shape[:2]
    same = key.shape[:2] == value.shape[:2] == sizes
    if query.dim() != 5 or not same or attn_mask is None or attn_mask.dim() < 3:
        return func(query, key, value, attn_mask, *args, **kwargs)
    whole = attn_mask[(None,) * (5 - attn_mask.dim())].expand(*sizes, -1, -1, -1).flatten(0, 1)
    out = func(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), whole, *args, **kwargs)
    return out.unflatten(0, sizes)


def _reshaped(sizes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A function that gives a tensor these leading dimensions."""
    return lambda t: t.reshape(*sizes, -1)
