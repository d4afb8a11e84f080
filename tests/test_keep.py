"""keep="qk": the kept tensors, equal results to keep="map", and linear memory."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnx
from attnx import TokenLayout, Trace
from attnx.kernels.cpu.build import instructions
from attnx.ops.backends import native
from attnx.testing import oracle
from attnx.trace import attend as kept
from attnx.trace.attend import attend
from attnx.trace.qk_record import QKRecord
from attnx.trace.records import MapRecord

ROOT = Path(__file__).resolve().parents[1]
TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}


def tiny(name: str = "vit_tiny_patch16_224", size: int = 48, **options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **TINY, img_size=size, **options).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # rows of attention that are not nearly uniform
    return model, torch.randn(2, 3, size, size)


def run(model: nn.Module, images: Tensor, **options: object) -> Trace:
    with torch.no_grad(), attnx.capture(model, **options) as trace:  # type: ignore[arg-type]
        model(images)
    return trace


class Masked(nn.Module):
    """Three attention layers. The last tokens are padding, and one head attends to the first token only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Inner(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (x, x.roll(1, 1), x))
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def masked() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(2, 3, 13, 13, dtype=torch.bool)
    mask[..., 11:] = False
    mask[:, 1, 4:7] = False  # rows that have no keys in one head
    mask[0, :, 9] = False  # and in none
    return Masked().eval(), torch.randn(2, 13, 24), mask


def exact_rollout(maps: list[Tensor], residual: float = 0.5) -> Tensor:
    """Rollout [B, N, N] in float64, by its definition."""
    n = maps[0].shape[-1]
    product = torch.eye(n, dtype=torch.float64).expand(len(maps[0]), n, n)
    for f in maps:
        m = (1 - residual) * f + residual * torch.eye(n, dtype=torch.float64)
        product = m / m.sum(-1, keepdim=True).clamp(min=1e-300) @ product
    return product


def exact_maps(trace: Trace) -> list[Tensor]:
    layers = [trace.kept(name) for name in trace]
    assert layers
    assert all(isinstance(layer, QKRecord) for layer in layers)
    return [oracle(layer.q, layer.k, layer.k, layer.bias, layer.is_causal, layer.scale)[1] for layer in layers]


@pytest.fixture
def no_map(monkeypatch):
    """Raise an error if a whole map is computed. Rows of a map are allowed."""
    make = kept.attention_map

    def spy(*args, **options):
        assert options["rows"] is not None
        return make(*args, **options)

    monkeypatch.setattr(kept, "attention_map", spy)


@pytest.fixture
def no_map_is_small(monkeypatch):
    monkeypatch.setattr(kept, "SMALL_MAP", 0)


@pytest.mark.parametrize("heads", ["mean", "max", "min", "each"])
@pytest.mark.parametrize("rows", [None, [5, 0]])
def test_maps_made_on_demand_are_those_of_keep_map(heads: str, rows: list[int] | None) -> None:
    model, images = tiny()
    maps, ours = (run(model, images, keep=keep, heads=heads, rows=rows) for keep in ("map", "qk"))
    assert list(ours) == list(maps)
    for name in maps:
        layer = ours.kept(name)
        assert isinstance(layer, QKRecord)
        assert layer.shape == maps[name].shape == ours[name].shape
        torch.testing.assert_close(ours[name], maps[name], rtol=1e-5, atol=1e-7)
        for i in (0, -1):
            torch.testing.assert_close(layer.row(i), maps[name][..., i, :], rtol=1e-5, atol=1e-7)
        if heads != "each":
            same = maps.kept(name)
            torch.testing.assert_close(layer.row_sums(), same.row_sums())
            r = torch.rand(2, 2, layer.shape[1])
            torch.testing.assert_close(layer.vecmat(r), same.vecmat(r), rtol=1e-5, atol=1e-7)
    assert repr(ours) == repr(maps)


def test_the_output_is_the_models_own() -> None:
    model, images = tiny()
    with torch.no_grad():
        plain = model(images)
        with attnx.capture(model, keep="qk"):
            heard = model(images)
    torch.testing.assert_close(heard, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"residual": 0.0}, {"start": 1}, {"rows": 4}, {"rows": "mean"}])
def test_rollout_makes_no_map_and_is_exact(options: dict, no_map: None) -> None:
    trace = run(*tiny(), keep="qk")
    ours = attnx.rollout(trace, **options).flatten(1)
    product = exact_rollout(exact_maps(trace)[options.get("start", 0) :], options.get("residual", 0.5))
    row = options.get("rows") or 0
    want = product[:, 1:].mean(1) if row == "mean" else product[:, row]
    torch.testing.assert_close(ours.double(), want[:, 1:], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": "all"},
        {"discard": 0.7},
        {"discard": 0.7, "rows": "all"},
        {"preset": "vit-explain"},
        {"preset": "vit-explain", "rows": "mean"},
        {"preset": "vit-explain", "discard": 0.9},
    ],
)
@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_is_that_of_the_maps(heads: str, options: dict) -> None:
    model, images = tiny()
    want, ours = (attnx.rollout(run(model, images, keep=keep, heads=heads), **options) for keep in ("map", "qk"))
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", ["mean", "max"])
def test_rollout_of_heads_kept_apart(fuse: str) -> None:
    model, images = tiny()
    want = attnx.rollout(run(model, images, heads=fuse))
    for keep in ("map", "qk"):
        ours = attnx.rollout(run(model, images, heads="each", keep=keep), heads=fuse)
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


def test_rollout_where_rows_have_no_keys(no_map: None) -> None:
    model, x, mask = masked()
    layout = TokenLayout(1, (3, 4))
    with torch.no_grad(), attnx.capture(model, keep="qk", layout=layout) as trace:
        model(x, mask)
    sums = trace.kept(0).row_sums()
    assert sums[0, 4] == pytest.approx(2 / 3)
    assert sums[0, 9] == 0
    for residual in (0.5, 0.0):
        want = exact_rollout(exact_maps(trace), residual)
        for row in (0, 5, 9):
            ours = attnx.rollout(trace, residual, query=row).flatten(1)
            torch.testing.assert_close(ours.double(), want[:, row, 1:], rtol=1e-5, atol=1e-8)


def test_cls_maps_and_layer_maps_cost_a_row(no_map: None) -> None:
    model, images = tiny()
    maps, ours = run(model, images), run(model, images, keep="qk")
    torch.testing.assert_close(attnx.cls_map(ours), attnx.cls_map(maps), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(attnx.layer_maps(ours).maps, attnx.layer_maps(maps).maps, rtol=1e-5, atol=1e-7)
    assert ours.layout == maps.layout
    assert "[2, 10, 10]" in repr(ours)
    assert "blocks.0.attn" in ours
    assert -1 in ours
    assert "blocks.3.attn" not in ours
    assert 3 not in ours


def test_a_pooling_layer_is_where_rollout_starts() -> None:
    model, images = tiny("vit_base_patch16_siglip_224")
    want, ours = (attnx.rollout(run(model, images, keep=keep)) for keep in ("map", "qk"))
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)


def test_q_and_k_do_not_keep_v() -> None:
    trace = run(*tiny(), keep="qk")
    for name in trace:
        layer = trace.kept(name)
        for t in (layer.q, layer.k):
            assert t.untyped_storage().nbytes() == t.nbytes
    # A model that makes q and k by themselves: nothing is copied.
    seen: list[Tensor] = []

    class Own(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            seen[:] = q, k
            return F.scaled_dot_product_attention(q, k, k)

    model = Own()
    with attnx.capture(model, keep="qk") as trace:
        model(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    assert trace.kept(0).q.data_ptr() == seen[0].data_ptr()
    assert trace.kept(0).k.data_ptr() == seen[1].data_ptr()


@pytest.mark.parametrize(
    ("size", "options", "maps"),
    [
        (48, {}, True),
        (48, {"heads": "max"}, True),
        (256, {}, False),  # 257 tokens: 4 N^2 bytes against 2 N * 48 * 4 and the lse
        (256, {"heads": "max"}, True),
        (256, {"heads": "each"}, True),
        (256, {"rows": [0]}, True),
    ],
)
def test_auto_keeps_what_is_smaller(size: int, options: dict, maps: bool, no_map_is_small: None) -> None:
    model, images = tiny(size=size)
    trace = run(model, images, keep="auto", **options)
    assert trace
    assert all(isinstance(trace.kept(name), MapRecord if maps else QKRecord) for name in trace)
    others = run(model, images, keep="qk" if maps else "map", **options)
    if options.get("heads") is None and "rows" not in options:
        assert trace.nbytes < others.nbytes


def test_auto_counts_a_bias_that_would_be_kept(no_map_is_small: None) -> None:
    class Biased(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    x = torch.randn(1, 2, 200, 8)
    for bias, maps in ((torch.zeros(200), False), (torch.zeros(1, 2, 200, 200), True)):
        model = Biased()
        with attnx.capture(model, keep="auto") as trace:
            model(x, bias)
        assert isinstance(trace.kept(0), MapRecord) == maps


def test_memory_is_linear_in_the_tokens(no_map_is_small: None) -> None:
    sizes = []
    for size in (512, 1024):
        model, images = tiny(size=size)
        trace = run(model, images[:1], layers=0, keep="auto")
        n = trace.kept(0).shape[-1]
        assert trace.nbytes == n * (2 * 48 * 4 + 3 * 4)
        sizes.append(trace.nbytes / n)
    assert sizes[0] == sizes[1]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_rollout_is_below_one_map() -> None:
    """4,097 tokens: a map takes 67 MB."""
    code = (
        "import torch, timm, attnx\n"
        "model = timm.create_model('vit_tiny_patch16_224', embed_dim=48, depth=3, num_heads=3, img_size=1024).eval()\n"
        "x = torch.randn(1, 3, 1024, 1024)\n"
        # Not ru_maxrss: a child inherits its parent's.
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "with torch.inference_mode(): model(x)\n"
        "before = peak(); attnx.Extractor(model)(x); after = peak()\n"
        "attnx.Extractor(model, keep='map')(x); print(after - before, peak() - after)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours, maps = (int(kb) * 1024 for kb in done.stdout.split())
    one_map = 4 * 4097**2
    assert ours < 0.7 * one_map
    assert maps > 2 * one_map


def test_nested_captures_keep_what_each_was_asked_for() -> None:
    model, images = tiny()
    with torch.no_grad():
        plain = model(images)
        with (
            attnx.capture(model, keep="qk") as outer,
            attnx.capture(model) as middle,
            attnx.capture(model, keep="qk", heads="max") as inner,
        ):
            heard = model(images)
    torch.testing.assert_close(heard, plain, rtol=1e-5, atol=1e-5)
    for name in middle:
        assert isinstance(outer.kept(name), QKRecord)
        torch.testing.assert_close(outer[name], middle[name], rtol=1e-5, atol=1e-7)
        assert isinstance(inner.kept(name), QKRecord)
        assert (inner[name] >= middle[name] * (1 - 1e-5)).all()


def test_gradients_flow_and_nothing_of_the_graph_is_kept() -> None:
    model, images = tiny()
    with attnx.capture(model, keep="qk") as trace:
        model(images).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(images).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)
    for name in trace:
        layer = trace.kept(name)
        assert all(t.grad_fn is None and not t.requires_grad for t in (layer.q, layer.k, layer.lse))
        assert not trace[name].requires_grad

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.big = torch.zeros(3)
            seen.append(weakref.ref(ctx.big))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = Step.apply(x)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=x.sum((1, 3))[:, None, None])

    seen: list = []
    model = Own()
    with attnx.capture(model, keep="qk") as trace:
        out = model(torch.randn(1, 2, 5, 8, requires_grad=True))
    assert out.requires_grad
    del out
    gc.collect()
    assert seen[0]() is None
    assert trace[0].shape == (1, 5, 5)


def test_autocast() -> None:
    """The kept q and k have the dtype that attention used. Autocast does not affect them or rollout."""
    model, images = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for keep in ("qk", "map"):
            with attnx.capture(model, keep=keep) as trace:
                model(images)
            if keep == "qk":
                assert trace.kept(0).q.dtype == torch.bfloat16
                ours, want = trace, exact_rollout(exact_maps(trace))[:, 0, 1:]
            rolled, amap = attnx.rollout(trace), trace[0].clone()
            if keep == "qk":
                torch.testing.assert_close(rolled.flatten(1).double(), want, rtol=1e-5, atol=1e-8)
            else:
                torch.testing.assert_close(amap, ours[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(attnx.rollout(trace), rolled, rtol=0, atol=0)
    torch.testing.assert_close(attnx.rollout(ours).flatten(1).double(), want, rtol=1e-5, atol=1e-8)
    # q and k in fp32, read under autocast.
    plain = run(model, images, keep="qk")
    before = attnx.rollout(plain), plain[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attnx.rollout(plain), before[0])
        assert torch.equal(plain[1], before[1])


def test_inference_mode_and_bfloat16() -> None:
    model, images = tiny()
    model, images = model.bfloat16(), images.bfloat16()
    with torch.inference_mode(), attnx.capture(model, keep="qk") as trace:
        model(images)
    maps = run(model, images)
    torch.testing.assert_close(attnx.rollout(trace), attnx.rollout(maps), rtol=1e-4, atol=1e-6)
    assert trace[0].dtype == torch.float32


def test_a_bias_causal_and_grouped_heads_are_kept() -> None:
    class Custom(nn.Module):
        def forward(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
            sdpa = F.scaled_dot_product_attention
            sdpa(q, k, k, is_causal=True, enable_gqa=True)
            return sdpa(q, k, k, attn_mask=bias, scale=0.3, enable_gqa=True)

    q, k, bias = torch.randn(2, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(5, 7)
    model = Custom().eval()
    with attnx.capture(model, keep="qk") as trace:
        out = model(q, k, bias)
    k = k.expand(2, -1, -1, -1)
    want, amap = oracle(q, k, k, bias=bias, scale=0.3)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace["#2"].double(), amap, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace[""].double(), oracle(q, k, k, is_causal=True)[1], rtol=1e-5, atol=1e-6)
    r = torch.rand(2, 3, 5)
    torch.testing.assert_close(trace.kept("#2").vecmat(r).double(), r.double() @ amap, rtol=1e-5, atol=1e-6)


def test_patch_and_extractor_keep_too() -> None:
    model, images = tiny(size=256)
    handle = attnx.patch(model, keep="qk")
    with torch.no_grad():
        model(images)
        first = handle.trace.kept(0)
        model(images + 1)
    assert handle.trace.kept(0) is not first
    assert isinstance(handle.trace.kept(0), QKRecord)
    handle.remove()
    results = [attnx.Extractor(model, keep=keep)(images) for keep in ("auto", "qk", "map")]
    assert torch.equal(results[0], results[2])  # maps that are small
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-8)
    assert torch.equal(attnx.Extractor(model)(images), results[0])


@pytest.mark.parametrize("keep", ["maps", "QK", None])
def test_words_that_are_none(keep: object) -> None:
    model, _ = tiny()
    message = rf"keep: expected one of map, qk, auto; got {keep!r}"
    with pytest.raises(ValueError, match=message), attnx.capture(model, keep=keep):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match=message):
        attnx.patch(model, keep=keep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        attnx.Extractor(model, keep=keep)  # type: ignore[arg-type]


def test_what_was_kept_and_then_changed_raises():
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind(0)
    q, k, bias = q.clone(), k.clone(), torch.zeros(1, 1, 9, 9)
    for changed in (q, k, bias):
        _, layer = attend(
            q, k, v, "qk", heads="mean", rows=None, bias=bias, is_causal=False, scale=None, backend="eager"
        )
        layer.map()
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified in place"):
            layer.map()
        with pytest.raises(RuntimeError, match="modified in place"):
            layer.vecmat(torch.ones(1, 1, 9))


def test_row_out_of_range():
    q, k, v = torch.randn(3, 1, 2, 6, 16).unbind(0)
    for keep in ("qk", "map"):
        call = dict(heads="mean", rows=None, bias=None, is_causal=False, scale=None, backend="eager")
        _, layer = attend(q, k, v, keep, **call)
        for i in (6, -7):
            with pytest.raises(IndexError):
                layer.row(i)


@pytest.mark.parametrize("lowest", [-1e9, -65504.0, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("n", [20, 300])
def test_a_row_that_a_finite_mask_hides_is_empty_in_both_forms(n, lowest):
    q, k, v = torch.randn(3, 1, 2, n, 16).unbind(0)
    bias = torch.zeros(1, 1, n, n)
    bias[..., 2, :] = lowest
    call = dict(heads="mean", rows=None, bias=bias, is_causal=False, scale=None, backend="eager")
    kinds = [attend(q, k, v, keep, **call)[1] for keep in ("map", "qk")]
    for layer in kinds:
        assert not layer.map()[:, 2].any()
        torch.testing.assert_close(layer.row_sums(), kinds[0].map().sum(-1))


def test_a_captured_map_that_is_written_to_is_what_rollout_reads() -> None:
    trace = run(*tiny(), keep="map")
    for name in trace:
        trace[name][..., 1:4] = 0
    want = exact_rollout([trace[name].double() for name in trace])[:, 0, 1:]
    torch.testing.assert_close(attnx.rollout(trace).flatten(1).double(), want, rtol=1e-5, atol=1e-8)


def test_only_whole_mean_maps_without_a_mask_are_known_to_be_stochastic() -> None:
    q = torch.randn(2, 3, 5, 8)
    call = dict(bias=None, is_causal=False, scale=None, backend="auto")

    def known(heads: str = "mean", rows: Tensor | None = None, keep: str = "map", **other: object) -> bool:
        return attend(q, q, q, keep, heads=heads, rows=rows, **{**call, **other})[1].rows_sum_to_one

    assert known()
    assert known(is_causal=True)
    assert not known(heads="max")
    assert not known(heads="each")
    assert not known(rows=torch.tensor([0]))
    assert not known(bias=torch.zeros(5, 5))  # which may leave a head no keys
    assert not known(keep="qk")


def test_a_row_of_infinite_scores_takes_no_mass_from_the_others() -> None:
    """Such a row of q and k passes on nothing: its token keeps all of its mass."""
    try:
        native.kernel(instructions())
    except ImportError as error:
        pytest.skip(str(error))
    q, k = torch.randn(1, 2, 10, 8), -torch.rand(1, 2, 10, 8)
    q[:, :, 4] = torch.inf
    call = dict(bias=None, is_causal=False, scale=None, backend="native")
    trace = Trace(nn.Identity(), "mean", None, TokenLayout(1, (3, 3)))
    for layer in "ab":
        trace.add(layer, attend(q, k, k, "qk", heads="mean", rows=None, **call)[1])
    product = attnx.rollout(trace, query="all")
    assert float(product.sum()) == pytest.approx(10, rel=1e-5)
    mean = attnx.rollout(trace, query="mean").flatten()
    torch.testing.assert_close(mean, product[0, 1:, 1:].mean(0), rtol=1e-4, atol=1e-7)
