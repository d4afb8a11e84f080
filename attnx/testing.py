"""What the tests of every backend share: the float64 oracle, the error budget, the table of shapes, random inputs.

The oracle uses plain softmax in float64 and shares no code with any backend, so none is its own judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.reducers import HIDDEN, Heads, fuse_heads


class Inputs(NamedTuple):
    """q [B,H,M,D], k [B,Hk,N,D], v [B,Hk,N,Dv], and a float or boolean bias or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes, what is asked for, and how the inputs lie in memory.

    ``bias`` (additive) and ``mask`` (boolean, True = attend) spell their shape: "B1MN" is [B, 1, M, N], "MN" is [M, N].
    The first and last row of a mask with rows attend to nothing; so does row 1 of a bias with rows, by minus infinity.
    ``layout`` is one of LAYOUTS; every layout but "contiguous" lies in memory among NaNs or among the other inputs.
    """

    B: int = 2
    H: int = 3
    M: int = 20
    N: int = 20
    D: int = 16
    Hk: int | None = None
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    heads: str = "mean"
    bias: str = ""
    mask: str = ""
    is_causal: bool = False
    scale: float | None = None
    rows: tuple[int, ...] | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        """The test's name: the sizes, and every field that is not the default."""
        sizes = f"{self.B}x{self.H}x{self.M}x{self.N}x{self.D}"
        rest = [(f.name, getattr(self, f.name)) for f in fields(self)[5:] if getattr(self, f.name) != f.default]
        return "-".join([sizes, *(f"{name}={str(value).removeprefix('torch.')}" for name, value in rest)])

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments of `attnx.attention` beside the tensors."""
        return {"is_causal": self.is_causal, "scale": self.scale, "heads": self.heads, "rows": self.rows}


LAYOUTS = (
    "contiguous",
    "packed",  # q, k, v are slices of one [B, N, 3, H, D]: a ViT's qkv projection; needs M = N, Hk = H, Dv = D
    "strided",  # the last dim has stride 2
    "expanded",  # one item, expanded over the batch: stride 0
)


def random_inputs(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
    """Normal q, k, v and bias of a case; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    B, H, M, N, D = case.B, case.H, case.M, case.N, case.D
    kv_heads = H if case.Hk is None else case.Hk

    def normal(heads: int, tokens: int, dim: int) -> Tensor:
        batch = 1 if case.layout == "expanded" else B
        return torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64).to(device, case.dtype)

    q, k, v = normal(H, M, D), normal(kv_heads, N, D), normal(kv_heads, N, D if case.Dv is None else case.Dv)
    if case.layout == "packed":
        packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    elif case.layout == "strided":
        q, k, v = (_among_nans(t) for t in (q, k, v))
    elif case.layout == "expanded":
        q, k, v = (t.expand(B, -1, -1, -1) for t in (q, k, v))
    bias = None
    if case.bias or case.mask:
        sizes = {"B": B, "H": H, "M": M, "N": N, "1": 1}
        shape = [sizes[letter] for letter in case.bias or case.mask]
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        bias = (noise if case.bias else noise > -0.5).to(device, case.dtype if case.bias else torch.bool)
        if case.bias and shape[-2] > 1:
            bias[..., 1, :] = -torch.inf
        if case.mask and shape[-2] > 1:
            bias[..., [0, -1], :] = False
    return Inputs(q, k, v, bias)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    rows: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and map in float64, by plain softmax; arguments as in `attnx.attention`.

    A row without keys is zero in both; a NaN or an infinity among the scores makes its row NaN.
    """
    p = _softmax(_biased_scores(q, k, bias, is_causal, scale), _hidden(q, k, bias, is_causal))
    return p @ _per_query_head(v.double(), q), fuse_heads(_chosen(p, rows), Heads.parse(heads))


def oracle_lse(
    q: Tensor, k: Tensor, bias: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """[B, H, M] float64 natural log-sum-exp of the scores; minus infinity for a row without keys."""
    return _biased_scores(q, k, bias, is_causal, scale).logsumexp(-1)


def torch_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    rows: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Torch's own answer, whose error ours is measured against: SDPA's output, and the map of an eager softmax.

    The output is `F.scaled_dot_product_attention` in q's dtype; gradients flow through it. The map is fp32 whatever the
    inputs are, since products of half-precision numbers are exact in fp32 and are summed there. So its reference is the
    eager map of the same inputs widened to fp32, which is far stricter than that of scores rounded to bfloat16: a
    backend that rounds its weights before it fuses the heads fails.
    """
    hidden = _hidden(q, k, bias, is_causal)
    # No is_causal: on CPUs SDPA hides before it scales, and a scale of 0 or less then gives NaN.
    mask = None
    if bias is not None and bias.dtype != torch.bool:
        mask = bias.to(q.dtype).masked_fill(hidden, -torch.inf)
    elif bias is not None or is_causal:
        mask = ~hidden
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    p = _softmax(_biased_scores(q, k, bias, is_causal, scale, wide), hidden)
    return out, fuse_heads(_chosen(p, rows), Heads.parse(heads)).float()


def budget(exact: Tensor, reference: Tensor, dtype: torch.dtype, exponent: float = 1.0) -> float:
    """How far from the oracle a result may be: ``2 * err(torch in the same dtype) + eps(dtype) * max|oracle|``.

    Args:
        exact: the oracle's result, float64.
        reference: torch's, see `torch_reference`.
        dtype: of the result under test: q's for an output or a gradient, float32 for a map.
        exponent: multiplies the second term. 1 for outputs; for a map the size of its scores, see `score_size`:
            a weight is ``exp(score - lse)``, and what fp32 rounds away from a score of 10 is ten times eps of the
            weight. Torch's softmax is lucky there (it subtracts the maximum, exactly, where a kernel that recomputes
            weights subtracts a rounded log-sum-exp), so its own error can't stand for it.
    """
    finite = exact.isfinite() & reference.isfinite()
    error, size = _largest((reference.double() - exact)[finite]), _largest(exact[finite])
    return 2 * error + torch.finfo(dtype).eps * size * exponent


def score_size(
    q: Tensor, k: Tensor, bias: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> float:
    """The largest magnitude among the finite scores and log-sum-exps, at least 1."""
    s = _biased_scores(q, k, bias, is_causal, scale)
    lse = s.logsumexp(-1)
    return max(1.0, _largest(s[s.isfinite()]), _largest(lse[lse.isfinite()]))


def assert_within_budget(
    ours: Tensor, exact: Tensor, reference: Tensor, name: str = "result", exponent: float = 1.0
) -> None:
    """Raises AssertionError unless ours has the oracle's shape, NaNs and infinities, and an error within `budget`."""
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    strange = torch.where(finite, ~ours.isfinite(), (ours != exact) & ~(ours.isnan() & exact.isnan()))
    assert not strange.any(), f"{name}: {int(strange.sum())} of {strange.numel()} values finite or not as the oracle's"
    error, allowed = _largest((ours.double() - exact)[finite]), budget(exact, reference, ours.dtype, exponent)
    assert error <= allowed, f"{name}: largest error {error:.3g} is above the budget of {allowed:.3g}"


def assert_attention(
    out: Tensor | None,
    amap: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    rows: Sequence[int] | Tensor | None = None,
) -> None:
    """Raises AssertionError unless output (if given) and map are a backend's right answer to these inputs.

    Right: dtypes as promised, errors within budget, and a weight that is zero in the oracle exactly zero.
    """
    exact_out, exact_map = oracle(q, k, v, bias, is_causal, scale, heads, rows)
    torch_out, torch_map = torch_reference(q, k, v, bias, is_causal, scale, heads, rows)
    assert amap.dtype == torch.float32, f"map: dtype {amap.dtype}, expected torch.float32"
    assert_within_budget(amap, exact_map, torch_map, "map", score_size(q, k, bias, is_causal, scale))
    assert not amap[exact_map == 0].any(), "map: weights of keys that may not be attended are not zero"
    if out is not None:
        assert out.dtype == q.dtype, f"out: dtype {out.dtype}, expected {q.dtype}"
        assert_within_budget(out, exact_out, torch_out, "out")
        assert not out[(exact_out == 0).all(-1)].any(), "out: rows without keys are not zero"


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _biased_scores(
    q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[B, H, M, N]; minus infinity where a key may not be attended."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q.to(dtype) @ _per_query_head(k.to(dtype), q).transpose(-1, -2) * scale
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(dtype)
    return s.masked_fill(_hidden(q, k, bias, is_causal), -torch.inf)


def _softmax(s: Tensor, hidden: Tensor) -> Tensor:
    return torch.softmax(s, -1).masked_fill(hidden.all(-1, keepdim=True), 0.0)


def _hidden(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """[B, H, M, N]: True where a key may not be attended: above the diagonal, False in a mask, -inf in a bias."""
    hidden = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    if bias is not None:
        hidden = hidden | (~bias if bias.dtype == torch.bool else bias.double() < HIDDEN)
    if is_causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    return hidden


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _chosen(p: Tensor, rows: Sequence[int] | Tensor | None) -> Tensor:
    return p if rows is None else p[:, :, torch.as_tensor(rows, dtype=torch.int64, device=p.device)]


def _among_nans(t: Tensor) -> Tensor:
    B, heads, tokens, dim = t.shape
    view = t.new_full((B, heads, tokens + 2, 2 * dim + 1), torch.nan)[:, :, 1:-1, 1::2]
    view.copy_(t)
    return view


_FP16, _BF16, _FP64 = torch.float16, torch.bfloat16, torch.float64

# Short rows take 20 keys, long ones 300: above SHORT_ROW, and no multiple of a block.
TABLE: tuple[Case, ...] = (
    *(Case(heads=heads) for heads in ("mean", "max", "min", "each")),
    *(Case(heads=heads, M=24, N=300, dtype=_BF16) for heads in ("mean", "max", "min", "each")),
    Case(heads="each", dtype=_FP64, mask="B1MN"),
    Case(N=300, dtype=_FP64, Hk=1, is_causal=True),
    # head dims: powers of two, and those padded to the next
    *(
        Case(B=1, H=2, M=17, N=33, D=D, dtype=dtype)
        for D, dtype in (
            *((16, _FP16), (24, _BF16), (32, torch.float32), (48, _FP16), (64, _BF16), (72, torch.float32)),
            *((80, _FP16), (88, _BF16), (96, torch.float32), (104, _FP16), (128, _BF16), (192, torch.float32)),
            *((256, _FP16), (64, torch.float32), (256, torch.float32)),
        )
    ),
    *(Case(B=1, H=2, N=300, D=D, dtype=_BF16) for D in (72, 80, 104, 256)),
    Case(D=32, Dv=64, dtype=_FP16),
    Case(D=64, Dv=24, dtype=_BF16),
    Case(H=2, N=300, D=16, Dv=80),
    Case(H=2, N=300, D=48, Dv=16, dtype=_FP16),
    # biases of every shape
    *(Case(bias=shape) for shape in ("111N", "B11N", "1HMN", "MN")),
    *(Case(bias=shape, dtype=_BF16) for shape in ("B1MN", "BHMN", "1HM1")),
    *(Case(bias=shape, N=300, dtype=_FP16) for shape in ("B11N", "1HMN", "BHMN")),
    # masks, with rows that attend to nothing
    *(Case(mask=shape, dtype=_FP16) for shape in ("B11N", "B1MN", "MN")),
    *(Case(mask=shape, heads="max") for shape in ("1HMN", "BHMN")),
    *(Case(mask=shape, N=300) for shape in ("B1MN", "BHMN")),
    Case(mask="B1MN", N=300, heads="each", dtype=_BF16),
    Case(mask="BHMN", N=300, heads="min"),
    # causal, more rows than keys and fewer
    *(Case(is_causal=True, M=M, N=N) for M, N in ((20, 20), (20, 50), (50, 20))),
    Case(is_causal=True, B=1, H=2, M=20, N=300, dtype=_FP16),
    Case(is_causal=True, B=1, H=2, M=300, N=300),
    Case(is_causal=True, B=1, H=2, M=400, N=280, dtype=_BF16),
    Case(is_causal=True, heads="min", bias="1HMN"),
    Case(is_causal=True, N=300, bias="B1MN", dtype=_BF16),
    Case(is_causal=True, mask="B1MN", heads="max", dtype=_FP16),
    Case(is_causal=True, N=300, mask="BHMN"),
    # grouped queries
    Case(H=4, Hk=2, heads="max"),
    Case(H=6, Hk=3, mask="BHMN", dtype=_BF16),
    Case(H=4, Hk=1, N=300, bias="1HMN", dtype=_FP16),
    Case(H=4, Hk=2, N=300, heads="each", is_causal=True),
    # one of anything; block edges
    Case(M=1, dtype=_FP16),
    Case(M=1, N=300),
    Case(N=1),
    Case(M=1, N=1, dtype=_BF16),
    Case(B=1, H=1, M=20, N=20),
    *(Case(B=1, H=2, M=M, N=N, dtype=_FP16) for M, N in ((32, 16), (33, 17), (16, 128), (17, 129), (31, 256))),
    *(Case(B=1, H=2, M=M, N=N, dtype=_BF16) for M, N in ((16, 257), (17, 384), (128, 385), (129, 257))),
    # memory
    *(Case(layout=layout) for layout in LAYOUTS[1:]),
    Case(layout="packed", B=1, H=2, M=300, N=300, D=24, dtype=_BF16),
    Case(layout="strided", N=300, D=24, H=4, Hk=2, dtype=_FP16),
    Case(layout="expanded", N=300, heads="max", bias="1HMN"),
    # chosen rows: one, repeated and unsorted, all of them
    *(Case(rows=rows, dtype=_BF16) for rows in ((7,), (19, 3, 3, 0), ())),
    Case(rows=(), dtype=_FP64),
    *(Case(rows=rows, N=300) for rows in ((19,), (5, 0, 5), tuple(range(20)))),
    Case(rows=(19, 1, 0, 2), is_causal=True, bias="1HMN", heads="max"),
    Case(rows=(19, 1, 0, 2), is_causal=True, N=300, mask="B1MN", heads="each", dtype=_FP16),
    Case(rows=(19, 1, 0), N=300, bias="BHMN", H=4, Hk=2, layout="strided"),
    Case(rows=(19, 1, 0), mask="B11N", heads="min", layout="packed"),
    Case(rows=(3, 1), dtype=_FP64, bias="BHMN"),
    # scales, and scores that are far apart
    *(Case(scale=scale) for scale in (0.0, -0.5, 4.0)),
    Case(scale=4.0, N=300, dtype=_BF16),
    Case(scale=-2.0, N=300, bias="MN"),
    *(Case(scale=scale, is_causal=True, rows=rows) for scale, rows in ((-0.5, None), (-0.5, (3, 19)), (0.0, (3, 19)))),
)
