"""The importance of each row: the magnitude of its weights times their gradients."""

import torch
from torch import Tensor

from attnx.ops.backends import choose, eager
from attnx.ops.checks import (
    cast_as_sdpa,
    check_backend,
    check_float32,
    check_gradient,
    check_tensors,
    resolve_scale,
    resolve_softcap,
)
from attnx.ops.reducers import Reduction
from attnx.ops.registration import Operator
from attnx.ops.scores import Scores
from attnx.ops.sinks import lse_with_sinks


def row_importance(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Magnitude of each row's weights times their gradients: ``sum_j |dP_ij P_ij|`` of each head. Detached.

    ``P = softmax(q k^T * scale + bias)`` and ``dP = grad v^T``, the gradient of P. Neither is stored. The mean over
    rows and images is a proxy for how much the loss depends on the head.

    Args:
        grad: [B, H, M, Dv] in q's dtype, the gradient of a scalar with respect to the attention's output.
        q, k, v, bias, is_causal, scale, softcap, sinks, backend, attn_mask, enable_gqa: as in `attnx.attention`.
        lse: [B, H, M] float32 as `attnx.attention_lse` gives it, with the same sinks, where it is known already.

    Returns:
        [B, H, M] float32. A row whose keys are all masked is zero. The same inputs give the same bits every time.

    Raises:
        ValueError, NotImplementedError: as in `attnx.attention`.

    Reference:
        Michel et al., "Are Sixteen Heads Really Better than One?", https://arxiv.org/abs/1905.10650

    Example:
        >>> q = k = v = torch.randn(2, 4, 5, 16)
        >>> grad = torch.randn(2, 4, 5, 16)
        >>> importance = attnx.row_importance(grad, q, k, v)
        >>> weighted = attnx.gradient_map(grad, q, k, v, heads="each", clamp=False)
        >>> torch.allclose(importance, weighted.abs().sum(-1), atol=1e-5)
        True
    """
    q, k, v = cast_as_sdpa(q, k, v)
    bias = check_tensors(q, k, v, bias, "mean", attn_mask)
    check_gradient(grad, q, v)
    check_float32("lse", lse, q.shape[:3], q.device)
    grad, q, k, v = (t.detach() for t in (grad, q, k, v))
    bias, lse = (None if t is None else t.detach() for t in (bias, lse))
    scale, cap, name = resolve_scale(scale, q), resolve_softcap(softcap), check_backend(backend)
    lse = lse_with_sinks(q, k, bias, is_causal, scale, cap, sinks, lse, name)
    return importance_of_rows(grad, q, k, v, bias, is_causal, scale, cap, lse, name)


@Operator
def importance_of_rows(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    """[B, H, M]: see `row_importance`."""
    scores = Scores(q, k, bias, is_causal, scale, softcap)
    if scores.is_empty or 0 in v.shape:
        return q.new_zeros(q.shape[:3], dtype=torch.float32)
    match choose(backend, scores, v, Reduction.MEAN):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            return triton.row_importance(scores, grad, v, lse)
        case "native":
            from attnx.ops.backends import native

            return native.row_importance(scores, grad, v, lse)
        case "eager":
            return eager.row_importance(scores, grad, v, lse)


@importance_of_rows.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float,
    lse: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[:3], dtype=torch.float32)
