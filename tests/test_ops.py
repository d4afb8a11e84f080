"""The op's results for one table of cases on every backend, against float64."""

import mmap

import pytest
import torch
import torch.nn.functional as F

import attnx
from attnx.testing import (
    TABLE,
    Case,
    assert_attention,
    oracle_lse,
    random_inputs,
)
from on_backends import LONG, of_both_lengths, on_all, pairs


def attend(inputs, backend, **options):
    q, k, v, bias = inputs
    return attnx.attention(q, k, v, bias=bias, backend=backend, **options)


def attend_map(inputs, backend, **options):
    q, k, _, bias = inputs
    return attnx.attention_map(q, k, bias=bias, backend=backend, **options)


@pairs(TABLE)
def test_attention(case, backend, device, poisoned):
    assert torch.empty(2).isnan().all()
    assert torch.ones(1).new_empty(2).isnan().all()
    inputs = random_inputs(case, device=device)
    out, amap = attend(inputs, backend, **case.options)
    assert_attention(out, amap, *inputs, **case.options)


MAP_CASES = (
    Case(heads="max", dtype=torch.float16),
    Case(heads="each", N=LONG, mask="B1MN"),
    Case(M=40, N=LONG, heads="min", bias="1HMN", is_causal=True, dtype=torch.bfloat16),
    Case(H=4, Hk=2, N=LONG, rows=(19, 1, 1), layout="strided"),
)


@pairs(MAP_CASES)
def test_attention_map_alone(case, backend, device, poisoned):
    inputs = random_inputs(case, device=device)
    assert_attention(None, attend_map(inputs, backend, **case.options), *inputs, **case.options)


LSE_CASES = (
    Case(dtype=torch.bfloat16),
    Case(heads="max", rows=(3, 19, 3)),
    Case(M=40, N=LONG, is_causal=True, bias="1HMN", dtype=torch.float16),
    Case(H=4, Hk=2, N=LONG, heads="each", rows=(19, 0, 5), mask="BHMN"),
    Case(mask="B1MN", heads="min"),
)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
@pairs(LSE_CASES)
def test_attention_map_from_lse(case, backend, empty, device, poisoned):
    """The lse of a row without keys is -inf. In some vendors' kernels it is +inf."""
    inputs = random_inputs(case, device=device)
    lse = oracle_lse(inputs.q, inputs.k, inputs.bias, case.is_causal, case.scale).float()
    assert case.mask in ("", "B11N") or lse.isinf().any()
    lse[lse == -torch.inf] = empty
    amap = attend_map(inputs, backend, lse=lse, **case.options)
    assert_attention(None, amap, *inputs, **case.options)


@on_all
def test_lse_is_used(backend, device):
    inputs = random_inputs(Case(), device=device)
    lse = oracle_lse(inputs.q, inputs.k).float()
    halved = attend_map(inputs, backend, lse=lse + torch.tensor(2.0).log())
    torch.testing.assert_close(halved, attend_map(inputs, backend) / 2)


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@of_both_lengths
@on_all
def test_nan_and_inf_are_where_sdpa_has_them(backend, N, value, where, device):
    inputs = random_inputs(Case(B=1, H=2, N=N), device=device)
    getattr(inputs, where)[0, 1, 7, 3] = value
    for is_causal in (False, True):
        # On GPUs one of its kernels splits an infinite key into parts whose difference is NaN for every query.
        cpu = (t.cpu() for t in (inputs.q, inputs.k, inputs.v))
        expected = F.scaled_dot_product_attention(*cpu, is_causal=is_causal).to(device)
        assert expected.isnan().any()
        out, amap = attend(inputs, backend, is_causal=is_causal)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(amap.isnan(), expected.isnan().any(1).any(-1)[..., None].expand_as(amap))
        for heads in ("max", "min"):
            assert torch.equal(attend_map(inputs, backend, is_causal=is_causal, heads=heads).isnan(), amap.isnan())


@pytest.mark.parametrize("rows", [None, (19, 0)])
@of_both_lengths
@on_all
def test_same_bits_every_time(backend, N, rows, device):
    inputs = random_inputs(Case(N=N, dtype=torch.bfloat16, bias="1HMN"), device=device)
    (out, amap), again = attend(inputs, backend, rows=rows), attend(inputs, backend, rows=rows)
    assert torch.equal(out, again[0])
    assert torch.equal(amap, again[1])


@of_both_lengths
@on_all
def test_properties_of_the_maps(backend, N, device):
    inputs = random_inputs(Case(N=N, bias="1HMN", is_causal=True), device=device)
    inputs.bias[..., 1, :] = 0.0  # else it has no keys and its sum is 0
    mean, most, least, each = (
        attend_map(inputs, backend, heads=heads, is_causal=True) for heads in ("mean", "max", "min", "each")
    )
    torch.testing.assert_close(mean.sum(-1), torch.ones_like(mean[..., 0]))
    torch.testing.assert_close(each.mean(1), mean)
    assert torch.equal(each.amax(1), most)
    assert torch.equal(each.amin(1), least)
    assert (least <= mean * (1 + 1e-6)).all()
    assert (mean <= most * (1 + 1e-6)).all()


@of_both_lengths
@on_all
def test_items_of_the_batch_do_not_mix(backend, N, device):
    inputs = random_inputs(Case(B=3, N=N, mask="B1MN"), device=device)
    order = torch.tensor([2, 0, 1], device=device)
    out, amap = attend(inputs, backend)
    out_, amap_ = attend([t[order] for t in inputs], backend)
    assert torch.equal(out_, out[order])
    assert torch.equal(amap_, amap[order])


@on_all
def test_chosen_rows_are_rows_of_the_whole_map(backend, device):
    inputs = random_inputs(Case(N=LONG, is_causal=True, bias="B1MN"), device=device)
    whole = attend_map(inputs, backend, is_causal=True)
    for rows in ([4, 19, 4], range(20), torch.tensor([7]), torch.tensor([7, 0], dtype=torch.int32)):
        rows = rows.to(device) if isinstance(rows, torch.Tensor) else rows
        chosen = attend_map(inputs, backend, is_causal=True, rows=rows)
        torch.testing.assert_close(chosen, whole[:, torch.as_tensor(rows, device=device).long()])


@on_all
def test_scalar_bias_and_mask(backend, device):
    inputs = random_inputs(Case(), device=device)
    amap = attend_map(inputs, backend)
    for bias in (torch.tensor(0.5), torch.tensor(True)):
        torch.testing.assert_close(attend_map(inputs._replace(bias=bias.to(device)), backend), amap)
    assert not attend(inputs._replace(bias=torch.tensor(False, device=device)), backend)[1].any()


def distant(device):
    """2^32 fp16 zeros. On the CPU they take no memory until they are touched."""
    size = 2**32 + 2**22
    if device.type == "cuda":
        if torch.cuda.mem_get_info(device)[0] < 4 * size:
            pytest.skip("needs 16 GiB of free GPU memory")
        return torch.zeros(size, dtype=torch.float16, device=device)
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named in newer Pythons
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    return torch.frombuffer(memory, dtype=torch.float16)


@pytest.mark.triton_kernels
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["items", "heads", "tokens"])
@of_both_lengths
def test_addresses_beyond_31_bits(N, dim, device):
    """The last item, head or token is 2^31 elements after the first. A wrapped offset would read zeros."""
    near = random_inputs(Case(N=N, dtype=torch.float16, mask="BHMN"), device=device)
    storage = distant(device)

    def spread(t, start):
        strides = list(torch.empty(t.shape, device="meta").stride())
        strides[dim] = 2**31 // (t.shape[dim] - 1) + 1
        home = storage if t.dtype == torch.float16 else storage.view(torch.bool)
        return home.as_strided(t.shape, strides, 2**31 + start).copy_(t)

    far = [spread(t, start) for t, start in zip(near, (0, 2**20, 2**21, 2**23), strict=True)]
    out, amap = attend(far, "triton")
    assert_attention(out, amap, *near)


@pytest.mark.gpu
def test_map_of_more_than_31_bits(device):
    """A map [1, 3, M, N] with more than 2^31 weights: the last head's weights are at the right place."""
    M = N = 27_000
    if torch.cuda.mem_get_info(device)[0] < 6 * M * N * 3:
        pytest.skip("needs 13 GiB of free GPU memory")
    inputs = random_inputs(Case(B=1, M=M, N=N, dtype=torch.bfloat16), device=device)
    each = attend_map(inputs, "triton", heads="each")
    torch.testing.assert_close(each.sum(-1), torch.ones(1, 3, M, device=device))
    rows = [0, M // 2, M - 1]
    few = inputs._replace(q=inputs.q[:, :, rows])
    assert_attention(None, each[:, :, rows], *few, heads="each")


@on_all
@of_both_lengths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_finite_bias_hides_as_minus_infinity_does(backend, N, dtype, device):
    inputs = random_inputs(Case(N=N, dtype=dtype, bias="B1MN"), device=device)
    inputs.bias[:, :, 3] = -torch.inf
    inputs.bias[:, :, 4, 2:] = -torch.inf
    lowest = inputs.bias.masked_fill(inputs.bias == -torch.inf, torch.finfo(dtype).min)
    for rows in (None, [4, 3]):
        wanted = attend(inputs, backend, rows=rows)
        for ours, want in zip(attend(inputs._replace(bias=lowest), backend, rows=rows), wanted, strict=True):
            assert torch.equal(ours, want)
    assert not wanted[1][:, 1].any()
