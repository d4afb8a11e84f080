"""The kernels' code paths: each test checks that its path ran. Numerical tests are in test_ops.py."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import attnx
from attnx import testing
from attnx.kernels.configs import (
    LONGER_ROW,
    Launch,
    Target,
    forward_config,
    head_splits,
    map_config,
    one_pass_config,
    split_d,
    vecmat_config,
)
from attnx.ops.backends import launches
from attnx.ops.backends import triton as backend
from attnx.ops.reducers import Reduction

TARGETS = [Target("cuda", arch) for arch in (80, 86, 89, 90, 100, 120)] + [Target("hip", "gfx942")]


@pytest.fixture
def launched(monkeypatch):
    """The launches that the backend makes, in order."""
    done = []
    run = Launch.run

    def note(launch):
        done.append(launch)
        run(launch)

    monkeypatch.setattr(Launch, "run", note)
    return done


def names(launched):
    return [launch.kernel.fn.__name__ for launch in launched]


def on(monkeypatch, processors):
    real = launches.target
    for module in (backend, launches):
        monkeypatch.setattr(module, "target", lambda device: real(device)._replace(processors=processors))


@pytest.mark.triton_kernels
@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize(("count", "heads"), [(4, "max"), (5, "mean"), (7, "min")])
def test_triton_splits_heads_where_processors_would_be_idle(n, heads, count, launched, monkeypatch, device):
    inputs = testing.random_inputs(testing.Case(B=1, H=count, M=20, N=n), device=device)
    on(monkeypatch, processors=100)
    out, amap = attnx.attention(*inputs[:3], heads=heads, backend="triton")
    assert names(launched)[-1] == "fuse_kernel"
    assert launched[-1].args["splits"] > 1
    testing.assert_attention(out, amap, *inputs[:3], heads=heads)

    launched.clear()
    on(monkeypatch, processors=1)
    whole = attnx.attention(*inputs[:3], heads=heads, backend="triton")[1]
    assert "fuse_kernel" not in names(launched)
    torch.testing.assert_close(amap, whole)


@pytest.mark.triton_kernels
@pytest.mark.parametrize(
    ("n", "parts", "tail"),
    [(20, 1, 0), (70, 1, 16), (90, 1, 32), (128, 2, 0), (200, 3, 16), (256, 1, 0), (257, 1, 16), (280, 1, 32)],
)
def test_triton_takes_short_rows_in_one_launch(n, parts, tail, launched, monkeypatch, device):
    # One key head for two query heads, so that the vendor's attention is not used for the output.
    inputs = testing.random_inputs(testing.Case(B=2, H=2, Hk=1, M=17, N=n, dtype=torch.float16), device=device)
    on(monkeypatch, processors=1)
    out, amap = attnx.attention(*inputs[:3], backend="triton")
    assert names(launched) == ["one_pass_kernel"]
    if backend.target(device).arch == 90:
        assert (launched[0].args["PARTS"], launched[0].args["TAIL"]) == (parts, tail)
    testing.assert_attention(out, amap, *inputs[:3])


@pytest.mark.gpu
def test_the_vendor_makes_the_output_where_that_is_faster(launched, monkeypatch, device):
    on(monkeypatch, processors=1)
    for n, kernel in ((100, "one_pass_kernel"), (200, "map_kernel")):
        inputs = testing.random_inputs(testing.Case(M=n, N=n, D=64, dtype=torch.bfloat16), device=device)
        out, amap = attnx.attention(*inputs[:3], backend="triton")
        assert names(launched) == [kernel if backend.target(device).arch == 90 else "one_pass_kernel"]
        testing.assert_attention(out, amap, *inputs[:3])
        launched.clear()


@pytest.mark.gpu
def test_launches_are_remembered_by_what_they_were_compiled_for(device):
    """Aligned pointers use vector loads; other pointers need separate code. Both launches are cached."""
    room = torch.randn(3, 2 * 2 * 40 * 64 + 1, device=device).bfloat16()
    for offset in (0, 1, 0, 1):
        q, k, v = (t[offset : offset + 2 * 2 * 40 * 64].view(2, 2, 40, 64) for t in room)
        for heads in ("mean", "max"):
            out, amap = attnx.attention(q, k, v, heads=heads, backend="triton")
            testing.assert_attention(out, amap, q, k, v, heads=heads)


@pytest.mark.triton_kernels
@pytest.mark.parametrize("n", [20, 300])
def test_triton_offsets_beyond_32_bits(n, launched, device):
    """Offsets within a tile exceed 2^31. Only the pages that are used are allocated."""
    far = 2**22
    case = testing.Case(B=1, H=2, M=3, N=n, D=16, dtype=torch.float16)
    q, k, v, _ = testing.random_inputs(case, device=device)
    k_far = torch.empty(n * far, dtype=k.dtype, device=device).as_strided(k.shape, (0, 16, far, 1))
    k_far.copy_(k)
    out, amap = attnx.attention(q, k_far, v, backend="triton")
    offsets = [launch.args["INT64_OFFSETS"] for launch in launched if "INT64_OFFSETS" in launch.args]
    assert offsets
    assert all(offsets)
    testing.assert_attention(out, amap, q, k, v)


def test_split_d_pads_as_little_as_two_tiles_can():
    assert [split_d(d) for d in (8, 16, 24, 64, 72, 80, 88, 96, 104, 128, 192)] == [
        (16, 0), (16, 0), (32, 0), (64, 0), (64, 16), (64, 16), (64, 32), (64, 32), (128, 0), (128, 0), (128, 64),
    ]  # fmt: skip
    assert split_d(257) == split_d(1024) == (64, 0)
    for d in range(1, 257):
        first, rest = split_d(d)
        assert first + rest >= d
        assert all(part & (part - 1) == 0 and (part == 0 or part >= 16) for part in (first, rest))


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 7, 12, 16])
def test_every_split_has_heads_and_no_map_is_of_one(heads):
    for programs, processors in itertools.product((1, 4, 30, 131, 132, 500), (1, 84, 132, 304)):
        splits = head_splits(programs, heads, Target("cuda", 90, processors))
        each = -(-heads // splits)
        assert (splits - 1) * each < heads <= splits * each
        assert splits == 1 or (each > 1 and programs * splits <= processors)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.arch))
def test_configurations_do_not_look_at_the_length(target):
    """Configurations depend on one row or more, few or many tiles, and short or long rows, not on exact lengths."""
    for d, itemsize, bias in itertools.product((32, 64, 80, 128, 256), (2, 4), (False, True)):
        for config in (map_config, vecmat_config):
            assert len({config(d, itemsize, rows, target, bias) for rows in range(17, 20000, 997)}) == 1
        enough = {forward_config(d, itemsize, rows, 10**6, target, bias) for rows in range(17, 20000, 997)}
        assert len(enough) == 1
        assert one_pass_config(d, itemsize, LONGER_ROW + 1, target, bias) is None


@pytest.mark.triton_kernels
def test_triton_makes_each_head_without_partial_maps(launched, device):
    inputs = testing.random_inputs(testing.Case(B=1, H=4, M=5, N=6), device=device)
    attnx.attention(*inputs[:3], heads="each", backend="triton")
    assert names(launched) == ["one_pass_kernel"]


def test_the_reductions_are_those_of_the_kernels():
    from attnx.kernels import primitives

    for reduction in backend.REDUCTIONS:
        if reduction is not Reduction.EACH:
            assert getattr(primitives, reduction.name).value == reduction
    assert set(backend.REDUCTIONS) == set(Reduction)
