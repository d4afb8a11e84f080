"""Shared test tools for all backends: float64 oracle, error budget, table of shapes, random inputs."""

from attnx.testing.assertions import (
    assert_attention,
    assert_attention_lse,
    assert_gradient_map,
    assert_output,
    assert_stats,
    assert_vecmat,
    assert_within_budget,
    budget,
    score_size,
)
from attnx.testing.cases import LAYOUTS, TABLE, Case, Inputs, random_gradient, random_inputs, random_vector
from attnx.testing.oracle import oracle, oracle_gradient_map, oracle_lse, oracle_stats, oracle_vecmat, torch_reference

__all__ = [
    "LAYOUTS",
    "TABLE",
    "Case",
    "Inputs",
    "assert_attention",
    "assert_attention_lse",
    "assert_gradient_map",
    "assert_output",
    "assert_stats",
    "assert_vecmat",
    "assert_within_budget",
    "budget",
    "oracle",
    "oracle_gradient_map",
    "oracle_lse",
    "oracle_stats",
    "oracle_vecmat",
    "random_gradient",
    "random_inputs",
    "random_vector",
    "score_size",
    "torch_reference",
]
