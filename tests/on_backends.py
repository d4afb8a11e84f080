"""Parametrizations shared by the tests of the op: every backend, and short and long rows."""

from importlib import import_module

import pytest
import torch

from attnx.ops.reducers import Reduction

TAKES = {
    "eager": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "native": (torch.bfloat16, torch.float32),
    "triton": (torch.float16, torch.bfloat16, torch.float32),
}
# Numbers of keys: Triton's one-pass kernel takes the first, its forward and map kernels the second.
SHORT, LONG = 20, 300


def marks_of(backend):
    """The marks of a test of the backend."""
    return [pytest.mark.triton_kernels] if backend == "triton" else []


on_all = pytest.mark.parametrize("backend", [pytest.param(name, marks=marks_of(name)) for name in TAKES])
# The same; with Triton `long`.
on_all_triton_long = pytest.mark.parametrize(
    "backend", ["eager", "native", pytest.param("triton", marks=[*marks_of("triton"), pytest.mark.long])]
)
of_both_lengths = pytest.mark.parametrize("N", [SHORT, LONG])


def takes(backend, case):
    """True if the backend takes the case's dtype and reduction."""
    if backend == "eager":
        return True
    module = import_module(f"attnx.ops.backends.{backend}")
    return case.dtype in TAKES[backend] and Reduction.parse(case.heads) in module.REDUCTIONS


def pairs(cases, thinned=False):
    """Every case on every backend that takes it.

    In the interpreter, Triton's cases of many keys take seconds: two of three are `long`. `thinned`: every second of
    Triton's cases is `slow`.
    """

    def marks(i, backend):
        found = marks_of(backend)
        if backend == "triton" and cases[i].N >= LONG and i % 3:
            found.append(pytest.mark.long)
        if backend == "triton" and thinned and i % 2:
            found.append(pytest.mark.slow)
        return found

    return pytest.mark.parametrize(
        ("case", "backend"),
        [
            pytest.param(case, backend, id=f"{backend}-{case}", marks=marks(i, backend))
            for i, case in enumerate(cases)
            for backend in TAKES
            if takes(backend, case)
        ],
    )


def random_places(case, count=1, device="cpu"):
    """Places (queries [P, M, 2], keys [P, N, 2]): every seventh query and every fifth key has none."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(count, n, 2, generator=generator) * 10 for n in (case.M, case.N))
    queries[:, 3::7] = torch.nan
    keys[:, 4::5] = torch.nan
    return queries.to(device), keys.to(device)
