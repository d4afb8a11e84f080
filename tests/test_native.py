"""The native CPU kernel beyond the table of `test_ops.py`: instruction sets, sanitizers, threads, builds."""

import os
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnx
from attnx.kernels.cpu import build
from attnx.ops import backends
from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.backends import native
from attnx.ops.reducers import MASK_THRESHOLD, Reduction
from attnx.testing import (
    TABLE,
    Case,
    assert_attention,
    assert_attention_lse,
    assert_gradient_map,
    assert_stats,
    assert_vecmat,
    oracle_gradient_map,
    random_gradient,
    random_inputs,
    random_vector,
)
from on_backends import TAKES, random_places

HIGHEST = "AVX512BF16" if build.instructions() == "AVX512" and build.has("avx512_bf16", False) else build.instructions()
LEVELS = list(build.INSTRUCTIONS)[list(build.INSTRUCTIONS).index(HIGHEST) :]  # that run here
CASES = [case for case in TABLE if case.dtype in TAKES["native"]]
# Where tiles end: one below, at and above every size that a register tile or a block has.
EDGES = [
    Case(B=1, H=2, M=M, N=N, D=D, Dv=Dv, is_causal=causal, dtype=dtype)
    for dtype in TAKES["native"]
    for M, N, D, Dv in (
        (1, 1, 1, 1),
        (47, 11, 3, 31),
        (48, 12, 15, 32),
        (49, 13, 17, 33),
        (63, 49, 4, 8),
        (65, 47, 8, 9),
    )
    for causal in (False, True)
]


@pytest.fixture
def level(request, monkeypatch):
    """Use the kernel of one instruction set instead of this machine's default."""
    kernel = native.kernel(request.param)
    monkeypatch.setattr(native, "kernel", lambda *_: kernel)


def check(case):
    q, k, v, bias = random_inputs(case)
    given = dict(bias=bias, is_causal=case.is_causal, scale=case.scale)
    out, amap = attnx.attention(q, k, v, bias=bias, backend="native", **case.options)
    assert_attention(out, amap, q, k, v, bias, **case.options)
    out, lse = attnx.attention_lse(q, k, v, backend="native", **given)
    assert_attention_lse(out, lse, q, k, v, **given)
    amap = attnx.attention_map(q, k, bias=bias, lse=lse, backend="native", **case.options)
    assert_attention(None, amap, q, k, v, bias, **case.options)
    r = random_vector(case)
    assert_vecmat(attnx.vecmat(r, q, k, lse=lse, backend="native", **given), r, q, k, **given)
    grad, clamp = random_gradient(case), case.M % 2 == 0
    weighted = attnx.gradient_map(grad, q, k, v, bias=bias, clamp=clamp, backend="native", **case.options)
    assert_gradient_map(weighted, grad, q, k, v, bias, clamp=clamp, **case.options)
    places, prefix = random_places(case), min(3, case.N)
    wanted = dict(heads=case.heads, stats=("entropy", "distance", "max", "mass"), places=places, prefix=prefix)
    out, amap, stats = attention_with_stats(q, k, v, **wanted, backend="native", **given)
    assert_attention(out, amap, q, k, v, bias, **{**case.options, "rows": None})
    assert_stats(stats, q, k, **given, places=places, prefix=prefix)
    importance = attnx.row_importance(grad, q, k, v, lse=lse, backend="native", **given)
    weighted = oracle_gradient_map(grad, q, k, v, **given, heads="each", clamp=False)
    torch.testing.assert_close(importance.double(), weighted.abs().sum(-1), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("level", [level for level in LEVELS if level != build.instructions()], indirect=True)
def test_other_instruction_sets(level, case, poisoned):
    check(case)


@pytest.mark.parametrize("case", EDGES, ids=str)
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_edges_of_tiles(level, case, poisoned):
    check(case)


def test_the_instruction_sets_have_their_widths():
    widths = [native.kernel(level).attnx_width() for level in LEVELS]
    assert widths == [{"AVX512BF16": 16, "AVX512": 16, "AVX2": 8, "DEFAULT": 4}[level] for level in LEVELS]


SANITIZED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_native import *
path = build.compiled({level!r}, ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
kernel = native.loaded(path)
native.kernel = lambda *_: kernel
torch.set_num_threads(2)
for case in {cases}:
    check(case)
print("clean", len({cases}))
"""


def sanitizer() -> str | None:
    """Paths for LD_PRELOAD: the compiler's libasan and libstdc++; None if one is missing.

    libasan looks up the exceptions of libstdc++ when it starts, so both are preloaded.
    """
    if sys.platform != "linux":
        return None
    found = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(found) if all(Path(path).is_file() for path in found) else None


@pytest.mark.parametrize(
    "level",
    # The widest; the others differ in the width only.
    [pytest.param(x, marks=pytest.mark.long if x == LEVELS[0] else pytest.mark.slow) for x in LEVELS],
)
def test_sanitizers_find_nothing(level):
    library = sanitizer()
    if library is None:
        pytest.skip("needs GCC's libasan")
    code = SANITIZED.format(tests=str(Path(__file__).parent), level=level, cases="EDGES + CASES[::3]")
    environment = dict(
        os.environ,
        LD_PRELOAD=library,
        # Leaks are ignored: Python leaks by design, and torch manages its own memory.
        ASAN_OPTIONS="detect_leaks=0:handle_segv=0:protect_shadow_gap=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.startswith("clean")


@pytest.mark.long
def test_a_sanitizer_would_find_something(tmp_path, monkeypatch):
    """The same build with an off-by-one index: the sanitizer must report it."""
    library = sanitizer()
    if library is None:
        pytest.skip("needs GCC's libasan")
    sources = {name: Path(build.__file__).with_name(name).read_text() for name in build.SOURCES}
    right = "for (int64_t j = block.limit; j < c.N; j++) row[j]"
    assert right in sources["weights.h"]
    sources["weights.h"] = sources["weights.h"].replace(right, right.replace("j < c.N", "j <= c.N"))
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    code = SANITIZED.format(tests=str(Path(__file__).parent), level="DEFAULT", cases="EDGES[:1]")
    code = code.replace("path = ", f"build.__file__ = {str(tmp_path / 'build.py')!r}; path = ")
    environment = dict(os.environ, LD_PRELOAD=library, ASAN_OPTIONS="detect_leaks=0", ATTNX_CACHE_DIR=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr


@pytest.mark.parametrize("openmp", [True, False])
def test_the_same_bits_in_any_number_of_threads(openmp, monkeypatch):
    """Also without torch's OpenMP, with the kernel's own threads."""
    if not openmp:
        monkeypatch.setattr(native, "_openmp", lambda: None)
    before, results = torch.get_num_threads(), []
    for case in (Case(B=3, M=150, N=150), Case(B=1, M=300, N=70, is_causal=True, bias="1HMN")):
        q, k, v, bias = random_inputs(case)
        r = random_vector(case)
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                out, amap = attnx.attention(q, k, v, bias=bias, is_causal=case.is_causal, backend="native")
                passed = attnx.vecmat(r, q, k, bias=bias, is_causal=case.is_causal, backend="native")
                grad = random_gradient(case)
                call = dict(bias=bias, is_causal=case.is_causal, backend="native")
                weighted = attnx.gradient_map(grad, q, k, v, **call)
                stats = attention_with_stats(
                    q, k, None, heads=None, stats=("entropy", "distance", "max", "mass"), places=random_places(case),
                    prefix=3, **call,
                )[2].values()  # fmt: skip
                importance = attnx.row_importance(grad, q, k, v, **call)
                results.append((out, amap, passed, weighted, importance, *(stat.nan_to_num(-1) for stat in stats)))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        results.clear()


@pytest.mark.parametrize("openmp", [True, False])
def test_items_wait_for_their_keys_and_for_those_before_them(openmp, monkeypatch):
    """Copies of K and V share a few slots. There are more threads than processors, and items differ."""
    if not openmp:
        monkeypatch.setattr(native, "_openmp", lambda: None)
    before = torch.get_num_threads()
    for dtype in TAKES["native"]:
        q, k, v = (t.to(dtype) for t in torch.randn(3, 23, 4, 33, 16))
        v[7, 1, 32, 3] = torch.inf  # whose zero weights make NaN in the rows before, of this item alone
        want = attnx.attention(q, k, v, is_causal=True, backend="eager")
        assert want[0].isnan().any()
        try:
            torch.set_num_threads(1)
            alone = attnx.attention(q, k, v, is_causal=True, backend="native")
            torch.set_num_threads(9)
            for _ in range(40):
                together = attnx.attention(q, k, v, is_causal=True, backend="native")
                assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(together, alone, strict=True))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(alone[0].isnan(), want[0].isnan())
        torch.testing.assert_close(alone[1], want[1], rtol=1e-3, atol=1e-6)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP runtime elsewhere")
def test_torchs_own_threads_are_used():
    code = (
        "import os, torch, attnx\n"
        "torch.set_num_threads(2)\n"
        "q = torch.randn(4, 3, 150, 16); torch.randn(400, 400) @ torch.randn(400, 400); torch.rand(999_999).exp()\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads(); attnx.attention(q, q, q, backend='native'); print(threads() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "0", run.stdout + run.stderr


def test_calls_in_several_python_threads():
    cases = [replace(case, B=1) for case in CASES[:24]]
    failed = []

    def run(case):
        try:
            check(case)
        except BaseException as error:
            failed.append((case, error))

    threads = [threading.Thread(target=run, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_scratch_is_no_copy_of_all_heads_and_is_given_back(monkeypatch):
    """Scratch holds K and V of one item in float32, and two tables of a block of rows for each thread.

    A model's peak memory is in its MLPs, between the calls. Scratch that is kept between calls would add to it.
    """
    B, H, N, D = 1, 8, 1024, 32
    q, k, v, _ = random_inputs(Case(B=B, H=H, M=N, N=N, D=D))
    made = []
    real = torch.empty

    def empty(shape, **options):
        t = real(shape, **options)
        if isinstance(shape, int):
            made.append((t.nbytes, weakref.ref(t)))
        return t

    monkeypatch.setattr(torch, "empty", empty)
    attnx.attention(q, k, v, backend="native")
    ((nbytes, room),) = made
    block = 4 * 64 * N
    assert nbytes <= 2 * k.nbytes + torch.get_num_threads() * (2 * block + 4 * 64 * (3 * D + 64))
    assert nbytes < B * H * N * N * 4 / 4
    assert room() is None


def test_what_is_not_finite_is_where_the_oracle_has_it():
    """NaN in v or q, bias values that overflow when multiplied by log2(e), and rows of -inf scores."""
    case = Case(B=1, H=2, M=150, N=200, is_causal=True)
    for threads in (1, 4):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for where in ("q", "v"):
                inputs = random_inputs(case)
                getattr(inputs, where)[0, 1, 100, 3] = torch.nan
                q, k, v, _ = inputs
                out, amap = attnx.attention(q, k, v, is_causal=True, backend="native")
                assert_attention(out, amap, q, k, v, None, True)
                r = random_vector(case)
                r[:, 100] = 0.5
                passed = attnx.vecmat(r, q, k, is_causal=True, backend="native")
                assert torch.equal(passed.isnan(), torch.full_like(passed, where == "q", dtype=torch.bool))
        finally:
            torch.set_num_threads(before)
    q, k, v, _ = random_inputs(Case(B=1, M=5, N=3))
    bias = torch.zeros(5, 3)
    bias[:, 0] = torch.finfo(torch.float32).max
    amap = attnx.attention_map(q, k, bias=bias, backend="native")
    assert torch.equal(amap[0, :, 0], torch.ones(5))
    q[0, 0, 2], k[0, 0, :] = torch.inf, -1.0
    assert attnx.attention_map(q, k, backend="native")[0].isnan().all(1).tolist() == [False, False, True, False, False]


def test_long_rows_lose_no_digits():
    """Adding 4,000 keys sequentially would exceed the error budget."""
    q, k, v, _ = random_inputs(Case(B=1, H=2, M=64, N=4000, D=64))
    q *= 2
    out, amap = attnx.attention(q, k, v, backend="native")
    assert_attention(out, amap, q, k, v)
    out, lse = attnx.attention_lse(q, k, v, backend="native")
    assert_attention_lse(out, lse, q, k, v)
    q, k, _, _ = random_inputs(Case(B=1, H=12, M=1500, N=40, D=16))
    r = torch.rand(1, 1500)
    assert_vecmat(attnx.vecmat(r, q, k, backend="native"), r, q, k)


def test_a_log_sum_exp_that_does_not_fit_gives_no_nonsense():
    q, k = torch.full((1, 1, 3, 4), 10.0), torch.full((1, 1, 5, 4), 10.0)
    assert attnx.attention_map(q, k, lse=torch.zeros(1, 1, 3), backend="native").isinf().all()
    for lse in (torch.inf, -torch.inf):
        assert not attnx.attention_map(q, k, lse=torch.full((1, 1, 3), lse), backend="native").any()


def test_the_default_device_is_of_no_matter():
    q = torch.randn(1, 2, 5, 8)
    want = attnx.attention(q, q, q, backend="native")[1]
    with torch.device("meta"):
        amap = attnx.attention(q, q, q, backend="native")[1]
    assert torch.equal(amap, want)


def test_an_expanded_bias_is_not_made_whole(monkeypatch):
    q, k, v, _ = random_inputs(Case(B=2, H=3, dtype=torch.bfloat16))
    bias = torch.randn(1, 1, 20, 20).bfloat16()
    widened = []
    real = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: (widened.append(t.numel()), real(t))[1])
    out, amap = attnx.attention(q, k, v, bias=bias, backend="native")
    assert widened == [400]
    monkeypatch.undo()
    assert_attention(out, amap, q, k, v, bias)


def test_constants_are_those_of_python():
    source = Path(build.__file__).with_name("call.h").read_text()
    assert float(re.search(r"MASK_THRESHOLD = (-[0-9e]+)f", source)[1]) == MASK_THRESHOLD
    kinds = re.search(r"enum Reduction : int64_t { (.*) }", source)[1].split(", ")
    assert kinds == [Reduction(value).name for value in range(len(kinds))]
    assert kinds == [member.name for member in native.REDUCTIONS]


# How it is built


def in_a_new_cache(tmp_path, code, **environment):
    environment = {**os.environ, "ATTNX_CACHE_DIR": str(tmp_path / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, env=environment
    )


CALL = "import torch, attnx; q = torch.ones(1, 1, 4, 8); print(attnx.attention(q, q, q{})[1].sum())"


def test_without_a_compiler_torch_answers_and_one_warning_says_what_is_missing(tmp_path):
    twice = CALL.format("") + "; attnx.attention_map(q, q); attnx.vecmat(torch.ones(1, 4), q, q)"
    run = in_a_new_cache(tmp_path, twice, CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "tensor(4.)"
    warned = [line for line in run.stderr.splitlines() if "UserWarning" in line]
    assert len(warned) == 1
    assert "plain torch answers" in warned[0]
    assert "C++ compiler: expected no-such-compiler" in warned[0]


def test_named_it_says_what_is_missing(tmp_path):
    run = in_a_new_cache(tmp_path, CALL.format(", backend='native'"), CXX="no-such-compiler")
    assert run.returncode == 1
    assert "NotImplementedError: backend='native' can't take these inputs: the native CPU kernel needs" in run.stderr


def test_a_compiler_that_fails_says_so(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho once >> {tmp_path / 'tried'}\nprintf 'broken \\377' >&2\nexit 1\n")
    compiler.chmod(0o755)
    run = in_a_new_cache(
        tmp_path,
        "import torch, attnx; q = torch.ones(1, 1, 4, 8)\n" + "attnx.attention(q, q, q)\n" * 3,
        CXX=str(compiler),
    )
    assert run.returncode == 0, run.stderr
    assert f"{compiler} can't compile the CPU kernel: broken" in run.stderr
    tries = 1 + (build.instructions() in build.FALLBACK)
    assert len((tmp_path / "tried").read_text().splitlines()) == tries


@pytest.mark.skipif(build.instructions() not in build.FALLBACK, reason="needs AVX512-BF16 and no AMX")
def test_a_compiler_that_is_too_old_for_bf16_makes_what_it_can(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) echo unknown option >&2; exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    run = in_a_new_cache(tmp_path, CALL.format(", backend='native'"), CXX=str(compiler))
    assert run.stdout.strip() == "tensor(4.)", run.stderr
    assert "bf16 is multiplied as floats, more slowly: " in run.stderr
    (made,) = (tmp_path / "cache").iterdir()
    assert made.name.startswith("cpu-avx512-")


def test_bf16_is_multiplied_in_pairs_where_the_processor_does():
    """Weights are rounded for the product with V, as in SDPA, but not in the map. Odd sizes are padded."""
    if build.instructions() != "AVX512BF16":
        pytest.skip("needs AVX512-BF16 and no AMX")
    q, k, v = (t.bfloat16() for t in torch.randn(3, 2, 3, 67, 37))
    out, amap = attnx.attention(q, k, v, backend="native")
    wide = attnx.attention(q.float(), k.float(), v.float(), backend="native")
    torch.testing.assert_close(amap, wide[1], rtol=1e-5, atol=1e-9)
    assert not torch.equal(out, wide[0].bfloat16())
    torch.testing.assert_close(out.float(), wide[0], rtol=0.02, atol=0.01)
    v[0, 0, 66, 36] = torch.inf  # the last half of a pair, the last element
    out = attnx.attention(q, k, v, is_causal=True, backend="native")[0]
    want = attnx.attention(q, k, v, is_causal=True, backend="eager")[0]
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())


@pytest.mark.long
def test_it_is_compiled_once_and_then_found(tmp_path):
    assert in_a_new_cache(tmp_path, CALL.format(", backend='native'")).stdout.strip() == "tensor(4.)"
    (made,) = (tmp_path / "cache").iterdir()
    before = made.stat().st_mtime_ns
    assert in_a_new_cache(tmp_path, CALL.format(", backend='native'")).stdout.strip() == "tensor(4.)"
    assert [made] == list((tmp_path / "cache").iterdir())
    assert made.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_cache_that_was_filled_needs_no_compiler_and_is_repaired(tmp_path):
    call = CALL.format(", backend='native'")
    assert in_a_new_cache(tmp_path, call).stdout.strip() == "tensor(4.)"
    (made,) = (tmp_path / "cache").iterdir()
    assert in_a_new_cache(tmp_path, call, PATH="").stdout.strip() == "tensor(4.)"
    made.write_bytes(b"not a library")
    assert in_a_new_cache(tmp_path, call).stdout.strip() == "tensor(4.)"
    assert in_a_new_cache(tmp_path, call, PATH="").stdout.strip() == "tensor(4.)"


@pytest.mark.slow
def test_a_compiler_may_have_arguments_and_the_cache_a_relative_path(tmp_path):
    call = CALL.format(", backend='native'")
    run = in_a_new_cache(
        tmp_path, f"import os; os.chdir({str(tmp_path)!r}); {call}", CXX="env c++ -g0", ATTNX_CACHE_DIR="."
    )
    assert run.stdout.strip() == "tensor(4.)", run.stderr
    assert list(tmp_path.glob("*.so"))


@pytest.mark.long
def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "cache").write_text("a file")
    run = in_a_new_cache(tmp_path, CALL.format(", backend='native'"))
    assert "the CPU kernel can't be compiled in" in run.stderr


def test_it_is_missing_only_where_it_is_asked_for(monkeypatch):
    def none(level):
        raise ImportError("no compiler")

    monkeypatch.setattr(native, "kernel", none)
    monkeypatch.setattr(backends, "_REPORTED", {"native"})
    q = torch.randn(1, 2, 5, 8)
    attnx.attention(q, q, q)
    attnx.attention(q.half(), q.half(), q.half())
    with pytest.raises(NotImplementedError, match="no compiler"):
        attnx.attention(q, q, q, backend="native")
