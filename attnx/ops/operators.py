"""The operators of `torch.ops.attnx`: `attnx.ops.functional` calls them with checked arguments.

Each has a fake kernel, which gives the shapes and strides of its results, so that `torch.compile(fullgraph=True)` takes
it. `attention` and `attention_lse` also have a gradient (`attnx.ops.autograd`). Empty inputs are answered here, before
any backend. Arguments are spelled out, because torch's schemas are flat; below they are one `Scores`.
"""

import torch
from torch import Tensor

from attnx.ops.backends import choose, eager
from attnx.ops.reducers import Reduction
from attnx.ops.registration import Operator
from attnx.ops.scores import Scores


@Operator
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and map, see `attnx.attention`. softcap: 0 for none."""
    scores, reduction = Scores(q, k, bias, is_causal, scale, softcap), Reduction.parse(heads)
    if scores.is_empty:
        return scores.new_output(v).zero_(), new_map(q, k, heads, rows).zero_()
    rows = _from_the_start(rows, q.shape[2])
    match name := choose(backend, scores, v, reduction):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            return triton.attention(scores, v, reduction, rows, on_hopper=name == "hopper")
        case "native":
            from attnx.ops.backends import native

            return native.attention(scores, v, reduction, rows)
        case "eager":
            return eager.attention(scores, v, reduction, rows)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float, heads: str,
    rows: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return Scores(q, k, bias, is_causal, scale).new_output(v), new_map(q, k, heads, rows)


@Operator
def attention_map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    """The map alone, see `attnx.attention_map`."""
    scores, reduction = Scores(q, k, bias, is_causal, scale, softcap), Reduction.parse(heads)
    if scores.is_empty:
        return new_map(q, k, heads, rows).zero_()
    rows = _from_the_start(rows, q.shape[2])
    match name := choose(backend, scores, None, reduction):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            return triton.attention_map(scores, reduction, rows, lse, on_hopper=name == "hopper")
        case "native":
            from attnx.ops.backends import native

            return native.attention_map(scores, reduction, rows, lse)
        case "eager":
            return eager.attention_map(scores, reduction, rows, lse)


@attention_map.register_fake
def _(
    q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float, heads: str,
    rows: Tensor | None, lse: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    return new_map(q, k, heads, rows)


@Operator
def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps, see `attnx.attention_lse`; the latter are float64 for float64 inputs."""
    scores = Scores(q, k, bias, is_causal, scale, softcap)
    if scores.is_empty:
        return scores.new_output(v).zero_(), _new_lse(q).fill_(-torch.inf)
    match choose(backend, scores, v, None):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            return triton.attention_lse(scores, v)
        case "native":
            from attnx.ops.backends import native

            return native.attention_lse(scores, v)
        case "eager":
            return eager.attention_lse(scores, v)


@attention_lse.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return Scores(q, k, bias, is_causal, scale).new_output(v), _new_lse(q)


@Operator
def vecmat(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    """r times the mean map, see `attnx.vecmat`."""
    scores = Scores(q, k, bias, is_causal, scale, softcap)
    if scores.is_empty:
        return r.new_zeros(r.shape[0], k.shape[2])
    match name := choose(backend, scores, None, Reduction.MEAN):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            return triton.vecmat(scores, r, lse, on_hopper=name == "hopper")
        case "native":
            from attnx.ops.backends import native

            return native.vecmat(scores, r, lse)
        case "eager":
            return eager.vecmat(scores, r, lse)


@vecmat.register_fake
def _(
    r: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float,
    lse: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    return r.new_empty(r.shape[0], k.shape[2])


@Operator
def gradient_map(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient-weighted map, see `attnx.gradient_map`."""
    scores, reduction = Scores(q, k, bias, is_causal, scale, softcap), Reduction.parse(heads)
    if scores.is_empty or 0 in v.shape:
        return new_map(q, k, heads, rows).zero_()
    rows = _from_the_start(rows, q.shape[2])
    match choose(backend, scores, v, reduction):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            return triton.gradient_map(scores, grad, v, reduction, clamp, rows, lse)
        case "native":
            from attnx.ops.backends import native

            return native.gradient_map(scores, grad, v, reduction, clamp, rows, lse)
        case "eager":
            return eager.gradient_map(scores, grad, v, reduction, clamp, rows, lse)


@gradient_map.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float,
    heads: str, clamp: bool, rows: Tensor | None, lse: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    return new_map(q, k, heads, rows)


@Operator
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    is_causal: bool,
    scale: float,
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty where it has none), on any device."""
    scores = Scores(q, k, bias, is_causal, scale, softcap)
    dq, dk, dv, dbias = eager.attention_backward(scores, grad, v, out, dlse)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, is_causal: bool, scale: float,
    softcap: float = 0.0, dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if bias is None or bias.dtype == torch.bool:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, torch.empty_like(bias, memory_format=torch.contiguous_format)


def new_map(q: Tensor, k: Tensor, heads: str, rows: Tensor | None) -> Tensor:
    """Uninitialised map of the rows."""
    m = q.shape[2] if rows is None else rows.shape[0]
    planes = q.shape[:2] if heads == "each" else q.shape[:1]
    return q.new_empty((*planes, m, k.shape[2]), dtype=torch.float32)


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _from_the_start(rows: Tensor | None, m: int) -> Tensor | None:
    """The rows in 0..m-1: negative ones count from the end.

    Raise ValueError for a bad index on a CPU. On a GPU a device-side assertion fails where rows are gathered.
    """
    if rows is None or rows.numel() == 0:
        return rows
    if rows.device.type == "cpu":
        low, high = int(rows.min()), int(rows.max())
        if low < -m or high >= m:
            raise ValueError(f"rows: expected integers in {-m}..{m - 1}; got {low}..{high}")
        if low >= 0:
            return rows
    return torch.add(rows, rows < 0, alpha=m)
