"""The Hopper kernels, on a CPU by the emulator of `attnx.testing.gluon`, on an H100 or H200 compiled."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this Triton has no Gluon for Hopper")

import attnx
from attnx.kernels.configs import LONGER_ROW, Launch, Target
from attnx.kernels.hopper import launches
from attnx.kernels.hopper.arguments import Attention, Box, can_be_loaded
from attnx.kernels.hopper.configs import CHUNK, map_tile, short_row, vecmat_tile
from attnx.ops.backends import hopper
from attnx.ops.reducers import Reduction
from attnx.testing import (
    TABLE,
    Case,
    assert_attention,
    assert_vecmat,
    gluon,
    oracle_lse,
    random_inputs,
    random_vector,
)

HALF = (torch.float16, torch.bfloat16)
# Triton's interpreter runs the forward kernel for rows of 300 keys.
LONG = pytest.param(300, marks=pytest.mark.triton_kernels)
# (early loads, early products): the extremes between which the hardware may choose.
TIMINGS = [(True, False), (False, True), (True, True), (False, False)]


@pytest.fixture
def on_hopper(device):
    """Runs the kernels here: a function that gives a context in which they run, with the list of their launches."""
    if device.type != "cuda":
        return gluon.emulated
    if hopper.missing(device):
        pytest.skip(hopper.missing(device))
    return lambda *timing, **options: contextlib.nullcontext([])


def names(launched):
    return [launch.kernel.fn.__name__ for launch in launched]


def enlarged(case):
    """The case with half precision, at least 70 rows and 150 keys, and head dims that the kernels take."""
    sizes = dict(M=max(case.M, 70), N=300 if case.N >= 300 else max(case.N, 150), dtype=case.dtype)
    if case.layout == "packed":
        sizes["M"] = sizes["N"]
    if case.dtype not in HALF:
        sizes["dtype"] = torch.bfloat16
    return replace(case, **sizes, D=min(-(-case.D // 8) * 8, 128), Dv=None)


def taken(case):
    """True if the kernels take the case."""
    same = not (case.bias or case.mask) or (case.bias or case.mask)[-3:] in ("11N", "N")
    scale = case.scale is None or case.scale > 0
    return same and scale and case.rows is None and case.layout in ("contiguous", "packed")


CASES = list(dict.fromkeys(enlarged(case) for case in TABLE if taken(enlarged(case))))
CASES += [
    # lengths of a row: chunks and tails, one exp and two, several tiles of a map
    *(
        Case(B=1, H=2, M=M, N=N, D=D, dtype=torch.bfloat16)
        for M, N, D in (
            *((70, 1, 64), (65, 17, 64), (128, 64, 64), (129, 65, 32), (130, 96, 64), (197, 197, 64), (200, 208, 32)),
            *((70, 209, 64), (257, 257, 64), (80, 288, 64), (80, 256, 32), (70, 100, 80), (70, 128, 128)),
            *((257, 577, 64), (70, 289, 64), (130, 300, 128), (70, 520, 96), (80, 300, 8)),
        )
    ),
    *(Case(N=N, M=70, D=64, dtype=torch.float16, heads=heads) for N in (197, 257, 300) for heads in ("max", "min")),
    *(Case(N=N, M=70, D=64, dtype=torch.float16, heads="each", H=4, Hk=2) for N in (197, 257, 300)),
    *(Case(N=N, M=M, D=64, dtype=torch.bfloat16, is_causal=True) for M, N in ((197, 197), (80, 257), (400, 290))),
    *(
        Case(B=4, N=N, M=M, D=64, dtype=torch.bfloat16, heads=heads, **{kind: shape})
        for kind, heads in (("bias", "mean"), ("mask", "max"))
        for shape in ("B11N", "P11N", "111N")
        for M, N in ((66, 130), (80, 257), (70, 300))
    ),
    Case(N=300, M=130, D=80, dtype=torch.bfloat16, bias="B11N", heads="min", is_causal=True),
]


def parameter(case):
    """The case; Triton's interpreter runs another kernel for the output of long rows, which takes a second or more.

    It also adds the maps of split heads. Of long rows the default run has maps alone.
    """
    marks = [pytest.mark.triton_kernels] if case.H > 3 else []
    if short_row(case.D, case.M, case.N) is None:
        marks += [pytest.mark.triton_kernels, pytest.mark.long]
    return pytest.param(case, id=str(case), marks=marks)


@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
def test_attention(case, device, on_hopper, poisoned):
    inputs = random_inputs(case, device=device)
    with on_hopper() as launched:
        out, amap = attnx.attention(*inputs[:3], bias=inputs.bias, backend="hopper", **case.options)
    if device.type != "cuda":
        row = short_row(case.D, case.M, case.N)
        if row or case.N > LONGER_ROW:  # else the one-pass kernel for all GPUs takes it
            assert names(launched) == ["short_rows_kernel" if row else "map_kernel"]
        assert row is None or launched[0].args["TWICE"] == (case.N > 208)
    assert_attention(out, amap, *inputs, **case.options)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
@pytest.mark.parametrize("mask", ["", "B11N"])
@pytest.mark.parametrize("n", [197, LONG])
def test_map_alone_and_from_lse(n, mask, empty, device, on_hopper, poisoned):
    inputs = random_inputs(Case(M=140, N=n, D=64, dtype=torch.bfloat16, mask=mask), device=device)
    if mask:
        inputs.bias[1] = False
    lse = oracle_lse(inputs.q, inputs.k, inputs.bias, False, None).float()
    lse[lse == -torch.inf] = empty
    for given in (lse, None):
        with on_hopper() as launched:
            amap = attnx.attention_map(*inputs[:2], bias=inputs.bias, lse=given, backend="hopper")
        assert device.type == "cuda" or names(launched)[-1] == (
            "map_kernel" if given is not None or n == 300 else "short_rows_kernel"
        )
        assert_attention(None, amap, *inputs)


@pytest.mark.triton_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter and the emulator")
@pytest.mark.parametrize("on_hopper", [False, True])
def test_an_infinite_lse_of_the_vendor_is_nan(on_hopper, monkeypatch):
    """Flash attention gives plus infinity for a row with NaN; for the map's users it means a row without keys."""
    from attnx.ops.backends import triton

    q, k, _, _ = random_inputs(Case(M=70, N=300, D=64, dtype=torch.bfloat16))
    lse = oracle_lse(q, k).float()
    lse[0, 1, 3] = torch.inf
    with gluon.emulated():
        for inf_is_nan in (False, True):
            amap = triton.attention_map(scores_of(q, k), Reduction.MEAN, None, lse, on_hopper, inf_is_nan)
            assert amap[0, 3].isnan().all() == inf_is_nan
            amap[0, 3] = 0
            assert amap.isfinite().all()


@pytest.mark.triton_kernels
@pytest.mark.parametrize(
    ("m", "n", "d"),
    [(130, 300, 64), pytest.param(257, 257, 80, marks=pytest.mark.long), (150, 130, 128), (70, 65, 32)],
)
def test_vecmat(m, n, d, device, on_hopper, poisoned):
    case = Case(M=m, N=n, D=d, dtype=torch.bfloat16, H=4, Hk=2)
    inputs, r = random_inputs(case, device=device), random_vector(case, device=device)
    with on_hopper() as launched:
        passed = attnx.vecmat(r, *inputs[:2], backend="hopper")
    assert device.type == "cuda" or names(launched) == ["vecmat_kernel"]
    assert_vecmat(passed, r, *inputs[:2])


@pytest.mark.triton_kernels
def test_vecmat_skips_rows_whose_share_is_zero(device, on_hopper):
    q, k, _, _ = random_inputs(Case(M=70, N=300, D=64, dtype=torch.bfloat16), device=device)
    r = torch.rand(2, 70, device=device)
    q[:, :, 3], r[:, 3] = torch.nan, 0.0
    with on_hopper():
        assert attnx.vecmat(r, q, k, backend="hopper").isfinite().all()
        r[1, 3] = 1.0
        assert attnx.vecmat(r, q, k, backend="hopper").isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [150, 257, LONG])
def test_nan_and_inf_are_where_sdpa_has_them(n, value, where, device, on_hopper):
    inputs = random_inputs(Case(B=1, H=2, M=70, N=n, D=64, dtype=torch.bfloat16), device=device)
    getattr(inputs, where)[0, 1, 7, 3] = value
    for is_causal in (False, True):
        q, k, v = (t.cpu().float() for t in inputs[:3])
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).to(device)
        assert expected.isnan().any()
        for heads in ("mean", "max", "min"):
            with on_hopper():
                out, amap = attnx.attention(*inputs[:3], is_causal=is_causal, heads=heads, backend="hopper")
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(amap.isnan(), expected.isnan().any(1).any(-1)[..., None].expand_as(amap))


@pytest.mark.parametrize("n", [150, 257, LONG])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_hidden_keys_may_hold_nan(kind, n, device, on_hopper):
    inputs = random_inputs(Case(M=70, N=n, D=64, dtype=torch.bfloat16, **{kind: "B11N"}), device=device)
    inputs.bias[:, :, :, 5] = False if kind == "mask" else torch.finfo(torch.bfloat16).min
    inputs.k[:, :, 5] = torch.nan
    with on_hopper():
        amap = attnx.attention_map(*inputs[:2], bias=inputs.bias, backend="hopper")
    assert not amap[..., 5].any()
    assert amap.isfinite().all()


@pytest.mark.triton_kernels
@pytest.mark.parametrize("n", [150, 257, 300])
def test_heads_are_split_where_processors_would_be_idle(n, device, on_hopper, monkeypatch):
    from attnx.ops.backends import launches as shared

    inputs = random_inputs(Case(B=1, H=5, M=70, N=n, D=64, dtype=torch.bfloat16), device=device)
    monkeypatch.setattr(shared, "target", lambda device: Target("cuda", 90, 132))
    for heads in ("mean", "max", "min"):
        with on_hopper() as launched:
            amap = attnx.attention_map(*inputs[:2], heads=heads, backend="hopper")
        assert device.type == "cuda" or launched[-1].args["splits"] == 2
        assert_attention(None, amap, *inputs[:3], heads=heads)


# Timing


def plain_launch(kind):
    """(launch with several stages and tiles per program, tensor that it writes)."""
    case = Case(B=2, H=3, M=130, N=300 if kind != "short_rows" else 197, D=64, dtype=torch.bfloat16)
    q, k, v, _ = random_inputs(case)
    attention = Attention(q, k, None, False, 64**-0.5)
    lse = oracle_lse(q, k).float()
    if kind == "short_rows":
        maps, out = torch.full((2, 130, 197), torch.nan), torch.empty_like(q)
        return launches.short_rows_launch(attention, v, out, maps, 0, 1, short_row(64, 130, 197)), maps
    if kind == "map":
        maps = torch.full((2, 130, 300), torch.nan)
        return launches.map_launch(attention, lse, maps, 0, 1, map_tile(64, 130, False), Target("cuda", 90, 2)), maps
    q = q.repeat(1, 1, 4, 1)  # more blocks of rows than stages
    sums = torch.full((2, 3, 2, 300), torch.nan)
    attention = attention._replace(q=q)
    return launches.vecmat_launch(attention, torch.rand(2, 520), lse.repeat(1, 1, 4), sums, vecmat_tile(64, 520)), sums


@pytest.mark.parametrize("kind", ["short_rows", "map", "vecmat"])
def test_results_do_not_depend_on_timing(kind):
    launch, result = plain_launch(kind)
    gluon.run(launch)
    first = result.clone()
    assert not first.isnan().any()
    for seed in range(3):
        for timing in TIMINGS:
            result.fill_(torch.nan)
            gluon.run(launch, seed, *timing)
            assert torch.equal(result, first), (seed, timing)


FAULTS = {
    "map: a stage is given back too early": (
        "map",
        "                if c == NC - 1:\n",
        "                if c == 0:\n"
        "                    mbarrier.arrive(empty.index(stage))\n"
        "                if c == NC - 1:\n",
        "                    mbarrier.arrive(empty.index(stage))\n                    mbarrier.wait(loaded",
        "                    mbarrier.wait(loaded",
    ),
    "map: a stage is given back before its last product": (
        "map",
        "                    mbarrier.arrive(empty.index(stage))\n",
        "                    pass\n",
        "                s1 = warpgroup_mma_wait(0, [s1])\n",
        "                s1 = s1\n",
    ),
    "map: the wait for the next stage is missing": ("map", "mbarrier.wait(loaded.index(next_one), next_phase)", "pass"),
    "map: the first wait is missing": ("map", "mbarrier.wait(loaded.index(stage), phase)", "pass"),
    "map: the phase is wrong": (
        "map",
        "mbarrier.wait(loaded.index(next_one), next_phase)",
        "mbarrier.wait(loaded.index(next_one), next_phase ^ 1)",
    ),
    "map: the phase never changes": ("map", "            phase = next_phase\n", ""),
    "map: the producer does not wait": ("map", "mbarrier.wait(empty.index(stage), phase ^ 1)", "pass"),
    "map: a product is not waited for": (
        "map",
        "                    s0 = warpgroup_mma_wait(0, [s0])\n",
        "                    s0 = warpgroup_mma_wait(1, [s0])\n",
    ),
    "map: the last load is missing": ("map", "tiles + gl.num_programs(0)", "tiles"),
    "map: too many bytes are expected": ("map", "nbytes + (rest_nbytes", "2 * nbytes + (rest_nbytes"),
    "map: a consumer does not give back": ("map", "mbarrier.arrive(empty.index(stage))", "pass"),
    "short_rows: the wait for the values is missing": (
        "short_rows",
        "            mbarrier.wait(loaded_v.index(stage), phase)\n            o = no_output",
        "            o = no_output",
    ),
    "short_rows: values are given back too early": (
        "short_rows",
        "            o = warpgroup_mma_wait(0, [o])\n            mbarrier.arrive(empty_v.index(stage))\n",
        "            mbarrier.arrive(empty_v.index(stage))\n            o = warpgroup_mma_wait(0, [o])\n",
    ),
    "short_rows: keys are given back too early": (
        "short_rows",
        "        s = warpgroup_mma_wait(0, s)\n        mbarrier.arrive(empty_k.index(stage))\n",
        "        mbarrier.arrive(empty_k.index(stage))\n        s = warpgroup_mma_wait(0, s)\n",
    ),
    "short_rows: one part of the keys is not expected": (
        "short_rows",
        "q_desc.block_type.nbytes + PARTS * k_desc",
        "q_desc.block_type.nbytes + (PARTS - 1) * k_desc",
    ),
    "vecmat: the wait for the keys is missing": ("vecmat", "    mbarrier.wait(loaded_k.index(0), 0)\n", ""),
    "vecmat: the producer does not wait": ("vecmat", "mbarrier.wait(empty.index(stage), phase ^ 1)", "pass"),
}


def with_fault(kind, tmp_path, *changes):
    """The kernel from a copy of its file in which (old, new, old, new, ...) is replaced."""
    source = importlib.util.find_spec(f"attnx.kernels.hopper.{kind}").origin
    with open(source) as file:
        text = file.read()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    path = tmp_path / f"{kind}_with_fault.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"{kind}_kernel")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path):
    """Whatever the order in which the groups of warps run, and however late loads and products are."""
    kind, *changes = FAULTS[fault]
    launch, _ = plain_launch(kind)
    launch = launch._replace(kernel=with_fault(kind, tmp_path, *changes))
    for seed, timing in enumerate(TIMINGS):
        with pytest.raises(gluon.HazardError):
            gluon.run(launch, seed, *timing)


# What the kernels take


def test_other_inputs_go_to_the_other_kernels(device):
    """A bias of each head, chosen rows, few rows, float32, a head dim that the TMA can't load."""
    wide = random_inputs(Case(B=1, H=2, M=70, N=150, D=64, dtype=torch.bfloat16, bias="1HMN"))
    assert hopper.long_map(scores_of(*wide), Reduction.MEAN, torch.zeros(1, 2, 70), False) is None
    assert short_row(64, 64, 150) is None
    assert short_row(64, 70, 289) is None
    assert short_row(72, 70, 129) is None
    assert short_row(20, 70, 150) is None
    assert map_tile(136, 70, False) is None
    assert vecmat_tile(64, 64) is None
    q, k, v, _ = random_inputs(Case(B=1, H=2, M=70, N=150, D=64))
    assert not hopper.takes_short_rows(scores_of(q, k), v)


def scores_of(q, k, v=None, bias=None):
    return attnx.ops.scores.Scores(q, k, bias, False, q.shape[3] ** -0.5)


def test_every_length_has_a_layout_that_holds_it():
    for d in range(8, 129, 8):
        for n in range(1, 289):
            row = short_row(d, 70, n)
            if row is None:
                assert n > 128
                assert d > 64
                continue
            assert row.chunks * CHUNK + row.tail >= n > row.chunks * CHUNK + row.tail - CHUNK
            assert row.width >= d
            assert row.tail in (0, 16, 32)
            assert row.chunks >= 1


WITHOUT_INTERPRETER = """
import torch, attnx
from attnx.testing import gluon

q = torch.randn(1, 2, 70, 64, dtype=torch.bfloat16)
with gluon.emulated() as launches:
    attnx.attention(q, q, q, backend="hopper")
    print(len(launches))
    try:
        attnx.attention_map(q, q, rows=[0], backend="hopper")
    except RuntimeError as error:
        print(error)
"""


def test_the_emulator_needs_no_interpreter():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_INTERPRETER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "1"
    assert second.startswith("one_pass_kernel: expected Triton's interpreter")


def test_tensors_that_the_tma_can_load():
    t = torch.zeros(2, 40, 3, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert can_be_loaded(t)
    assert can_be_loaded(t[:1, :1])
    assert not can_be_loaded(t[..., 1:])
    assert not can_be_loaded(t[..., ::2])
    assert not can_be_loaded(t[:1].expand(2, -1, -1, -1))
    assert not can_be_loaded(torch.zeros(1, 2, 8, 20, dtype=torch.bfloat16))


def test_descriptors_are_kept_without_their_tensors():
    t = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    first = Box(t, 128, 64).descriptor()
    assert Box(t, 128, 64).descriptor() is first
    assert Box(t, 64, 64).descriptor() is not first
    assert first.base.data_ptr() == t.data_ptr()
    assert not isinstance(first.base, torch.Tensor)
    assert first.layout.swizzle_byte_width == 128
    assert Box(t, 64, 16).descriptor().layout.swizzle_byte_width == 32


def test_a_gpu_without_the_kernels_is_refused(monkeypatch):
    q = torch.zeros(1, 2, 70, 64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"backend='hopper' .*compute capability 9\.0; tensors are on cpu"):
        attnx.attention(q, q, q, backend="hopper")
    monkeypatch.setenv("ATTNX_HOPPER", "1")
    assert not hopper.is_on(torch.device("cpu"))
    monkeypatch.setattr(hopper, "missing", lambda device: "")
    assert hopper.is_on(torch.device("cpu"))
    monkeypatch.setenv("ATTNX_HOPPER", "0")
    assert not hopper.is_on(torch.device("cpu"))


@pytest.mark.triton_kernels
def test_the_emulator_runs_other_launches_as_before(on_hopper, device):
    """Chosen rows have no Hopper kernel."""
    inputs = random_inputs(Case(M=70, N=150, D=64, dtype=torch.bfloat16), device=device)
    with on_hopper() as launched:
        amap = attnx.attention_map(*inputs[:2], rows=[0, 69], backend="hopper")
    assert launched == []
    assert Launch.run.__name__ == "run"
    assert_attention(None, amap, *inputs[:3], rows=[0, 69])
