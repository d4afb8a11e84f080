"""The table of test cases for all backends, and random inputs for each case."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """q [B,H,M,D], k [B,Hk,N,D], v [B,Hk,N,Dv], and a float or boolean bias or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """A test case: sizes, options, and the memory layout of the inputs.

    ``bias`` (additive) and ``mask`` (boolean, True = attend) are shapes: "B1MN" is [B, 1, M, N], "MN" is [M, N], and
    "P" is half of B: a bias that repeats.
    If a mask has rows, its first and last row are False everywhere. If a bias has rows, its row 1 is -inf everywhere.
    ``layout`` is one of LAYOUTS. In every layout but "contiguous", the inputs are surrounded by NaNs or by each other.
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
        """The name of the test: the sizes, and the fields that differ from their defaults."""
        sizes = f"{self.B}x{self.H}x{self.M}x{self.N}x{self.D}"
        rest = [(f.name, getattr(self, f.name)) for f in fields(self)[5:] if getattr(self, f.name) != f.default]
        return "-".join([sizes, *(f"{name}={str(value).removeprefix('torch.')}" for name, value in rest)])

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of `attnx.attention`, without tensors."""
        return {"is_causal": self.is_causal, "scale": self.scale, "heads": self.heads, "rows": self.rows}


LAYOUTS = (
    "contiguous",
    "packed",  # q, k, v are slices of one [B, N, 3, H, D]: a ViT's qkv projection; needs M = N, Hk = H, Dv = D
    "strided",  # the last dim has stride 2
    "expanded",  # one item, expanded over the batch: stride 0
)


def random_inputs(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
    """Normally distributed q, k, v and bias of a case, the same on every device."""
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
        sizes = {"B": B, "P": B // 2, "H": H, "M": M, "N": N, "1": 1}
        shape = [sizes[letter] for letter in case.bias or case.mask]
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        bias = (noise if case.bias else noise > -0.5).to(device, case.dtype if case.bias else torch.bool)
        if case.bias and shape[-2] > 1:
            bias[..., 1, :] = -torch.inf
        if case.mask and shape[-2] > 1:
            bias[..., [0, -1], :] = False
    return Inputs(q, k, v, bias)


def random_vector(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """[B, M] float32 in 0..1, like the vectors of rollout. Every fifth entry is 0, and the first one of item 1."""
    r = torch.rand(case.B, case.M, generator=torch.Generator().manual_seed(seed))
    r[:, 4::5] = 0
    r[1:2, :1] = 0
    return r.to(device)


def random_gradient(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A normally distributed output gradient, [B, H, M, Dv] in the case's dtype, with the strides of the output."""
    shape = (case.B, case.M, case.H, case.D if case.Dv is None else case.Dv)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1 + seed), dtype=torch.float64)
    return noise.to(device, case.dtype).transpose(1, 2)


def _among_nans(t: Tensor) -> Tensor:
    B, heads, tokens, dim = t.shape
    view = t.new_full((B, heads, tokens + 2, 2 * dim + 1), torch.nan)[:, :, 1:-1, 1::2]
    view.copy_(t)
    return view


_FP16, _BF16, _FP64 = torch.float16, torch.bfloat16, torch.float64

# Short rows have 20 keys. Long rows have 300, which is more than SHORT_ROW and not a multiple of a block.
TABLE: tuple[Case, ...] = (
    *(Case(heads=heads) for heads in ("mean", "max", "min", "each")),
    *(Case(heads=heads, M=24, N=300, dtype=_BF16) for heads in ("mean", "max", "min", "each")),
    Case(heads="each", dtype=_FP64, mask="B1MN"),
    Case(N=300, dtype=_FP64, Hk=1, is_causal=True),
    # head dims: powers of two, and others, which are padded
    *(
        Case(B=1, H=2, M=17, N=33, D=D, dtype=dtype)
        for D, dtype in (
            *((16, _FP16), (24, _BF16), (32, torch.float32), (48, _FP16), (64, _BF16), (72, torch.float32)),
            *((80, _FP16), (88, _BF16), (96, torch.float32), (104, _FP16), (128, _BF16), (192, torch.float32)),
            *((256, _FP16), (64, torch.float32), (256, torch.float32)),
        )
    ),
    *(Case(B=1, H=2, N=300, D=D, dtype=_BF16) for D in (72, 80, 104, 256)),
    Case(B=1, H=2, N=70, D=320, Dv=520, bias="1HMN", dtype=_BF16),  # kernels read heads above 256 in chunks
    Case(B=1, H=1, N=300, D=1024, Dv=24, is_causal=True),
    Case(B=1, H=2, D=16, Dv=300, heads="each", dtype=_FP16),
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
    # a bias or a mask that repeats over the batch
    *(Case(B=8, H=2, bias=shape) for shape in ("PHMN", "P1MN", "P11N")),
    *(Case(B=8, H=2, mask=shape, heads="max") for shape in ("PHMN", "P1MN")),
    Case(B=4, H=2, N=300, bias="PHMN", dtype=_BF16),
    Case(B=4, H=2, N=300, mask="P1MN"),
    Case(B=8, H=2, bias="P1MN", heads="each", dtype=_FP64),
    Case(B=4, H=4, Hk=2, N=300, bias="PHMN", rows=(19, 1, 0), is_causal=True),
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
    # sizes of 1; block edges
    Case(M=1, dtype=_FP16),
    Case(M=1, N=300),
    Case(N=1),
    Case(M=1, N=1, dtype=_BF16),
    Case(B=1, H=1, M=20, N=20),
    *(Case(B=1, H=2, M=M, N=N, dtype=_FP16) for M, N in ((32, 16), (33, 17), (16, 128), (17, 129), (31, 256))),
    *(Case(B=1, H=2, M=M, N=N, dtype=_BF16) for M, N in ((16, 257), (17, 384), (128, 385), (129, 257))),
    # memory layouts
    *(Case(layout=layout) for layout in LAYOUTS[1:]),
    Case(layout="packed", B=1, H=2, M=300, N=300, D=24, dtype=_BF16),
    Case(layout="strided", N=300, D=24, H=4, Hk=2, dtype=_FP16),
    Case(layout="expanded", N=300, heads="max", bias="1HMN"),
    # selected rows: one, repeated and unsorted, none, all
    *(Case(rows=rows, dtype=_BF16) for rows in ((7,), (19, 3, 3, 0), ())),
    Case(rows=(), dtype=_FP64),
    *(Case(rows=rows, N=300) for rows in ((19,), (5, 0, 5), tuple(range(20)))),
    Case(rows=(19, 1, 0, 2), is_causal=True, bias="1HMN", heads="max"),
    Case(rows=(19, 1, 0, 2), is_causal=True, N=300, mask="B1MN", heads="each", dtype=_FP16),
    Case(rows=(19, 1, 0), N=300, bias="BHMN", H=4, Hk=2, layout="strided"),
    Case(rows=(19, 1, 0), mask="B11N", heads="min", layout="packed"),
    Case(rows=(3, 1), dtype=_FP64, bias="BHMN"),
    # scales, including large ones that spread the scores
    *(Case(scale=scale) for scale in (0.0, -0.5, 4.0)),
    Case(scale=4.0, N=300, dtype=_BF16),
    Case(scale=-2.0, N=300, bias="MN"),
    *(Case(scale=scale, is_causal=True, rows=rows) for scale, rows in ((-0.5, None), (-0.5, (3, 19)), (0.0, (3, 19)))),
)
