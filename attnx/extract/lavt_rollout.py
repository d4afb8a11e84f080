"""Rollout of LAVT's word maps: from the pixels of a stage to the patches of the first stage."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from attnx.methods.chain import Chain, self_attention
from attnx.methods.maps import fusion
from attnx.models.tokenizer import Caption
from attnx.ops.reducers import Reduction
from attnx.trace.trace import Trace
from attnx.trace.window_record import PatchMerge

_BLOCK = re.compile(r"(?:.*\.)?layers\.([0-3])\.blocks\.\d+\.attn")


def lavt_word_rollout(
    trace: Trace, stage: int, captions: Sequence[Caption] | None = None, *, residual: float = 0.5
) -> Tensor:
    """The share of each patch of stage 0 in the pixels of a stage that attend to each word piece.

    ``r = P_s[:, t] / sum_i P_s[i, t]`` over the pixels i of stage s, then ``r <- residual r + (1 - residual) r A`` for
    the map A of each Swin block from stage s down to stage 0, and in equal parts to the 2 x 2 patches of each merging.
    With `captions` the sum is over i and all pieces t of a word, so that the maps of a word's pieces sum to 1 together.
    A piece or word without any weight, such as padding, has a map of zeros.

    The attention to words is not part of the chain: through its gate each pixel receives a function of its own features
    and of the words. Other pixels enter only by the mean and variance of the fusion's instance norms.

    Args:
        trace: a capture of a LAVT, attnx's or the original, with all rows and heads "mean" or "each". It holds the
            attention to words of the stage and all Swin blocks of the stages up to it.
        stage: s, 0 to 3.
        captions: the caption of each of the B items; None: each piece is normalised alone.
        residual: weight of the identity, as in `attnx.rollout`.

    Returns:
        [B, T, h_0, w_0] float32.

    Raises:
        ValueError: a layer is missing in the trace, other options of the capture, or an argument out of range.

    Reference:
        Abnar & Zuidema, "Quantifying Attention Flow in Transformers", https://arxiv.org/abs/2005.00928;
        Yang et al., "LAVT", https://arxiv.org/abs/2112.02244; https://github.com/yz93/LAVT-RIS

    Example:
        >>> import torch, attnx
        >>> from attnx.models.lavt import Lavt, LavtConfig
        >>> config = LavtConfig(24, (1, 1, 1, 1), (1, 2, 4, 8), 4, text_width=32, text_depth=1, text_heads=2)
        >>> ids, mask = torch.tensor([[101, 3899, 102]]), torch.ones(1, 3, dtype=torch.bool)
        >>> model = Lavt(config).eval()
        >>> with torch.no_grad(), attnx.capture(model.backbone) as trace:
        ...     stages = model.backbone(torch.rand(1, 3, 64, 48), model.encode_text(ids, mask), mask)
        >>> lavt_word_rollout(trace, stage=2).shape
        torch.Size([1, 3, 16, 12])
    """
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual: expected 0 to 1; got {residual}")
    kind = _fusion(trace)
    words, chain = _words(trace, stage), _chain(trace, stage)
    weights = trace.kept(words).fused(kind).map()
    pixels = chain.grids[-1][0] * chain.grids[-1][1]
    if weights.shape[1] != pixels:
        raise ValueError(
            f"{words}: expected {pixels} pixels, as in the blocks of stage {stage}; got {weights.shape[1]}"
        )
    sums = weights.sum(-1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(f"{words}: expected weights whose rows sum to 1, of a capture without grad; got other sums")
    rolled: Tensor = _through(chain, kind, _normalised(weights.mT, captions), residual).unflatten(-1, chain.grids[0])
    return rolled


def swin_layers(trace: Trace, stage: int) -> list[str]:
    """Names of a LAVT's Swin attention in a trace, from stage 0 to `stage`.

    Raises:
        ValueError: the trace has none of one of these stages.
    """
    found = {name: int(match[1]) for name in trace if (match := _BLOCK.fullmatch(name))}
    missing = sorted(set(range(stage + 1)) - set(found.values()))
    if missing:
        raise ValueError(
            f"trace: expected Swin blocks (layers.{missing[0]}.blocks.*.attn) of stages 0 to {stage}; got "
            f"{', '.join(trace) or 'none'}"
        )
    return [name for name, of in found.items() if of <= stage]


def _fusion(trace: Trace) -> Reduction:
    """The reduction of heads to the mean that remains to be applied to the trace."""
    if trace.heads not in ("mean", "each"):
        raise ValueError(f"trace: expected a capture with heads 'mean' or 'each'; got {trace.heads!r}")
    return fusion(trace, None)


def _words(trace: Trace, stage: int) -> str:
    """Name of the attention to words of a stage."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage: expected 0, 1, 2 or 3; got {stage!r}")
    wanted = f"layers.{stage}.fusion.image_lang_att"
    name = next((name for name in trace if f".{name}".endswith(f".{wanted}")), None)
    if name is None:
        raise ValueError(f"trace: expected the attention to words {wanted}; got {', '.join(trace) or 'none'}")
    return name


def _chain(trace: Trace, stage: int) -> Chain:
    """The Swin blocks and mergings up to a stage."""
    chain = self_attention(trace.select(swin_layers(trace, stage)))
    if not chain.windowed:
        raise ValueError(f"trace: expected Swin blocks with windows; got none in {', '.join(trace)}")
    return chain


def _normalised(weights: Tensor, captions: Sequence[Caption] | None) -> Tensor:
    """Weights [B, T, N] of each piece's pixels, divided by the sum over the pixels and the pieces of its word."""
    sums = weights.sum(-1)
    if captions is not None:
        if len(captions) != len(weights):
            raise ValueError(f"captions: expected {len(weights)}, one for each item; got {len(captions)}")
        sums = torch.stack([_word_sums(own, caption) for own, caption in zip(sums, captions, strict=True)])
    return weights / torch.where(sums > 0, sums, 1)[..., None]


def _word_sums(sums: Tensor, caption: Caption) -> Tensor:
    """Sums [T] of pieces -> [T]: the sum of the word that each piece belongs to; other pieces keep their own."""
    if len(caption.ids) > len(sums):
        raise ValueError(f"captions: expected at most {len(sums)} pieces; got {len(caption.ids)} in {caption.text!r}")
    whole = sums.clone()
    for word in range(len(caption.words)):
        pieces = [t for t, of in enumerate(caption.word_of) if of == word]
        whole[pieces] = sums[pieces].sum()
    return whole


def _through(chain: Chain, kind: Reduction, r: Tensor, residual: float) -> Tensor:
    """Weights [B, R, N] of the last layer's tokens -> [B, R, N_0] of the first layer's; each row keeps its sum."""
    for _, step in reversed(chain.steps):
        passed = step.vecmat(r) if isinstance(step, PatchMerge) else step.fused(kind).vecmat(r)
        r = passed if isinstance(step, PatchMerge) else torch.lerp(r, passed, 1 - residual)
    return r
