"""Parametrizations that the tests of the op share: every backend, and both lengths of rows."""

import pytest
import torch

TAKES = {
    "eager": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "native": (torch.bfloat16, torch.float32),
    "triton": (torch.float16, torch.bfloat16, torch.float32),
}
SHORT, LONG = 20, 300  # keys: Triton's one-pass kernel takes the first, its forward and map kernels the second

on_all = pytest.mark.parametrize("backend", TAKES)
of_both_lengths = pytest.mark.parametrize("N", [SHORT, LONG])


def pairs(cases):
    """Every case on every backend that takes its dtype."""
    return pytest.mark.parametrize(
        ("case", "backend"),
        [
            pytest.param(case, backend, id=f"{backend}-{case}")
            for case in cases
            for backend, dtypes in TAKES.items()
            if case.dtype in dtypes
        ],
    )
