"""Statistics of each row of weights, on every backend against float64."""

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

import attnx
from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.backends import blocks, eager
from attnx.ops.statistics import grid_places
from attnx.testing import (
    TABLE,
    Case,
    assert_attention,
    assert_stats,
    assert_within_budget,
    oracle_gradient_map,
    oracle_lse,
    oracle_stats,
    random_gradient,
    random_inputs,
    score_size,
)
from on_backends import LONG, on_all, on_all_triton_long, pairs, random_places

NAMES = ("entropy", "distance", "max", "mass")
# Numbers of keys of one tile and of two; the kernels know no other difference.
of_lengths = pytest.mark.parametrize("N", [20, 70])
CASES = tuple(dict.fromkeys(replace(case, heads="mean", rows=None) for case in TABLE))


def call(case):
    return {"is_causal": case.is_causal, "scale": case.scale}


@pairs(CASES, thinned=True)
def test_stats_beside_output_and_map(case, backend, device, poisoned):
    q, k, v, bias = random_inputs(case, device=device)
    places = random_places(case, case.B if case.B % 2 else case.B // 2, device)
    options = dict(bias=bias, stats=NAMES, places=places, prefix=3, backend=backend, **call(case))
    out, amap, stats = attention_with_stats(q, k, v, heads="mean", **options)
    assert tuple(stats) == NAMES
    assert_attention(out, amap, q, k, v, bias, **call(case))
    assert_stats(stats, q, k, bias, **call(case), places=places, prefix=3)
    if backend == "triton" and case.N >= LONG:
        return  # the interpreter takes seconds, and the statistics come from the same launch
    out, amap, alone = attention_with_stats(q, k, None, heads=None, **options)
    assert out is amap is None
    assert_stats(alone, q, k, bias, **call(case), places=places, prefix=3)


@on_all
@of_lengths
@pytest.mark.parametrize("names", [("entropy",), ("mass", "max"), ("distance", "entropy"), ("distance",)])
def test_a_choice_of_stats_in_the_order_asked_for(names, N, backend, device):
    case = Case(M=N, N=N)
    q, k, _, _ = random_inputs(case, device=device)
    options = dict(grid=(N // 10, 9), prefix=N // 10, backend=backend)
    some = attnx.attention_stats(q, k, stats=names, **options)
    every = attnx.attention_stats(q, k, **options)
    assert tuple(some) == names
    for name in names:
        torch.testing.assert_close(some[name], every[name], equal_nan=True, rtol=1e-5, atol=1e-6)


@on_all
@of_lengths
def test_the_lse_given_is_used(backend, N, device):
    case = Case(N=N, mask="BHMN")
    q, k, _, bias = random_inputs(case, device=device)
    places = random_places(case, device=device)
    lse = oracle_lse(q, k, bias).float()
    for empty in (torch.inf, -torch.inf):
        filled = lse.masked_fill(lse == -torch.inf, empty)
        options = dict(heads=None, stats=NAMES, bias=bias, places=places, prefix=2, backend=backend)
        stats = attention_with_stats(q, k, None, **options, lse=filled)[2]
        assert_stats(stats, q, k, bias, places=places, prefix=2)
        halved = attention_with_stats(q, k, None, **options, lse=filled + torch.tensor(2.0).log())[2]
        for name in ("distance", "max", "mass"):
            torch.testing.assert_close(halved[name], stats[name] / 2, equal_nan=True)


@on_all_triton_long
def test_sinks_take_weight_from_every_row(backend, device):
    case = Case(bias="1HMN", N=30)
    q, k, v, bias = random_inputs(case, device=device)
    sinks, places = torch.linspace(-1, 2, case.H, device=device), random_places(case, device=device)
    options = dict(bias=bias, sinks=sinks, places=places, prefix=2, backend=backend)
    out, amap, stats = attention_with_stats(q, k, v, heads="mean", stats=NAMES, **options)
    assert_attention(out, amap, q, k, v, bias, sinks=sinks)
    assert_stats(stats, q, k, bias, places=places, prefix=2, sinks=sinks)
    stats = attention_with_stats(q, k, None, heads=None, stats=NAMES, **options)[2]
    assert_stats(stats, q, k, bias, places=places, prefix=2, sinks=sinks)


def test_softcap(device):
    case = Case(bias="1HMN")
    q, k, v, bias = random_inputs(case, device=device)
    out, amap, stats = attention_with_stats(q, k, v, heads="max", stats=("entropy", "max"), bias=bias, softcap=1.5)
    assert_attention(out, amap, q, k, v, bias, heads="max", softcap=1.5)
    assert_stats(stats, q, k, bias, softcap=1.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_entropy_by_the_vendors_output_is_as_exact(dtype, is_causal, monkeypatch):
    case = Case(M=50, N=50, D=32, dtype=dtype, H=4, Hk=2, is_causal=is_causal)
    q, k, _, _ = random_inputs(case)
    seen = []
    inner = eager.output_and_lse
    monkeypatch.setattr(eager, "output_and_lse", lambda *args: seen.append(1) or inner(*args))
    stats = attnx.attention_stats(q, k, stats=["entropy"], is_causal=is_causal, backend="eager")
    assert seen
    assert_stats(stats, q, k, is_causal=is_causal)


@on_all
def test_one_hot_and_uniform_rows(backend, device):
    """Rows with known answers: all weight on one key, and the same weight on each."""
    N, D = 10, 16
    q, k = torch.zeros(1, 1, N, D, device=device), torch.zeros(1, 1, N, D, device=device)
    k[0, 0, 9] = 1
    q[0, 0, 1] = 1000
    stats = attnx.attention_stats(q, k, grid=(3, 3), prefix=1, backend=backend)
    row = {name: stat[0, 0, 1].item() for name, stat in stats.items()}
    assert row == pytest.approx({"entropy": 0, "distance": 8**0.5, "max": 1, "mass": 0}, abs=1e-6)
    row = {name: stat[0, 0, 5].item() for name, stat in stats.items()}
    around = (4 * 1 + 4 * 2**0.5) / 10
    entropy = torch.tensor(10.0).log().item()
    assert row == pytest.approx({"entropy": entropy, "distance": around, "max": 0.1, "mass": 0.1}, abs=1e-6)
    assert stats["distance"][0, 0, 0].isnan()


@on_all
@of_lengths
def test_same_bits_every_time(backend, N, device):
    case = Case(M=N, N=N, dtype=torch.bfloat16, bias="1HMN")
    q, k, _, bias = random_inputs(case, device=device)
    options = dict(grid=(4, 4), prefix=2, suffix=N - 18, bias=bias, backend=backend)
    one, two = (attnx.attention_stats(q, k, **options) for _ in range(2))
    for name in NAMES:
        assert torch.equal(one[name].nan_to_num(-1), two[name].nan_to_num(-1))


@on_all
@of_lengths
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_of_nan_is_nan_in_every_statistic(value, backend, N, device):
    case = Case(M=N, N=N)
    q, k, _, _ = random_inputs(case, device=device)
    q[0, 1, 7] = value
    expected = oracle_stats(q, k)["entropy"].isnan()
    assert expected.sum() == 1
    stats = attnx.attention_stats(q, k, grid=(4, 4), suffix=N - 16, backend=backend)
    for name in ("entropy", "max"):
        assert torch.equal(stats[name].isnan(), expected), name
    assert stats["distance"][0, 1, 7].isnan()


@on_all
@pytest.mark.parametrize(("B", "M", "N"), [(0, 4, 5), (2, 4, 0), (2, 0, 5)])
def test_nothing_in_zeros_out(B, M, N, backend, device):
    q, k, v, _ = random_inputs(Case(B=B, M=M, N=N, Dv=24), device=device)
    places = random_places(Case(B=B, M=M, N=N), device=device)
    options = dict(stats=NAMES, places=places, backend=backend)
    out, amap, stats = attention_with_stats(q, k, v, heads="mean", **options)
    assert out.shape == (B, 3, M, 24)
    assert amap.shape == (B, M, N)
    assert not out.any()
    assert torch.equal(stats.pop("distance").isnan(), places[0][..., 0].isnan()[:, None].expand(B, 3, M))
    for stat in stats.values():
        assert stat.shape == (B, 3, M)
        assert not stat.any()


def test_eager_makes_no_map():
    q, k, _, _ = random_inputs(Case(B=1, H=8, M=1024, N=1024, D=32))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attnx.attention_stats(q, k, grid=(32, 32), backend="eager")
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 3 * blocks.BLOCK_BYTES


def test_a_grid_of_any_shape_beside_prefix_and_suffix():
    q, k, _, _ = random_inputs(Case(M=20, N=20))
    stats = attnx.attention_stats(q, k, grid=(2, 7), prefix=3, suffix=3)
    assert_stats(stats, q, k, places=(grid_places((2, 7), 3, 20, q.device)[None],) * 2, prefix=3)
    assert stats["distance"].isnan().any(1).all(0).nonzero()[:, 0].tolist() == [0, 1, 2, 17, 18, 19]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_break(compiler, device):
    q, k, _, bias = random_inputs(Case(bias="1HMN", M=20, N=20), device=device)

    def step(q, k):
        stats = attnx.attention_stats(q * 2, k, bias=bias, grid=(4, 4), prefix=1, suffix=3)
        return torch.stack(list(stats.values())) + 1

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(q, k), step(q, k), equal_nan=True)


@on_all_triton_long
@pytest.mark.parametrize("whole", [True, False])
def test_the_operator_is_registered_as_it_behaves(whole, backend, device):
    case = Case(M=5, N=6, bias="1HMN", H=4, Hk=2)
    q, k, v, bias = random_inputs(case, device=device)
    queries_at, keys_at = torch.rand(1, 5, 2, device=device), torch.rand(1, 6, 2, device=device)
    parts = (v, bias, False, 0.3, 0.0, "mean") if whole else (None, None, True, 0.3, 0.0, "")
    opcheck(torch.ops.attnx.row_statistics, (q, k, *parts, None, 15, queries_at, keys_at, 1, backend))


def test_results_are_detached_and_autocast_casts_as_sdpa_does(device):
    q, k, _, _ = (None if t is None else t.requires_grad_() for t in random_inputs(Case(), device=device))
    with torch.autocast(device.type, torch.bfloat16):
        stats = attnx.attention_stats(q, k, stats=["entropy"])
    assert not stats["entropy"].requires_grad
    assert_stats(stats, q.detach().to(torch.bfloat16), k.detach().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stats": ()}, r"stats: expected a sequence of entropy, distance, max, mass; got \(\)"),
        ({"stats": "entropy"}, r"stats: expected a sequence of entropy, .*; got 'entropy'"),
        ({"stats": ["variance"]}, r"stats: expected names among entropy, .*; got 'variance'"),
        ({"grid": None}, r"grid: expected \(rows, columns\) of patches for stats='distance'; got None"),
        ({"grid": (2, 0)}, r"grid: expected \(rows, columns\) .*; got \(2, 0\)"),
        ({"grid": 4}, r"grid: expected \(rows, columns\) .*; got 4"),
        ({"grid": (2, 3)}, r"grid: expected .* of prefix \+ grid = 0 \+ 2 x 3 tokens; got 4 queries and 4 keys"),
        ({"grid": (1, 3)}, r"grid: expected .* of prefix \+ grid = 0 \+ 1 x 3 tokens; got 4 queries and 4 keys"),
        ({"grid": (1, 1), "prefix": 1, "suffix": 1}, r"grid: expected .* = 1 \+ 1 x 1 \+ 1 tokens; got 4 queries"),
        ({"suffix": -1}, r"suffix: expected a number of tokens in 0\.\.4; got -1"),
        ({"k": torch.zeros(2, 3, 5, 8)}, r"grid: expected queries and keys .*; got 4 queries and 5 keys"),
        ({"prefix": 5}, r"prefix: expected a number of tokens in 0\.\.4; got 5"),
        ({"prefix": True}, r"prefix: expected a number of tokens in 0\.\.4; got True"),
        ({"lse": torch.zeros(2, 3, 5)}, r"lse: expected float32 \[2, 3, 4\] on cpu; got torch\.float32 \[2, 3, 5\]"),
        ({"bias": torch.zeros(5, 4)}, r"bias: expected a shape that broadcasts to \[2, 3, 4, 4\]; got \[5, 4\]"),
        ({"backend": "cuda"}, r"backend: expected one of .*triton.*; got 'cuda'"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change, message):
    q = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=message):
        attnx.attention_stats(**{"q": q, "k": q, "grid": (2, 2), **change})


def test_distances_need_places():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="stats: 'distance' needs the places of the patches"):
        attention_with_stats(q, q, q, heads=None, stats=["distance"])


@pairs(CASES, thinned=True)
def test_importance_is_the_magnitude_of_weights_times_gradients(case, backend, device, poisoned):
    q, k, v, bias = random_inputs(case, device=device)
    grad = random_gradient(case, device=device)
    options = dict(bias=bias, backend=backend, **call(case))
    ours = attnx.row_importance(grad, q, k, v, **options)
    exact, reference = (
        oracle_gradient_map(grad, q, k, v, bias, **call(case), heads="each", clamp=False, dtype=dtype).abs().sum(-1)
        for dtype in (torch.float64, torch.promote_types(q.dtype, torch.float32))
    )
    assert ours.dtype == torch.float32
    size = 1 + score_size(q, k, bias, **call(case))
    assert_within_budget(ours, exact, reference, "importance", size)
    assert not ours[exact == 0].any()
    if backend == "triton" and case.N >= LONG:
        return
    lse = attnx.attention_lse(q, k, v, **options)[1]
    assert_within_budget(attnx.row_importance(grad, q, k, v, lse=lse, **options), exact, reference, "importance", size)
    assert torch.equal(attnx.row_importance(grad, q, k, v, **options), ours)


@on_all_triton_long
def test_importance_beside_sinks(backend, device):
    q, k, v, _ = random_inputs(Case(), device=device)
    grad, sinks = random_gradient(Case(), device=device), torch.linspace(-1, 2, 3, device=device)
    ours = attnx.row_importance(grad, q, k, v, sinks=sinks, backend=backend)
    exact = oracle_gradient_map(grad, q, k, v, heads="each", clamp=False, sinks=sinks).abs().sum(-1)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@on_all_triton_long
@pytest.mark.parametrize(("B", "M", "N", "Dv"), [(0, 4, 5, 16), (2, 4, 0, 16), (2, 0, 5, 16), (2, 4, 5, 0)])
def test_no_importance_without_rows_keys_or_values(B, M, N, Dv, backend, device):
    q, k, v, _ = random_inputs(Case(B=B, M=M, N=N, Dv=Dv), device=device)
    ours = attnx.row_importance(torch.ones(B, 3, M, Dv, device=device), q, k, v, backend=backend)
    assert ours.shape == (B, 3, M)
    assert not ours.any()


@on_all_triton_long
def test_the_operator_of_importance_is_registered_as_it_behaves(backend, device):
    case = Case(M=5, N=6, bias="1HMN", H=4, Hk=2)
    q, k, v, bias = random_inputs(case, device=device)
    grad = random_gradient(case, device=device)
    opcheck(torch.ops.attnx.importance_of_rows, (grad, q, k, v, bias, False, 0.3, 0.0, None, backend))


def test_importance_needs_a_gradient_of_the_outputs_shape():
    q = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"grad: expected torch\.float32 \[2, 3, 4, 8\] on cpu; got .* \[2, 3, 4\]"):
        attnx.row_importance(q[..., 0], q, q, q)
