"""Relevance of patches for a score, by the self-attention rules of Chefer et al."""

from torch import Tensor

from attnx.methods.chain import self_attention
from attnx.methods.maps import fusion
from attnx.methods.queries import chain_start, over_patches, renamed
from attnx.trace.layers import Layers
from attnx.trace.trace import Trace
from attnx.trace.window_record import PatchMerge


def relevance(
    trace: Trace,
    start: int = 0,
    *,
    query: str | int | None = None,
    layers: Layers = None,
    rows: str | int | None = None,
) -> Tensor:
    """Relevance of the patches for a score through the layers of self-attention, by Chefer et al.

    ``C_l = mean_h max(dP_l, 0) P_l`` and ``R_l = R_{l-1} + C_l R_{l-1}`` with ``R_0 = I`` (rules 5 and 6 of the paper).
    The result is the row of R that belongs to the class token, computed as a chain of vector products from the last
    layer to the first.

    Args:
        trace: a capture of all rows with grad=True, after its backward pass.
        start: the first layer of the product. The authors' code for CLIP uses only the last layer, start=-1.
        query, layers, rows: as in `rollout`.

    Returns:
        [B, h, w] float32; over text [B, N], the relevance of each token; for query="all" the matrix R, [B, N, N].

    Raises:
        ValueError: as in `rollout`.
        RuntimeError: there was no backward pass.

    Reference:
        https://arxiv.org/abs/2103.15679; https://github.com/hila-chefer/Transformer-MM-Explainability

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with attnx.capture(model, grad=True) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> trace.backward(logits[:, 5].sum())
        >>> attnx.relevance(trace).shape
        torch.Size([2, 12, 12])
    """
    query = renamed(query, rows)
    trace = trace if layers is None else trace.select(layers)
    chain = self_attention(trace, weighted=True)
    depth = len(chain.layers)
    if not -depth <= start < depth:
        raise ValueError(f"start: expected a layer index in -{depth}..{depth - 1}; got {start}")
    layout = chain.layout(trace, start, query)
    kind = fusion(trace, None)
    result, _ = chain_start(chain.layers[-1][1], chain.pool, kind, query, layout)
    for _, record in reversed(chain.since(start)):
        passed = record.vecmat(result) if isinstance(record, PatchMerge) else record.fused(kind).vecmat(result)
        result = passed if isinstance(record, PatchMerge) else result + passed
    return over_patches(result, layout, query)
