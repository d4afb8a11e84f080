"""The op beyond its results: code paths, memory, compile, autocast and errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import attnx
from attnx import testing
from attnx.ops.backends import blocks, eager, native
from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores
from attnx.testing import Case, assert_attention, random_inputs
from on_backends import LONG, SHORT, on_all, on_all_triton_long

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that the Triton backend launches, in order."""
    from attnx.kernels.configs import Launch

    names, run = [], Launch.run

    def spy(launch):
        names.append(launch.kernel.fn.__name__.removesuffix("_kernel"))
        run(launch)

    monkeypatch.setattr(Launch, "run", spy)
    return names


@pytest.fixture
def on_cpu(monkeypatch):
    """The backend and name of every function of the eager and native backends that was called, in order."""
    names = []

    def spy_on(module, name):
        call = getattr(module, name)
        said = f"{module.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(module, name, lambda *args: (names.append(said), call(*args))[1])

    for module in (eager, native):
        for name in ("attention", "attention_map", "attention_lse", "vecmat"):
            spy_on(module, name)
    return names


@pytest.mark.triton_kernels
@pytest.mark.parametrize(
    ("N", "call", "options", "kernels"),
    [
        (SHORT, "attention", {}, ["one_pass"]),
        (SHORT, "attention", {"rows": [1]}, ["forward", "map"]),
        (SHORT, "attention_map", {}, ["one_pass"]),
        (SHORT, "attention_map", {"lse": True}, ["map"]),
        (LONG, "attention", {}, ["forward", "map"]),
        (LONG, "attention", {"rows": [1]}, ["forward", "map"]),
        (LONG, "attention_map", {}, ["forward", "map"]),
        (LONG, "attention_map", {"lse": True}, ["map"]),
    ],
)
def test_the_kernels_that_run(N, call, options, kernels, launched, on_cpu, device):
    q, k, v, _ = random_inputs(Case(N=N), device=device)
    if "lse" in options:
        options = {"lse": torch.zeros(q.shape[:3], device=device)}
    getattr(attnx, call)(*(q, k, v)[: 3 if call == "attention" else 2], backend="triton", **options)
    assert launched == kernels
    assert not on_cpu


@pytest.mark.parametrize(
    ("dtype", "D", "gpu", "cpu"),
    [
        (torch.float16, 16, "triton", "eager"),
        (torch.bfloat16, 16, "triton", "native"),
        (torch.float64, 16, "eager", "eager"),
        (torch.float32, 320, "eager", "native"),  # wide heads: not timed on GPUs
    ],
)
def test_auto_is_the_devices_own_backend_wherever_it_can_and_else_eager(dtype, D, gpu, cpu, launched, on_cpu, device):
    q, k, v, _ = random_inputs(Case(D=D, dtype=dtype), device=device)
    attnx.attention(q, k, v)
    attnx.attention_map(q, k)
    if device.type == "cuda" and gpu == "triton":
        assert (launched, on_cpu) == (["one_pass", "one_pass"], [])
    else:
        expected = gpu if device.type == "cuda" else cpu
        assert (launched, on_cpu) == ([], [f"{expected}.attention", f"{expected}.attention_map"])


@on_all
@pytest.mark.parametrize(
    ("B", "M", "N", "rows"), [(0, 4, 5, None), (2, 4, 0, None), (2, 0, 5, None), (0, 4, 5, [1]), (2, 4, 0, [3, 3])]
)
def test_nothing_in_zeros_out(B, M, N, rows, backend, device):
    q, k, v, _ = random_inputs(Case(B=B, M=M, N=N, Dv=24), device=device)
    for heads in ("mean", "each"):
        out, amap = attnx.attention(q, k, v, heads=heads, rows=rows, backend=backend)
        chosen = M if rows is None else len(rows)
        assert amap.shape == ((B, 3, chosen, N) if heads == "each" else (B, chosen, N))
        assert out.shape == (B, 3, M, 24)
        assert not out.any()
        assert torch.equal(attnx.attention_map(q, k, heads=heads, rows=rows, backend=backend), amap)


@pytest.mark.parametrize("B", [0, 2])
def test_gradient_without_keys_or_items_is_zero(B, device):
    q, k, v, _ = (
        None if t is None else t.requires_grad_() for t in random_inputs(Case(B=B, N=0 if B else 5), device=device)
    )
    attnx.attention(q, k, v)[0].sum().backward()
    for t in (q, k, v):
        assert t.grad.shape == t.shape
        assert not t.grad.any()


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_eager_makes_no_map_of_all_heads(heads):
    H, N = 8, 1024
    q, k, v, _ = random_inputs(Case(B=1, H=H, M=N, N=N, D=32))
    one_map, few_rows, block = 4 * N * N, 4 * 16 * N, blocks.BLOCK_BYTES
    for work, at_least, at_most in (
        (lambda: attnx.attention(q, k, v, heads=heads, backend="eager"), one_map, one_map),
        (lambda: attnx.attention_map(q, k, heads=heads, rows=[0, 5], backend="eager"), few_rows, block),
        (lambda: eager.attention_backward(Scores(q, k, None, False, 0.1), q, v, q, None), block, 2 * block),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        assert at_least <= max(event.self_cpu_memory_usage for event in profile.events()) <= at_most


@pytest.mark.gpu
@pytest.mark.parametrize("N", [256, 2048])
def test_triton_makes_the_output_the_lse_and_the_map(N, device):
    # As many images as keep every processor busy: of fewer, maps of some of the heads are there for a moment.
    B = 40 if N == 256 else 2
    q, k, v, _ = random_inputs(Case(B=B, H=8, M=N, N=N, D=64, dtype=torch.bfloat16), device=device)
    attnx.attention(q, k, v, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, amap = attnx.attention(q, k, v, backend="triton")
    asked_for = out.nbytes + amap.nbytes + 4 * B * 8 * N
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * asked_for + 4096


def step(q, k, v, bias):
    """A step of a model that uses both calls and supports gradients."""
    out, amap = attnx.attention(q * 2, k, v, bias=bias, is_causal=True)
    row = attnx.attention_map(q, k, bias=bias, rows=[0, 3], heads="max")
    return out.sin(), amap.mean(1) + row.sum(1)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_break(compiler, device):
    inputs = random_inputs(Case(bias="1HMN", N=24), device=device)
    # A relative position bias as Swin makes it: [M, N, H], permuted.
    bias = inputs.bias[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]

    def run(call):
        leaves = [t.clone().requires_grad_() for t in (*inputs[:3], bias)]
        assert leaves[3].stride() == bias.stride()
        out, maps = call(*leaves)
        out.sum().backward()
        return out, maps, *(t.grad for t in leaves)

    for ours, expected in zip(run(torch.compile(step, fullgraph=True, backend=compiler)), run(step), strict=True):
        torch.testing.assert_close(ours, expected)


@on_all_triton_long
@pytest.mark.parametrize("rows", [None, (3, 0)])
@pytest.mark.parametrize(
    "case",
    [
        Case(M=5, N=6),
        Case(M=5, N=6, bias="1HMN", H=4, Hk=2, heads="each", layout="strided"),
        Case(M=6, N=6, mask="B11N", heads="max", layout="packed", is_causal=True),
    ],
    ids=str,
)
def test_operators_are_registered_as_they_behave(case, rows, backend, device):
    q, k, v, bias = random_inputs(case, device=device)
    index = None if rows is None else torch.tensor(rows, device=device)
    leaves = [None if t is None else t.requires_grad_(t.is_floating_point()) for t in (q, k, v, bias)]
    opcheck(torch.ops.attnx.attention, (*leaves, case.is_causal, 0.3, 0.0, case.heads, index, backend))
    q, k, v, bias = (None if t is None else t.detach() for t in leaves)
    lse = torch.zeros(q.shape[:3], device=device) if rows else None
    opcheck(torch.ops.attnx.attention_map, (q, k, bias, case.is_causal, 0.3, 0.0, case.heads, index, lse, backend))
    opcheck(torch.ops.attnx.attention_backward, (v.new_ones(*q.shape), q, k, v, bias, q, case.is_causal, 0.3))


def test_gradient_of_a_permuted_bias_is_registered_as_it_behaves(device):
    q, k, v, bias = random_inputs(Case(bias="1HMN"), device=device)
    bias = bias[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    opcheck(torch.ops.attnx.attention_backward, (q, q, k, v, bias, q, False, 0.3), test_utils="test_faketensor")


def test_autocast_casts_as_sdpa_does(device):
    q, k, v, bias = random_inputs(Case(bias="1HMN"), device=device)
    k, v = k.to(torch.bfloat16), v.half()
    with torch.autocast(device.type, torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v, bias)
        out, amap = attnx.attention(q, k, v, bias=bias)
        alone = attnx.attention_map(q, k, bias=bias)
    assert out.dtype == expected.dtype == torch.bfloat16
    q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    assert_attention(out, amap, q, k, v, bias)
    assert_attention(None, alone, q, k, v, bias)
    doubles = [t.double() for t in (q, k, v)]
    with torch.autocast(device.type, torch.bfloat16):
        assert attnx.attention(*doubles)[0].dtype == F.scaled_dot_product_attention(*doubles).dtype


def shaped(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": shaped(3, 4, 8)}, r"q: expected 4 dimensions .*; got \[3, 4, 8\]"),
        ({"v": shaped(2, 3, 5, 8, 1)}, r"v: expected 4 dimensions .*; got \[2, 3, 5, 8, 1\]"),
        ({"q": shaped(2, 3, 4, 8, dtype=torch.int32)}, r"q: expected a floating-point dtype; got torch\.int32"),
        ({"k": shaped(2, 3, 5, 8).half()}, r"k: expected q's torch\.float32 on cpu; got torch\.float16 on cpu"),
        (
            {"v": shaped(2, 3, 5, 8, device="meta")},
            r"v: expected q's torch\.float32 on cpu; got .* on meta",
        ),
        ({"k": shaped(1, 3, 5, 8)}, r"k: expected \[2, heads, tokens, 8\] to fit q \[2, 3, 4, 8\]; got \[1, 3, 5, 8\]"),
        ({"k": shaped(2, 3, 5, 9)}, r"k: expected \[2, heads, tokens, 8\] .* got \[2, 3, 5, 9\]"),
        ({"k": shaped(2, 2, 5, 8)}, r"k: expected a number of heads that divides q's 3; got 2"),
        ({"k": shaped(2, 0, 5, 8)}, r"k: expected a number of heads that divides q's 3; got 0"),
        ({"v": shaped(2, 3, 6, 8)}, r"v: expected \[2, 3, 5, head dim\] to fit k \[2, 3, 5, 8\]; got \[2, 3, 6, 8\]"),
        ({"bias": shaped(4, 5, dtype=torch.int64)}, r"bias: expected a float or bool dtype; got torch\.int64"),
        ({"bias": shaped(4, 5, device="meta")}, r"bias: expected device cpu; got meta"),
        ({"bias": shaped(5, 4)}, r"bias: expected a shape that broadcasts to \[2, 3, 4, 5\]; got \[5, 4\]"),
        ({"bias": shaped(1, 1, 1, 4, 5)}, r"bias: expected a shape that broadcasts to .*; got \[1, 1, 1, 4, 5\]"),
        ({"heads": "sum"}, r"heads: expected one of mean, max, min, each; got 'sum'"),
        ({"heads": "MEAN"}, r"heads: expected one of mean, max, min, each; got 'MEAN'"),
        ({"backend": "cuda"}, r"backend: expected one of .*triton.*; got 'cuda'"),
        ({"rows": [0, 4]}, r"rows: expected integers in -4\.\.3; got \[0, 4\]"),
        ({"rows": [-5]}, r"rows: expected integers in -4\.\.3; got \[-5\]"),
        ({"rows": [0.0]}, r"rows: expected an integer or a sequence of integers; got \[0\.0\]"),
        ({"rows": 4}, r"rows: expected integers in -4\.\.3; got \[4\]"),
        ({"rows": "all"}, "rows: expected an integer or a sequence of integers; got 'all'"),
        (
            {"rows": torch.tensor([[0]])},
            r"rows: expected a 1-D integer tensor on cpu; got torch\.int64 \[1, 1\]",
        ),
        ({"rows": torch.tensor([0.0])}, r"rows: expected a 1-D integer tensor on cpu; got torch\.float32 \[1\] on cpu"),
        ({"rows": torch.zeros(1).long().to("meta")}, r"rows: expected a 1-D integer tensor on cpu; got .* on meta"),
        ({"rows": torch.tensor([1, 4])}, r"rows: expected integers in -4\.\.3; got 1\.\.4"),
        ({"rows": torch.tensor([-5, 2])}, r"rows: expected integers in -4\.\.3; got -5\.\.2"),
        ({"lse": shaped(2, 3, 5)}, r"lse: expected float32 \[2, 3, 4\] on cpu; got torch\.float32 \[2, 3, 5\] on cpu"),
        ({"lse": shaped(2, 3, 4).double()}, r"lse: expected float32 \[2, 3, 4\] on cpu; got torch\.float64"),
        ({"lse": shaped(2, 3, 4, device="meta")}, r"lse: expected float32 \[2, 3, 4\] on cpu; got .* on meta"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change, message):
    arguments = {"q": shaped(2, 3, 4, 8), "k": shaped(2, 3, 5, 8), "v": shaped(2, 3, 5, 8), **change}
    if "lse" not in change:
        with pytest.raises(ValueError, match=message):
            attnx.attention(**arguments)
    if "v" not in change:
        del arguments["v"]
        with pytest.raises(ValueError, match=message):
            attnx.attention_map(**arguments)


def test_a_named_backend_says_every_reason_why_it_cannot(device):
    q = shaped(2, 3, 4, 1040, dtype=torch.float64, device=device)
    message = r"backend='triton' can't .*: head dim 1040 is above 1024; dtype torch\.float64 is not float16"
    for call in (
        lambda: attnx.attention(q, q, q, backend="triton"),
        lambda: attnx.attention_map(q, q, backend="triton"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()


def test_triton_on_cpu_tensors_asks_for_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = shaped(2, 3, 4, 16)
    with pytest.raises(NotImplementedError, match="tensors are on cpu; set TRITON_INTERPRET=1"):
        attnx.attention(q, q, q, backend="triton")


def test_tf32_is_used_where_torch_was_told_to():
    from attnx.kernels.arguments import precision

    before = torch.get_float32_matmul_precision()
    assert precision(torch.bfloat16) == "ieee"
    assert precision(torch.float32) == ("ieee" if before == "highest" else "tf32")
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_by_torchs_newer_setting():
    """Runs in a separate process, because torch refuses to return from the newer setting to the older."""
    code = (
        "import torch; m = torch.backends.cuda.matmul\n"
        "from attnx.kernels.arguments import precision\n"
        "if not hasattr(m, 'fp32_precision'): print('tf32 ieee'); raise SystemExit\n"
        "m.fp32_precision = 'tf32'; a = precision(torch.float32)\n"
        "m.fp32_precision = 'ieee'; print(a, precision(torch.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["tf32", "ieee"], done.stderr


@on_all
@pytest.mark.parametrize("n", [20, 300])
def test_rows_of_any_strides(backend, n, device):
    q, k, _, _ = testing.random_inputs(testing.Case(N=n, M=20), device=device)
    whole = attnx.attention_map(q, k, backend=backend)
    every = torch.arange(20, device=device)
    for rows in (every[::4], every[3:4].expand(4), every.view(4, 5)[:, 1]):
        torch.testing.assert_close(attnx.attention_map(q, k, rows=rows, backend=backend), whole[:, rows])


@on_all
def test_gradient_inside_autocast(backend, device):
    """No value is rounded twice: results equal those of inputs in that dtype without autocast."""
    inputs = testing.random_inputs(testing.Case(), device=device)[:3]
    grads = []
    for inside in (True, False):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            given = leaves if inside else [t.bfloat16() for t in leaves]
            out, _ = attnx.attention(*given, backend=backend)
            out.float().sum().backward()
        grads.append([out.detach(), *(t.grad for t in leaves)])
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.triton_kernels
def test_triton_takes_a_scale_that_fp32_has_not(device):
    q, k, v, _ = testing.random_inputs(testing.Case(N=20), device=device)
    out, amap = attnx.attention(q, k, v, scale=1e-46, backend="triton")
    testing.assert_attention(out, amap, q, k, v, scale=1e-46)


@on_all
@pytest.mark.parametrize("n", [20, 300])
def test_triton_and_eager_hide_below_the_same_bias(backend, n, device):
    q, k, *_ = testing.random_inputs(testing.Case(N=n), device=device)
    bias = torch.zeros(20, n, device=device)
    bias[0], bias[1], bias[2] = -4.9e4, -5.1e4, -1e9
    amap = attnx.attention_map(q, k, bias=bias, backend=backend)
    assert (amap[:, 0].sum(-1) > 0.5).all()
    assert not amap[:, 1:3].any()


def test_a_backend_refuses_a_reduction_that_it_does_not_have(monkeypatch, on_cpu):
    monkeypatch.setattr(native, "REDUCTIONS", (Reduction.MEAN,))
    q, k, v, _ = random_inputs(Case())
    with pytest.raises(NotImplementedError, match=r"backend='native' can't take these inputs: it has no heads='max'"):
        attnx.attention(q, k, v, heads="max", backend="native")
    attnx.attention(q, k, v, heads="max")
    assert on_cpu == ["eager.attention"]
    attnx.attention(q, k, v)
    assert on_cpu == ["eager.attention", "native.attention"]
