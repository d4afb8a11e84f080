"""Attention sinks: one more logit per head in the softmax, whose weight is left out of the map."""

import torch
from torch import Tensor

from attnx.ops import operators
from attnx.ops.checks import check_sinks


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp once each head's sink has joined the softmax; the log-sum-exp is detached.

    ``lse' = log(exp(lse) + exp(sink))`` and ``out' = out * exp(lse - lse')``, whose factor is ``sigmoid(lse - sink)``.
    """
    sink = sinks.to(lse.dtype)[:, None]
    # Infinity minus infinity is NaN where a row without keys meets a sink of minus infinity.
    kept = (lse - sink).masked_fill(lse == -torch.inf, -torch.inf).sigmoid()
    return (out * kept[..., None]).to(out.dtype), torch.logaddexp(lse.detach(), sink.detach())


def lse_with_sinks(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    cap: float,
    sinks: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor | None:
    """The given log-sum-exp; where none is given and there are sinks, one that includes them."""
    if sinks is None:
        return lse
    check_sinks(sinks, q)
    if lse is not None:
        return lse
    found = operators.attention_lse(q, k, k, bias, is_causal, scale, cap, backend)[1]
    return torch.logaddexp(found, sinks.detach().to(found.dtype)[:, None])
