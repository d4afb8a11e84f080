"""r @ map without the map, and output with log-sum-exp, on every backend against float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import attnx
from attnx.ops.backends import blocks, eager, vendor
from attnx.ops.scores import Scores
from attnx.testing import (
    TABLE,
    Case,
    assert_attention,
    assert_attention_lse,
    assert_vecmat,
    oracle_lse,
    random_inputs,
    random_vector,
)
from on_backends import LONG, of_both_lengths, on_all, on_all_triton_long, pairs

# vecmat has no options `heads` and `rows`, so those of the table are removed.
CASES = tuple(dict.fromkeys(replace(case, heads="mean", rows=None) for case in TABLE))


@pytest.fixture
def by_blocks(monkeypatch):
    """Disable the vendor's kernel."""
    monkeypatch.setattr(eager, "output_and_lse", lambda *args: None)


def call(case):
    return {"is_causal": case.is_causal, "scale": case.scale}


@pairs(CASES, thinned=True)
def test_vecmat(case, backend, device, poisoned):
    q, k, _, bias = random_inputs(case, device=device)
    r = random_vector(case, device=device)
    passed = attnx.vecmat(r, q, k, bias=bias, backend=backend, **call(case))
    assert_vecmat(passed, r, q, k, bias, **call(case))


@pairs(CASES, thinned=True)
def test_output_and_lse_and_what_is_made_of_it(case, backend, device, poisoned):
    q, k, v, bias = random_inputs(case, device=device)
    r = random_vector(case, device=device)
    out, lse = attnx.attention_lse(q, k, v, bias=bias, backend=backend, **call(case))
    assert_attention_lse(out, lse, q, k, v, bias, **call(case))
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    passed = attnx.vecmat(r, q, k, bias=bias, lse=lse, backend=backend, **call(case))
    assert_vecmat(passed, r, q, k, bias, **call(case))
    amap = attnx.attention_map(q, k, bias=bias, lse=lse, backend=backend, **call(case))
    assert_attention(None, amap, q, k, v, bias, **call(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_lse_by_blocks(case, device, poisoned, by_blocks):
    q, k, v, bias = random_inputs(case, device=device)
    out, lse = attnx.attention_lse(q, k, v, bias=bias, backend="eager", **call(case))
    assert_attention_lse(out, lse, q, k, v, bias, **call(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_vendor_serves_on_a_cpu(case):
    inputs = random_inputs(case)
    bias = None if inputs.bias is None else inputs.bias[(None,) * (4 - inputs.bias.dim())]
    scale = case.D**-0.5 if case.scale is None else case.scale
    served = vendor.output_and_lse(Scores(inputs.q, inputs.k, bias, case.is_causal, scale), inputs.v)
    repeats = "P" in case.bias + case.mask
    refused = repeats or case.layout == "strided" or case.Dv not in (None, case.D) or (case.is_causal and scale <= 0)
    assert (served is None) == refused


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
@pytest.mark.parametrize(("M", "D"), [(300, 64), (577, 64), (1024, 128), (257, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_what_the_vendor_serves_on_a_gpu_is_exact(kernel, dtype, M, D, layout, is_causal, device):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = Case(B=1, H=2, M=M, N=M, D=D, dtype=dtype, layout=layout)
    q, k, v, _ = random_inputs(case, device=device)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        try:
            F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            pytest.skip(f"torch has no {kernel} kernel for these inputs on this GPU")
        served = vendor.output_and_lse(Scores(q, k, None, is_causal, D**-0.5), v)
    if kernel == "EFFICIENT_ATTENTION":
        assert served is None
        return
    if not (8, 0) <= torch.cuda.get_device_capability(device) < (10, 0) or torch.version.hip is not None:
        pytest.skip("the vendor's log-sum-exp is used on Ampere, Ada and Hopper only")
    out, lse = served
    assert_attention_lse(out, lse, q, k, v, None, is_causal)
    assert out.transpose(1, 2).is_contiguous()
    amap = attnx.attention_map(q, k, is_causal=is_causal, lse=lse)
    assert_attention(out, amap, q, k, v, None, is_causal)


def test_the_cpus_output_and_lse_are_the_vendors(monkeypatch):
    seen = []
    monkeypatch.setattr(eager, "output_and_lse", lambda *args: seen.append(vendor.output_and_lse(*args)) or seen[-1])
    q, k, v, _ = random_inputs(Case(dtype=torch.bfloat16))
    out, lse = attnx.attention_lse(q, k, v, backend="eager")
    assert torch.equal(out, seen[0][0])
    assert torch.equal(lse, seen[0][1])


@on_all
@of_both_lengths
def test_a_unit_vector_gives_a_row(backend, N, device):
    case = Case(N=N, is_causal=True, bias="1HMN")
    q, k, _, bias = random_inputs(case, device=device)
    amap = attnx.attention_map(q, k, bias=bias, is_causal=True, backend=backend)
    for i in (0, 1, 7, 19):
        r = torch.zeros(2, 20, device=device)
        r[:, i] = 1
        row = attnx.vecmat(r, q, k, bias=bias, is_causal=True, backend=backend)
        torch.testing.assert_close(row, amap[:, i], rtol=1e-5, atol=1e-8)


@on_all
@of_both_lengths
def test_vecmat_is_linear_and_sums_to_the_rows_with_keys(backend, N, device):
    case = Case(N=N, mask="BHMN")
    q, k, v, mask = random_inputs(case, device=device)
    a, b = random_vector(case, 1, device), random_vector(case, 2, device)
    one, two, both = (attnx.vecmat(r, q, k, bias=mask, backend=backend) for r in (a, b, 2 * a - b))
    torch.testing.assert_close(both, 2 * one - two, rtol=1e-4, atol=1e-6)
    lse = attnx.attention_lse(q, k, v, bias=mask, backend=backend)[1]
    sums = (lse > -torch.inf).float().mean(1)
    assert 0 < sums.sum() < sums.numel()
    torch.testing.assert_close(one.sum(-1), (a * sums).sum(-1))


@on_all
@of_both_lengths
def test_the_lse_given_is_used(backend, N, device):
    case = Case(N=N)
    q, k, _, _ = random_inputs(case, device=device)
    r = random_vector(case, device=device)
    lse = oracle_lse(q, k).float()
    plain = attnx.vecmat(r, q, k, backend=backend)
    torch.testing.assert_close(attnx.vecmat(r, q, k, lse=lse, backend=backend), plain)
    halved = attnx.vecmat(r, q, k, lse=lse + torch.tensor(2.0).log(), backend=backend)
    torch.testing.assert_close(halved, plain / 2)


@on_all
@pytest.mark.parametrize("mask", ["B1MN", "BHMN"])
@of_both_lengths
def test_rows_without_keys_may_have_either_infinity(backend, N, mask, device):
    case = Case(N=N, mask=mask)
    q, k, _, bias = random_inputs(case, device=device)
    r = 1 + random_vector(case, device=device)
    lse = oracle_lse(q, k, bias).float()
    for empty in (torch.inf, -torch.inf):
        filled = lse.masked_fill(lse == -torch.inf, empty)
        assert_vecmat(attnx.vecmat(r, q, k, bias=bias, lse=filled, backend=backend), r, q, k, bias)


@on_all
@of_both_lengths
@pytest.mark.parametrize("given", [True, False])
def test_same_bits_every_time(backend, N, given, device):
    case = Case(N=N, dtype=torch.bfloat16, bias="1HMN")
    q, k, v, bias = random_inputs(case, device=device)
    r = random_vector(case, device=device)
    first, second = (attnx.attention_lse(q, k, v, bias=bias, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    lse = first[1] if given else None
    one, two = (attnx.vecmat(r, q, k, bias=bias, lse=lse, backend=backend) for _ in range(2))
    assert torch.equal(one, two)


@on_all
@of_both_lengths
def test_a_row_of_nan_is_seen_unless_its_r_is_zero(backend, N, device):
    case = Case(N=N)
    q, k, v, _ = random_inputs(case, device=device)
    q[0, 1, 7] = torch.nan
    r = 1 + random_vector(case, device=device)
    lse = attnx.attention_lse(q, k, v, backend=backend)[1]
    assert lse.isnan().sum() == 1
    for known in (None, lse):
        passed = attnx.vecmat(r, q, k, lse=known, backend=backend)
        assert passed[0].isnan().all()
        assert passed[1].isfinite().all()
        zero = r.clone()
        zero[0, 7] = 0
        passed = attnx.vecmat(zero, q, k, lse=known, backend=backend)
        clean = attnx.vecmat(zero, q.nan_to_num(), k, backend=backend)
        torch.testing.assert_close(passed, clean)


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("blocks", [True, False])
def test_nan_and_inf_of_the_output_are_where_sdpa_has_them(blocks, value, where, monkeypatch):
    if blocks:
        monkeypatch.setattr(eager, "output_and_lse", lambda *args: None)
    inputs = random_inputs(Case(B=1, H=2, N=LONG))
    getattr(inputs, where)[0, 1, 7, 3] = value
    q, k, v, _ = inputs
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out, lse = attnx.attention_lse(q, k, v, backend="eager")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected.isnan().any(-1))


def test_a_cpu_computes_only_the_rows_that_count():
    rows = []

    class Watch(TorchDispatchMode):
        """Records the number of rows of scores that are computed for each head."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.baddbmm.out:
                rows.append(args[1].shape[1])
            return func(*args, **(kwargs or {}))

    case = Case(M=LONG, N=LONG, is_causal=True, bias="BHMN")
    q, k, v, bias = random_inputs(case)
    for used in ([], [7], [0, 299], range(300)):
        r = torch.zeros(2, 300)
        r[:, list(used)] = 1
        rows.clear()
        with Watch():
            passed = eager.vecmat(Scores(q, k, bias, True, case.D**-0.5), r, None)
        assert rows == ([len(used)] * case.H if used else [])
        assert_vecmat(passed, r, q, k, bias, True)
        lse = attnx.attention_lse(q, k, v, bias=bias, is_causal=True, backend="eager")[1]
        known = attnx.vecmat(r, q, k, bias=bias, is_causal=True, lse=lse, backend="eager")
        torch.testing.assert_close(known, passed)


@on_all
@of_both_lengths
def test_strides_of_r_and_items_of_the_batch(backend, N, device):
    case = Case(B=3, N=N, mask="B1MN")
    q, k, _, mask = random_inputs(case, device=device)
    r = random_vector(case, device=device)
    passed = attnx.vecmat(r, q, k, bias=mask, backend=backend)
    strided = torch.full((20, 7), torch.nan, device=device)[:, 1::2].T
    strided.copy_(r)
    assert torch.equal(attnx.vecmat(strided, q, k, bias=mask, backend=backend), passed)
    same = r[:1].expand(3, -1)
    assert torch.equal(
        attnx.vecmat(same, q, k, bias=mask, backend=backend),
        attnx.vecmat(same.contiguous(), q, k, bias=mask, backend=backend),
    )
    order = torch.tensor([2, 0, 1], device=device)
    shuffled = attnx.vecmat(r[order], q[order], k[order], bias=mask[order], backend=backend)
    assert torch.equal(shuffled, passed[order])


@on_all
@pytest.mark.parametrize(("B", "M", "N"), [(0, 4, 5), (2, 4, 0), (2, 0, 5)])
def test_nothing_in_zeros_out(B, M, N, backend, device):
    q, k, v, _ = random_inputs(Case(B=B, M=M, N=N, Dv=24), device=device)
    passed = attnx.vecmat(torch.ones(B, M, device=device), q, k, backend=backend)
    assert passed.shape == (B, N)
    assert not passed.any()
    out, lse = attnx.attention_lse(q, k, v, backend=backend)
    assert out.shape == (B, 3, M, 24)
    assert not out.any()
    assert lse.shape == (B, 3, M)
    assert (lse == -torch.inf).all()


def test_eager_makes_no_map():
    H, N = 8, 1024
    q, k, v, _ = random_inputs(Case(B=1, H=H, M=N, N=N, D=32))
    r, lse = torch.rand(1, N), torch.zeros(1, H, N)
    block = blocks.BLOCK_BYTES
    for work in (
        lambda: attnx.vecmat(r, q, k, backend="eager"),
        lambda: attnx.vecmat(r, q, k, lse=lse, backend="eager"),
        lambda: attnx.attention_lse(q, k, v, backend="eager"),
        lambda: attnx.attention_lse(q, k, v[..., :24], backend="eager"),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        assert max(event.self_cpu_memory_usage for event in profile.events()) <= block


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_break(compiler, device):
    q, k, v, bias = random_inputs(Case(bias="1HMN", N=24), device=device)
    r = random_vector(Case(), device=device)

    def run(step):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse, passed = step(*leaves)
        out.sum().backward()
        return out, lse, passed, *(t.grad for t in leaves)

    def step(q, k, v):
        out, lse = attnx.attention_lse(q * 2, k, v, bias=bias)
        return out + 1, lse * 1, attnx.vecmat(r, q * 2, k, bias=bias, lse=lse) * 3

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for ours, expected in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(ours, expected)


@on_all_triton_long
@pytest.mark.parametrize(
    "case",
    [
        Case(M=5, N=6),
        Case(M=5, N=6, bias="1HMN", H=4, Hk=2, layout="strided"),
        Case(M=6, N=6, mask="B11N", layout="packed", is_causal=True),
        Case(M=6, N=6, layout="packed", dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_operators_are_registered_as_they_behave(case, backend, device):
    q, k, v, bias = random_inputs(case, device=device)
    leaves = [None if t is None else t.requires_grad_(t.is_floating_point()) for t in (q, k, v, bias)]
    opcheck(torch.ops.attnx.attention_lse, (*leaves, case.is_causal, 0.3, 0.0, backend))
    q, k, v, bias = (None if t is None else t.detach() for t in leaves)
    r = random_vector(case, device=device)
    for lse in (None, torch.zeros(q.shape[:3], device=device)):
        opcheck(torch.ops.attnx.vecmat, (r, q, k, bias, case.is_causal, 0.3, 0.0, lse, backend))


def test_autocast_casts_as_sdpa_does(device):
    q, k, v, bias = random_inputs(Case(bias="1HMN"), device=device)
    r = random_vector(Case(), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out, lse = attnx.attention_lse(q, k, v, bias=bias)
        passed = attnx.vecmat(r, q, k, bias=bias, lse=lse)
    q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    assert_attention_lse(out, lse, q, k, v, bias)
    assert_vecmat(passed, r, q, k, bias)


def test_what_is_detached(device):
    q, k, v, bias = (t.requires_grad_() for t in random_inputs(Case(bias="1HMN"), device=device))
    out, lse = attnx.attention_lse(q, k, v, bias=bias)
    assert out.requires_grad
    assert not lse.requires_grad
    r = random_vector(Case(), device=device).requires_grad_()
    assert not attnx.vecmat(r, q, k, bias=bias, lse=out.sum(-1)).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(2, 5)}, r"r: expected float32 \[2, 4\] on cpu; got torch\.float32 \[2, 5\] on cpu"),
        ({"r": torch.zeros(2, 4).double()}, r"r: expected float32 \[2, 4\] on cpu; got torch\.float64"),
        ({"r": torch.zeros(2, 4, device="meta")}, r"r: expected float32 \[2, 4\] on cpu; got .* on meta"),
        ({"r": None}, r"r: expected a tensor; got NoneType"),
        ({"r": [0.0]}, r"r: expected a tensor; got list"),
        ({"lse": torch.zeros(2, 3, 5)}, r"lse: expected float32 \[2, 3, 4\] on cpu; got torch\.float32 \[2, 3, 5\]"),
        ({"lse": 1.0}, r"lse: expected a tensor; got float"),
        ({"k": torch.zeros(2, 2, 5, 8)}, r"k: expected a number of heads that divides q's 3; got 2"),
        ({"bias": torch.zeros(5, 4)}, r"bias: expected a shape that broadcasts to \[2, 3, 4, 5\]; got \[5, 4\]"),
        ({"backend": "cuda"}, r"backend: expected one of .*triton.*; got 'cuda'"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change, message):
    arguments = {"r": torch.zeros(2, 4), "q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 5, 8), **change}
    with pytest.raises(ValueError, match=message):
        attnx.vecmat(**arguments)
    if not change.keys() & {"r", "lse"}:
        del arguments["r"]
        with pytest.raises(ValueError, match=message):
            attnx.attention_lse(**arguments, v=arguments["k"])


def test_a_named_backend_says_every_reason_why_it_cannot(device):
    q = torch.zeros(2, 3, 4, 1040, dtype=torch.float64, device=device)
    message = r"backend='triton' can't .*: head dim 1040 is above 1024; dtype torch\.float64 is not float16"
    for work in (
        lambda: attnx.vecmat(torch.zeros(2, 4, device=device), q, q, backend="triton"),
        lambda: attnx.attention_lse(q, q, q, backend="triton"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            work()
