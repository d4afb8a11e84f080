"""One attention call, with and without its map. Each contestant is checked against float64 before it is timed."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from attnx import testing
from benchmarks import exact
from benchmarks.machine import l2_bytes
from benchmarks.peers import op as peers
from benchmarks.suites import memory
from benchmarks.timing import CLOCK, Seconds, graph_timer, race, try_to, wall_timer

WHOLE = 1 << 26  # attention weights; of larger shapes only `ROWS` rows are checked
ROWS = 64
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Shape(NamedTuple):
    B: int
    H: int
    N: int
    D: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return "x".join(map(str, self[:4]))


def _vit(batch: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Shape:
    return Shape(batch, 12, n, 64, dtype)


PLAIN = ("sdpa", "attnx", "attnx_row", "vecmat", "hf_eager", "timm_eager")
FEW = ("sdpa", "attnx", "attnx_eager", "hf_eager")
MAIN = tuple(_vit(*size) for size in ((64, 197), (16, 577), (4, 1370), (1, 4097), (1, 16385), (64, 257)))
SMALL = tuple(_vit(1, n) for n in (197, 577, 1370))
LARGE = tuple(_vit(*size) for size in ((256, 197), (64, 577), (16, 1370), (4, 4097)))
HALF = tuple(_vit(*size, torch.float16) for size in ((64, 197), (4, 1370)))

# Shapes and their contestants, the most important first, because the last are cut at the time limit. Compilation takes
# longer than all other work, so only some shapes have compiled contestants.
PLANS: dict[str, list[tuple[Shape, tuple[str, ...]]]] = {
    "quick": [(Shape(2, 3, 37, 32, torch.float32), peers.NAMES)],
    "cpu": [
        (Shape(8, 12, 197, 64, torch.float32), (*PLAIN, "attnx_eager", "compiled_eager")),
        (Shape(8, 12, 257, 64, torch.float32), FEW),
        (Shape(2, 12, 577, 64, torch.float32), (*PLAIN, "attnx_eager", "compiled_eager")),
        (Shape(1, 16, 1370, 64, torch.float32), (*PLAIN, "attnx_eager", "compiled_eager")),
        (Shape(1, 6, 3601, 64, torch.float32), (*PLAIN, "attnx_eager")),
        *((_vit(batch, 197, torch.float32), FEW) for batch in (1, 2, 32)),
        *((_vit(batch, 577, torch.float32), FEW) for batch in (1, 8)),
        *((_vit(*size), FEW) for size in ((8, 197), (2, 577))),
    ],
    "cuda": [
        *((shape, PLAIN) for shape in MAIN),
        *((shape, ("compiled_eager",)) for shape in MAIN),
        *((shape, PLAIN) for shape in SMALL),
        *((shape, PLAIN[:-1]) for shape in (*LARGE, *HALF)),
    ],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = metafunc.config.getoption("--device"), metafunc.config.getoption("--quick")
    pairs = [(shape, name) for shape, names in PLANS["quick" if quick else device] for name in names]
    ids = [f"{shape} {SHORT[shape.dtype]} {name}" for shape, name in pairs]
    metafunc.parametrize(("shape", "name"), pairs, ids=ids)


class Case:
    """The inputs of a shape, and the results of float64 and of torch for the first input set."""

    def __init__(self, shape: Shape, device: str, quick: bool) -> None:
        size = 3 * shape.dtype.itemsize * shape.B * shape.H * shape.N * shape.D
        count = 2 if device == "cpu" else max(2, min(160, -(-2 * l2_bytes() // size)))
        self.sets = [_inputs(shape, device, seed) for seed in range(count)]
        self.rows = _some_rows(shape, device, quick)
        q, k, v, _ = self.sets[0]
        with torch.inference_mode():
            chosen = q[:, :, self.rows]
            self.exact, self.torch = (_as_tokens(f(chosen, k, v)) for f in (testing.oracle, testing.torch_reference))
            self.score_size = testing.score_size(chosen, k)

    @cached_property
    def floor(self) -> Seconds:
        """SDPA on all input sets."""
        return _timer(peers.sdpa, self.sets)

    def check(self, name: str, answer: peers.Answer) -> dict[str, float]:
        """The largest error of each result.

        Raises:
            AssertionError: an error is too large; the limit for attnx is the error budget of the tests.
        """
        errors = {"output": self._check(name, "output", answer.out[:, self.rows], self.exact[0], self.torch[0], 1.0)}
        if answer.map is not None:
            only = slice(answer.map.shape[1] if answer.map.shape[1] == 1 else None)  # the first row, or all
            got = answer.map if answer.map.shape[1] == 1 else answer.map[:, self.rows]
            errors["map"] = self._check(name, "map", got, self.exact[1][:, only], self.torch[1][:, only])
        if answer.vector is not None:
            errors["vector"] = self._check(name, "vector", answer.vector, *self.vectors)
        return errors

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """r @ map [B, N] in float64 and in fp32."""
        q, k, _, r = self.sets[0]
        with torch.inference_mode():
            return exact.vecmat(r, q, k), exact.vecmat(r, q, k, dtype=torch.float32)

    def _check(
        self, name: str, what: str, got: Tensor, exact: Tensor, of_torch: Tensor, exponent: float | None = None
    ) -> float:
        if name in peers.ATTNX:
            size = self.score_size if exponent is None else exponent
            testing.assert_within_budget(got, exact, of_torch, what, size)
        error = float((got.double() - exact).abs().max())
        limit = 16 * torch.finfo(self.sets[0][0].dtype).eps * float(exact.abs().max())
        assert error <= limit, f"{name}: the {what} is off by {error:.2e}; expected at most {limit:.2e}"
        return error


_case = lru_cache(maxsize=1)(Case)


@pytest.mark.benchmark(group="op", timer=CLOCK)
def test_attention(benchmark: Any, shape: Shape, name: str, device: str, quick: bool, record: Any) -> None:
    found = try_to(lambda: _measure(benchmark, shape, name, device, quick))
    dtype = SHORT[shape.dtype]
    record.measured(f"{name}, {shape} {dtype}", found, suite="op", shape=str(shape), dtype=dtype, contestant=name)


def _measure(benchmark: Any, shape: Shape, name: str, device: str, quick: bool) -> dict[str, Any]:
    call = peers.contestant(name, quick)
    case = _case(shape, device, quick)
    with torch.inference_mode():
        errors = case.check(name, call(*case.sets[0]))
    times = race(_timer(call, case.sets), case.floor, 5.0 if device == "cpu" else 1.5, quick, benchmark)
    peak = memory.cuda_peak_mb(call, case.sets[0])
    kernel = sdpa_kernel_name(*case.sets[0][:3]) if name == "sdpa" else None
    about = dict(kernel=kernel, max_error=max(errors.values()), errors=errors, checked_rows=len(case.rows))
    return dict(timing="graph" if device == "cuda" else "wall", **times, peak_mb=peak, **about)


def sdpa_kernel_name(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Name of the kernel that SDPA chooses, such as FLASH_ATTENTION; None if torch does not report it."""
    try:
        return SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _timer(call: peers.Attention, sets: Sequence[tuple[Tensor, ...]]) -> Seconds:
    return graph_timer(call, sets) if sets[0][0].is_cuda else wall_timer(call, sets)


def _inputs(shape: Shape, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one packed projection, as in a ViT, scores with a standard deviation of 2; r sums to 1."""
    generator = torch.Generator(device).manual_seed(seed)
    B, H, N, D, dtype = shape
    packed = torch.randn(B, N, 3, H, D, device=device, generator=generator)
    packed[:, :, 0] *= 2
    q, k, v = packed.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    r = torch.rand(B, N, device=device, generator=generator)
    return q, k, v, r / r.sum(-1, keepdim=True)


def _some_rows(shape: Shape, device: str, quick: bool) -> Tensor:
    """The rows to check: all, or for large shapes the first, the last and random ones."""
    B, H, N, _, _ = shape
    if not quick and B * H * N * N <= WHOLE:
        return torch.arange(N, device=device)
    inner = torch.randperm(N - 2, generator=torch.Generator().manual_seed(0))[: (8 if quick else ROWS) - 2] + 1
    return torch.tensor([0, *sorted(inner.tolist()), N - 1], device=device)


def _as_tokens(answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return answer[0].transpose(1, 2).flatten(2), answer[1]
