"""Plans of launches: a call with inputs like those of an earlier call fills in addresses and launches."""

import ctypes

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import attnx
from attnx.kernels.configs import Launch, Target
from attnx.ops.backends import launches, plans
from attnx.ops.backends import triton as backend
from attnx.testing import (
    Case,
    assert_attention,
    assert_attention_lse,
    assert_vecmat,
    oracle_lse,
    random_inputs,
    random_vector,
)


class Interpreted:
    """A compiled kernel's stand-in on a CPU: takes addresses, as the driver does, and runs Triton's interpreter.

    It knows the tensors of the first launch by shape, strides and dtype only.
    """

    def __init__(self, launch):
        self.launch = launch
        self.calls = 0

    def __getitem__(self, grid):
        assert grid == (*self.launch.grid, 1, 1)[:3]
        return self.run

    def run(self, *args):
        self.calls += 1
        names = self.launch.kernel.arg_names
        values = {name: self.at(value, self.launch.all_args[name]) for name, value in zip(names, args, strict=True)}
        config = self.launch.config
        self.launch.kernel[self.launch.grid](**values, num_warps=config.num_warps, num_stages=config.num_stages)

    @staticmethod
    def at(value, first):
        """The tensor at an address, of the shape, strides and dtype of the first launch's."""
        if not isinstance(first, torch.Tensor):
            assert value == first
            return value
        extent = 1 + sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True))
        memory = (ctypes.c_char * (extent * first.element_size())).from_address(value)
        return torch.frombuffer(memory, dtype=first.dtype).as_strided(first.shape, first.stride())


@pytest.fixture
def planned(monkeypatch):
    """Plans on CPU tensors; the compiled kernels of all launches that made plans, in order."""
    compiled = []
    run = Launch.run

    def interpret(launch):
        run(launch)
        compiled.append(Interpreted(launch))
        return compiled[-1]

    monkeypatch.setattr(Launch, "run", interpret)
    monkeypatch.setattr(plans, "is_planned", lambda t: True)
    monkeypatch.setattr(plans, "_KEPT", {})
    return compiled


pytestmark = [
    pytest.mark.triton_kernels,
    pytest.mark.skipif(torch.cuda.is_available(), reason="plans of a GPU are tested in test_kernels.py"),
]


@pytest.mark.parametrize("options", [{}, {"heads": "max"}, {"heads": "each"}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("n", [20, 70])
def test_attention_by_plan(options, n, planned):
    """Short rows: one launch, or two with split heads. The second call makes no new launch."""
    case = Case(B=1, H=4, N=n, bias="B11N")
    for seed in range(3):
        inputs = random_inputs(case, seed=seed)
        out, amap = attnx.attention(*inputs[:3], bias=inputs.bias, backend="triton", **options)
        assert_attention(out, amap, *inputs, **options)
        if not seed:
            launched = len(planned)
            assert launched >= 1
    assert len(planned) == launched
    assert [kernel.calls for kernel in planned] == [2] * launched


def test_long_rows_by_plan(planned):
    case = Case(B=1, H=2, M=17, N=300, Hk=1)
    for seed in range(2):
        inputs = random_inputs(case, seed=seed)
        out, amap = attnx.attention(*inputs[:3], backend="triton")
        assert_attention(out, amap, *inputs)
        out, lse = attnx.attention_lse(*inputs[:3], backend="triton")
        assert_attention_lse(out, lse, *inputs)
        r = random_vector(case, seed=seed)
        assert_vecmat(
            attnx.vecmat(r, *inputs[:2], lse=oracle_lse(*inputs[:2]).float(), backend="triton"), r, *inputs[:2]
        )
        if not seed:
            launched = len(planned)
    assert len(planned) == launched
    assert all(kernel.calls for kernel in planned)


def test_a_map_from_lse_by_plan(planned, monkeypatch):
    monkeypatch.setattr(launches, "target", lambda device: Target("cuda", 90, 1))
    for seed in range(2):
        inputs = random_inputs(Case(H=2, layout="packed"), seed=seed)
        lse = oracle_lse(inputs.q, inputs.k).float()
        assert_attention(None, attnx.attention_map(*inputs[:2], lse=lse, backend="triton"), *inputs)
    assert [kernel.calls for kernel in planned] == [1]


def test_other_inputs_get_other_plans(planned):
    """Other shapes, strides, dtypes, options, alignments, and inputs that share an address."""
    room = torch.randn(2 * 3 * 20 * 16 + 1)
    whole, shifted = (room[i : i + 2 * 3 * 20 * 16].view(2, 3, 20, 16) for i in (0, 1))
    k = torch.randn(2, 3, 20, 16)
    calls = [
        dict(q=whole, k=k), dict(q=shifted, k=k), dict(q=whole, k=whole), dict(q=whole.half(), k=k.half()),
        dict(q=whole.transpose(1, 2).contiguous().transpose(1, 2), k=k), dict(q=whole, k=k, heads="min"),
        dict(q=whole, k=k, scale=0.5), dict(q=whole, k=k, is_causal=True), dict(q=whole[:1], k=k[:1]),
        dict(q=whole, k=k[:, :, :7]), dict(q=whole, k=k, bias=torch.randn(20)),
        dict(q=whole, k=k, bias=torch.rand(20) > 0.5), dict(q=whole, k=k, lse=torch.zeros(2, 3, 20)),
    ]  # fmt: skip
    for call in calls:
        attnx.attention_map(**call, backend="triton")
    assert len(plans._KEPT) == len(calls)
    for call in calls:
        options = {name: value for name, value in call.items() if name not in ("q", "k")}
        again = attnx.attention_map(call["q"].clone(), call["k"].clone(), **options, backend="triton")
        assert again.shape == (len(call["q"]), 20, call["k"].shape[2])


def test_one_tensor_for_two_inputs_is_not_two_tensors(planned):
    q, k = torch.randn(2, 1, 2, 20, 16)
    attnx.attention_map(q, q, backend="triton")
    assert_attention(None, attnx.attention_map(q, k, backend="triton"), q, k, k)
    attnx.attention_map(k, k, backend="triton")
    assert_attention(None, attnx.attention_map(k, k, backend="triton"), k, k, k)


def test_chosen_rows_and_wide_heads_have_no_plan(planned):
    """Rows are gathered by torch, and an output in parts has no single tensor."""
    inputs = random_inputs(Case(D=16))
    attnx.attention_map(*inputs[:2], rows=[0, 3], backend="triton")
    assert not plans._KEPT
    wide = random_inputs(Case(B=1, H=1, M=5, N=20, D=16, Dv=300, dtype=torch.float16))
    attnx.attention_lse(*wide[:3], backend="triton")
    assert not plans._KEPT
    out, lse = attnx.attention_lse(*wide[:3], backend="triton")
    assert_attention_lse(out, lse, *wide)


def test_plans_are_bounded(planned, monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 3)
    for n in range(1, 7):
        q = torch.randn(1, 2, n, 16)
        attnx.attention_map(q, q, backend="triton")
        assert len(plans._KEPT) <= 3


def test_the_interpreter_makes_no_plans():
    assert not plans.is_planned(torch.zeros(1))
    q = torch.randn(1, 2, 5, 16)
    before = dict(plans._KEPT)
    attnx.attention_map(q, q, backend="triton")
    assert before == plans._KEPT
    assert backend.planned is plans.planned


class NoDriver:
    """A compiled kernel that does nothing: what is left is Python."""

    def __getitem__(self, grid):
        return lambda *args: None


def test_a_planned_launch_calls_little_python(monkeypatch):
    """The number of Python functions, since times differ from machine to machine."""
    import sys

    monkeypatch.setattr(Launch, "run", lambda launch: NoDriver())
    monkeypatch.setattr(plans, "is_planned", lambda t: True)
    monkeypatch.setattr(plans, "_KEPT", {})
    q, k = torch.randn(2, 8, 3, 300, 64).bfloat16()
    scores, lse = attnx.ops.scores.Scores(q, k, None, False, 0.125), torch.zeros(8, 3, 300)
    run = lambda: backend.attention_map(scores, attnx.ops.reducers.Reduction.MEAN, None, lse)  # noqa: E731
    run()
    assert len(plans._KEPT) == 1
    called = []
    sys.setprofile(lambda frame, event, arg: called.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    assert called.count("Plan.run") == 1
    assert len(called) <= 12, called
