"""One attention call, with and without its map. Each contestant is held to float64 before it is timed."""

import os
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

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
    metafunc.parametrize(("case", "name"), pairs, ids=ids, indirect=["case"], scope="module")


class Case:
    """The inputs of a shape, what float64 makes of the first set, and how far torch's own arithmetic is from that."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        size = 3 * 2 * shape.B * shape.H * shape.N * shape.D
        count = 2 if device == "cpu" else max(2, min(8, 2 * _l2_bytes() // size + 1))
        self.sets = [_qkv(shape, device, seed) for seed in range(count)]
        self.oracle = _oracle(*self.sets[0])
        with torch.inference_mode():
            self.torch_errors = self.errors(peers.hf_eager(*self.sets[0]))

    def errors(self, answer: peers.Answer) -> list[float]:
        """Largest difference from float64 of the output and, if there is one, of the map (or its first rows)."""
        out, amap = answer
        found = [_distance(out, self.oracle[0])]
        return found if amap is None else [*found, _distance(amap, self.oracle[1][:, : amap.shape[1]])]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, device: str) -> Case:
    return Case(request.param, device)


@pytest.mark.benchmark(group="op", timer=CLOCK)
def test_attention(benchmark: Any, case: Case, name: str, device: str, quick: bool) -> None:
    if name == "compiled_eager" and device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler for the CPU")
    call = peers.ATTENTION[name]()
    with torch.inference_mode():
        errors = case.errors(call(*case.sets[0]))
    _check(name, errors, case)

    contestant, how = _timer(call, case, device)
    floor, _ = _timer(peers.sdpa, case, device)
    benchmark.extra_info.update(
        shape=str(case.shape),
        dtype=_short(case.shape.dtype),
        contestant=name,
        timing=how,
        max_error=max(errors),
        peak_mb=cuda_peak_mb(call, case.sets[0]),
    )
    race(benchmark, contestant, floor, quick)


def _check(name: str, errors: list[float], case: Case) -> None:
    """attnx within twice the error of torch in the same dtype; the others near enough to be the same computation."""
    eps = torch.finfo(case.shape.dtype).eps
    for what, error, of_torch, exact in zip(("output", "map"), errors, case.torch_errors, case.oracle, strict=False):
        largest = float(exact.abs().max())
        budget = 2 * of_torch + eps * largest if name.startswith("attnx") else 16 * eps * largest
        assert error <= budget, f"{name}: the {what} is off by {error:.2e}; expected at most {budget:.2e}"


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


def _oracle(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output as tokens, and mean map, in float64, an item at a time."""
    outs, maps = [], []
    for item in zip(q, k, v, strict=True):
        qi, ki, vi = (t.double() for t in item)
        p = torch.softmax(qi @ ki.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
        outs.append((p @ vi).transpose(0, 1).flatten(1))
        maps.append(p.mean(0))
    return torch.stack(outs), torch.stack(maps)


def _distance(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape, f"expected {list(exact.shape)}; got {list(got.shape)}"
    return float((got.double() - exact).abs().max())


def _l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
