"""Relevance of patches for a score: Chefer et al.'s rules for self-attention."""

from torch import Tensor

from attnx.methods.maps import fusion
from attnx.methods.rollout import chain_start, self_attention
from attnx.trace.layers import Layers
from attnx.trace.trace import Trace


def relevance(trace: Trace, start: int = 0, *, rows: str | int | None = None, layers: Layers = None) -> Tensor:
    """Chefer et al.'s relevance of the patches for a score, through the layers of self-attention.

    ``C_l = mean_h max(dP_l, 0) P_l`` and ``R_l = R_{l-1} + C_l R_{l-1}``, from the identity (rules 5 and 6); the row of
    the class token, as a chain of vector products from the last layer to the first.

    Args:
        trace: a capture of all rows with grad=True, after its backward pass.
        start: the first layer that counts. (Their CLIP code takes the last alone: start=-1.)
        rows, layers: as in `rollout`.

    Returns:
        [B, h, w] float32; for rows="all" R itself, [B, N, N].

    Raises:
        ValueError: as `rollout`. RuntimeError: no gradient has come.

    Reference:
        https://arxiv.org/abs/2103.15679; https://github.com/hila-chefer/Transformer-MM-Explainability
    """
    trace = trace if layers is None else trace.select(layers)
    chain, pool = self_attention(trace)
    layout = None if rows == "all" else trace.layout
    if not -len(chain) <= start < len(chain):
        raise ValueError(f"start: expected a layer index in -{len(chain)}..{len(chain) - 1}; got {start}")
    kind = fusion(trace, None)
    result, _ = chain_start(chain[-1][1], pool, kind, rows, layout)
    for _, kept in reversed(chain[start:]):
        result = result + kept.fused(kind).vecmat(result)
    return result if layout is None else layout.patches(result[:, 0])
