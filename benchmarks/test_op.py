"""One attention call, with and without its map. Each contestant is held to float64 before it is timed."""

import os
import shutil
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnx import testing
from benchmarks import peers
from benchmarks.timing import CLOCK, Seconds, cuda_peak_mb, graph_timer, race, wall_timer


class Shape(NamedTuple):
    B: int
    H: int
    N: int
    D: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return "x".join(map(str, self[:4]))


def _cuda_shapes() -> list[Shape]:
    sizes = ((64, 197), (64, 257), (16, 577), (4, 1370), (1, 4097))
    return [Shape(b, 12, n, 64, torch.bfloat16) for b, n in sizes] + [Shape(64, 12, 197, 64, torch.float16)]


SHAPES = {
    "cpu": [
        Shape(8, 12, 197, 64, torch.float32),
        Shape(2, 12, 577, 64, torch.float32),
        Shape(1, 16, 1370, 64, torch.float32),
        Shape(1, 6, 3601, 64, torch.float32),
    ],
    "cuda": _cuda_shapes(),
    "quick": [Shape(2, 3, 37, 32, torch.float32)],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = metafunc.config.getoption("--device"), metafunc.config.getoption("--quick")
    shapes = SHAPES["quick" if quick else device]
    # Compiling takes a CPU longer than all the rest: one shape there.
    compiled = [] if quick else shapes if device == "cuda" else shapes[:1]
    pairs = [(s, name) for s in shapes for name in peers.ATTENTION if name != "compiled_eager" or s in compiled]
    ids = [f"{shape}-{_short(shape.dtype)}-{name}" for shape, name in pairs]
    metafunc.parametrize(("shape", "name"), pairs, ids=ids)


class Case:
    """The inputs of a shape, what float64 makes of the first set, and what torch itself makes of it."""

    def __init__(self, shape: Shape, device: str) -> None:
        size = 3 * 2 * shape.B * shape.H * shape.N * shape.D
        count = 2 if device == "cpu" else max(2, min(8, 2 * _l2_bytes() // size + 1))
        self.sets = [_qkv(shape, device, seed) for seed in range(count)]
        with torch.inference_mode():
            self.exact, self.torch = (_as_tokens(f(*self.sets[0])) for f in (testing.oracle, testing.torch_reference))
            self.score_size = testing.score_size(*self.sets[0][:2])

    def check(self, name: str, answer: peers.Answer) -> float:
        """The largest error; attnx within the budget of the tests, the others near enough to be the same computation.

        Raises:
            AssertionError: it is larger than that.
        """
        eps = torch.finfo(self.sets[0][0].dtype).eps
        largest = 0.0
        for what, got, exact, of_torch in zip(("output", "map"), answer, self.exact, self.torch, strict=True):
            if got is None:
                continue
            if what == "map":
                exact, of_torch = (t[:, : got.shape[1]] for t in (exact, of_torch))
            if name.startswith("attnx"):
                testing.assert_within_budget(got, exact, of_torch, what, self.score_size if what == "map" else 1.0)
            error = float((got.double() - exact).abs().max())
            assert error <= 16 * eps * float(exact.abs().max()), f"{name}: the {what} is off by {error:.2e}"
            largest = max(largest, error)
        return largest


_case = lru_cache(maxsize=1)(Case)


@pytest.mark.benchmark(group="op", timer=CLOCK)
def test_attention(benchmark: Any, shape: Shape, name: str, device: str, quick: bool) -> None:
    if name == "compiled_eager" and device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler for the CPU")
    case = _case(shape, device)
    call = peers.ATTENTION[name]()
    with torch.inference_mode():
        error = case.check(name, call(*case.sets[0]))
    contestant, how = _timer(call, case, device)
    floor, _ = _timer(peers.sdpa, case, device)
    benchmark.extra_info.update(
        shape=str(shape),
        dtype=_short(shape.dtype),
        contestant=name,
        timing=how,
        max_error=error,
        peak_mb=cuda_peak_mb(call, case.sets[0]),
    )
    race(benchmark, contestant, floor, quick)


def _timer(call: peers.Attention, case: Case, device: str) -> tuple[Seconds, str]:
    return (wall_timer(call, case.sets), "wall") if device == "cpu" else graph_timer(call, case.sets)


def _qkv(shape: Shape, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one packed projection, as in a ViT; scores with a spread of 2."""
    generator = torch.Generator(device).manual_seed(seed)
    B, H, N, D, dtype = shape
    packed = torch.randn(B, N, 3, H, D, device=device, generator=generator)
    packed[:, :, 0] *= 2
    q, k, v = packed.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _as_tokens(answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return answer[0].transpose(1, 2).flatten(2), answer[1]


def _l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
