"""Capture of blocks that compute their own softmax: the weights that multiply the values are the map."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnx
from attnx.trace.folding import folding

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Explicit attention of 4 heads; `form` is how it multiplies the weights with the values."""

    def __init__(self, form: str = "matmul") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 4
        self.form = form
        self.qkv = nn.Linear(16, 48)
        self.mix = nn.Linear(4, 4)
        self.attend = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(0.5)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        if self.form == "three dimensions":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) / 2
        p = self.weights = self.attend(scores)
        if self.form == "transposed":
            out = (v.transpose(-2, -1) @ p.transpose(-2, -1)).transpose(-2, -1)
        elif self.form == "einsum":
            out = torch.einsum("bhij,bhjd->bhid", self.drop(p), v)
        elif self.form == "heads mixed":
            out = self.mix(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
        elif self.form == "another dtype":
            out = (p.to(torch.bfloat16) @ v.to(torch.bfloat16)).float()
        elif self.form == "values of the dtype":
            out = torch.matmul(p, v.type_as(p).to(p))
        elif self.form == "heads last":
            out = torch.einsum("bmnh,bhnd->bhmd", p.permute(0, 2, 3, 1), v)
        elif self.form == "a gate":
            out = torch.einsum("h, b h i j, ...hjd -> b h i d", torch.ones(4), p, v)
        elif self.form == "out" and not torch.is_grad_enabled():
            out = torch.matmul(p, v, out=torch.empty_like(v))
        else:
            out = torch.bmm(p, v).unflatten(0, (-1, 4)) if p.dim() == 3 else torch.matmul(p, v)
        return out.transpose(1, 2).flatten(2)


FORMS = (
    "matmul", "transposed", "einsum", "heads mixed", "another dtype", "three dimensions", "values of the dtype",
    "heads last", "a gate", "out",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_the_map(form: str) -> None:
    model = nn.Sequential(Attention(form)).eval()
    x = X[:1] if form == "three dimensions" else X
    with torch.no_grad():
        plain = model(x)
        with attnx.capture(model, heads="each") as trace:
            assert torch.equal(model(x), plain)
    assert list(trace) == ["0"]
    want = model[0].weights.view(-1, 4, 6, 6)
    if form == "heads mixed":  # what multiplies the values
        want = model[0].mix(want.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(trace["0"], want, rtol=0, atol=0)


@pytest.mark.parametrize(("heads", "fused"), [("mean", Tensor.mean), ("max", Tensor.amax), ("min", Tensor.amin)])
def test_heads_and_rows(heads: str, fused: Any) -> None:
    model = nn.Sequential(Attention()).eval()
    with torch.no_grad(), attnx.capture(model, heads=heads, rows=[3, 0]) as trace:
        model(X)
    torch.testing.assert_close(trace["0"], fused(model[0].weights, 1)[:, [3, 0]], rtol=0, atol=1e-7)


def test_a_map_is_no_view_of_the_weights() -> None:
    class ReusingAttention(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.kept = self.weights.clone()
            self.weights.zero_()
            return out

    model = nn.Sequential(ReusingAttention()).eval()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(X)
    assert torch.equal(trace["0"], model[0].kept)


@pytest.mark.parametrize("form", ["matmul", "three dimensions"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_weighted_maps(form: str, frozen: bool) -> None:
    model = nn.Sequential(Attention(form)).eval().requires_grad_(not frozen)
    x = X[:1] if form == "three dimensions" else X
    with attnx.capture(model, grad="signed") as trace:
        score = model(x).square().sum()
    trace.backward(score)
    p = model[0].weights.detach().view(-1, 4, 6, 6).requires_grad_()
    _, _, v = model[0].qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    (dp,) = torch.autograd.grad((p @ v).square().sum(), p)
    torch.testing.assert_close(trace["0"], (dp * p).mean(1), rtol=1e-5, atol=1e-6)


def test_a_backward_pass_of_the_model_is_its_own() -> None:
    model = nn.Sequential(Attention())
    model.eval()
    model(X).sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with attnx.capture(model):
        model(X).sum().backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(want) > 0
    assert all(map(torch.equal, got, want))


def test_two_softmaxes_of_one_product_are_combined() -> None:
    class PositionAttention(nn.Module):
        """As in ConViT: a gate between content and positions."""

        def forward(self, x: Tensor) -> Tensor:
            content = (x @ x.transpose(1, 2)).softmax(-1)
            position = torch.eye(6).expand(2, 6, 6).softmax(-1)
            self.both = 0.3 * content + 0.7 * position
            return self.both @ x

    model = nn.Sequential(PositionAttention()).eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(X)
    assert list(trace) == ["0"]
    torch.testing.assert_close(trace["0"], model[0].both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_sinks_are_left_out(dtype: torch.dtype) -> None:
    class SinkAttention(nn.Module):
        num_heads = 1

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.cat([x @ x.transpose(1, 2), x.new_zeros(2, 6, 1)], -1)
            self.p = F.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1].to(x.dtype)
            return self.p @ x

    model = nn.Sequential(SinkAttention()).eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(X.to(dtype))
    torch.testing.assert_close(trace["0"], model[0].p.float())
    assert trace["0"].shape == (2, 6, 6)


class SamplingAttention(nn.Module):
    """As in deformable attention: the weights multiply samples, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.score(x).softmax(-1)


def test_weights_that_multiply_no_matrix_are_no_map() -> None:
    model = nn.Sequential(Attention(), SamplingAttention()).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="1: its softmax is no attention"):
        with attnx.capture(model) as trace:
            model(X)
    assert list(trace) == ["0"]


def test_an_attention_beside_sdpa_is_a_second_map() -> None:
    class DualAttention(nn.Module):
        num_heads = 4

        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 4)).transpose(1, 2)
            unused = (q @ q.transpose(-2, -1)).softmax(-1)
            out = F.scaled_dot_product_attention(q, q, q, scale=0.1)
            after = (q @ q.transpose(-2, -1)).softmax(-1) @ q
            return (out + after + unused.sum()).transpose(1, 2).flatten(2)

    model = nn.Sequential(DualAttention()).eval()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(X)
    q = X.unflatten(-1, (4, 4)).transpose(1, 2)
    assert list(trace) == ["0", "0#2"]
    torch.testing.assert_close(trace["0"], (0.1 * q @ q.transpose(-2, -1)).softmax(-1))
    torch.testing.assert_close(trace["0#2"], (q @ q.transpose(-2, -1)).softmax(-1))


def test_other_modules_are_captured_on_request() -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    model = nn.Sequential(Attention(), Mixer()).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match=r"1: its softmax multiplies values, but .* Mixer"):
        with attnx.capture(model) as trace:
            model(X)
    assert list(trace) == ["0"]
    with torch.no_grad(), attnx.capture(model, layers=["1"]) as trace:
        hidden = model[0](X)
        model(X)
    torch.testing.assert_close(trace["1"], (hidden @ hidden.transpose(1, 2)).softmax(-1))


class LinearAttention(nn.Module):
    """Softmaxes over features and over positions, and no scores of queries and keys."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1) @ (x.softmax(-2).transpose(1, 2) @ x)


class RoutedAttention(nn.Module):
    """A softmax over experts that multiplies their matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 16), nn.Parameter(torch.ones(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1) @ self.experts


@pytest.mark.parametrize("kind", [LinearAttention, RoutedAttention, SamplingAttention])
@pytest.mark.parametrize("tokens", [6, 16])
def test_a_softmax_over_no_product_is_no_map(kind: type[nn.Module], tokens: int) -> None:
    model = nn.Sequential(kind()).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="its scores are no product of queries and keys"):
        with attnx.capture(model):
            model(torch.randn(2, tokens, 16))


@pytest.mark.parametrize(
    "change",
    [
        "masked",
        "scaled in place",
        "copy in place",
        "copy by index",
        "in place after a copy",
        "squared",
        "into a buffer",
        "heads last",
    ],
)
def test_what_multiplies_the_values_is_recorded(change: str) -> None:
    class ChangedAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.transpose(1, 2)
            p = scores.softmax(-1)
            if change == "masked":
                p = p.tril()
                p = p / p.sum(-1, keepdim=True)
            elif change == "scaled in place":
                p.mul_(0.5)
            elif change == "copy in place":
                p = p.clone().mul_(0.5)
            elif change == "copy by index":
                p = p.mT.contiguous().mT
                p[..., 0] = 0
            elif change == "in place after a copy":
                first, p = p, p.clone()
                first.mul_(0.5)
            elif change == "into a buffer":
                buffer = torch.zeros(2, 6, 6)
                buffer[..., [1, 0, 2, 3, 5, 4]] = p
                p = buffer
            elif change == "heads last":
                self.p = 0.5 * p
                return torch.einsum("bijh,bjd->bid", self.p[..., None], x)
            else:
                p = p @ p
            self.p = p
            return p @ x

    model = nn.Sequential(ChangedAttention()).eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(X)
    torch.testing.assert_close(trace["0"], model[0].p)
    with attnx.capture(model, grad="signed") as trace:
        trace.backward(model(X).square().sum())
    p = model[0].p.detach()
    torch.testing.assert_close(trace["0"], 2 * (p @ X @ X.mT) * p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_operands_of_the_shape_of_the_weights_are_no_weights(transposed: bool) -> None:
    class DifferentialAttention(nn.Module):
        """Two softmaxes, and heads of as many features as there are tokens."""

        num_heads = 2

        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 80)

        def forward(self, x: Tensor) -> Tensor:
            q1, k1, q2, k2, v = self.project(x).unflatten(-1, (5, 2, 8)).permute(2, 0, 3, 1, 4)
            first, second = (q1 @ k1.mT).softmax(-1), (q2 @ k2.mT).softmax(-1)
            self.p, self.v = first - 0.5 * second, v
            return ((v.mT @ self.p.mT).mT if transposed else self.p @ v).transpose(1, 2).flatten(2)

    model = nn.Sequential(DifferentialAttention()).eval()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(torch.randn(2, 8, 16))
    assert list(trace) == ["0"]
    torch.testing.assert_close(trace["0"], model[0].p, rtol=0, atol=0)
    with attnx.capture(model, grad="signed", heads="each") as trace:
        trace.backward(model(torch.randn(2, 8, 16)).square().sum())
    p, v = model[0].p.detach(), model[0].v.detach()
    torch.testing.assert_close(trace["0"], 2 * (p @ v @ v.mT) * p, rtol=1e-5, atol=1e-5)


def test_a_softmax_of_a_graph_names_the_model_of_the_graph() -> None:
    class Explicit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    graph = torch.fx.symbolic_trace(Explicit())
    with torch.no_grad(), pytest.raises(RuntimeError, match="the model itself: a graph computes its softmax: capture"):
        with attnx.capture(graph):
            graph(X)


def test_a_layer_of_which_one_map_of_two_is_unknown() -> None:
    class AgentAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 4)).transpose(1, 2)
            agents = q[:, :, :3]
            gathered = (agents @ q.mT).softmax(-1) @ q
            return ((q @ agents.mT).softmax(-1) @ gathered).transpose(1, 2).flatten(2)

    model = nn.Sequential(AgentAttention()).eval()
    message = r"of them: 0: expected \[B, H, M, N\], or dimensions .* got \[2, 4, 3, 6\]"
    with torch.no_grad(), pytest.warns(UserWarning, match=message), attnx.capture(model) as trace:
        model(X)
    assert trace["0"].shape == (2, 6, 3)


@pytest.mark.parametrize(
    "use",
    [
        "p.mT @ v",
        "v.mT @ p",
        "einsum('bij,bid->bjd')",
        "einsum('bij,bid')",
        "one column",
        "parts",
        "another gate",
        "softmax over the queries",
    ],
)
def test_products_that_do_not_sum_over_the_keys_are_no_attention(use: str) -> None:
    class OtherAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = (x @ x.transpose(1, 2)).softmax(-1)
            if use == "p.mT @ v":
                return p.mT @ x
            if use == "v.mT @ p":
                return (x.mT @ p).mT
            if use == "einsum('bij,bid->bjd')":
                return torch.einsum("bij,bid->bjd", p, x)
            if use == "einsum('bij,bid')":
                return torch.einsum("bij,bid", p, x)
            if use == "one column":
                return p.sum(-1, keepdim=True) @ x[:, :1]
            if use == "softmax over the queries":
                return (x @ x.transpose(1, 2)).softmax(1) @ x
            if use == "parts":
                return p[..., :3] @ x[:, :3] + p[..., 3:] @ x[:, 3:]
            return (x @ x.transpose(1, 2)).sigmoid() @ x

    model = nn.Sequential(OtherAttention()).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="0: its softmax is no attention"):
        with attnx.capture(model):
            model(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_attentions_of_one_module(dtype: torch.dtype) -> None:
    class TwoAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = (x @ x.transpose(1, 2)).softmax(-1, dtype=torch.float32).to(x.dtype)
            second = (-x @ x.transpose(1, 2)).softmax(-1, dtype=torch.float32).to(x.dtype)
            return first @ x + second @ x

    model, x = nn.Sequential(TwoAttention()).eval(), X.to(dtype)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(x)
    assert list(trace) == ["0", "0#2"]
    torch.testing.assert_close(trace["0"], (x @ x.transpose(1, 2)).softmax(-1, dtype=torch.float32))
    torch.testing.assert_close(trace["0#2"], (-x @ x.transpose(1, 2)).softmax(-1, dtype=torch.float32))


class Scores(nn.Module):
    """Weights of another shape than [B, H, M, N]; the input is [B, N, C]."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8))  # [B, N, H, D]
        p = torch.einsum("bihd,bjhd->bhij", q, q).softmax(-1)
        v = q.transpose(1, 2)
        if self.order == "hbmn":
            return (p.transpose(0, 1).contiguous().softmax(-1) @ v.transpose(0, 1)).permute(1, 2, 0, 3).flatten(2)
        p = torch.einsum("bihd,bjhd->bihj", q, q).softmax(-1)  # "bmhn"
        return torch.einsum("bihj,bjhd->bihd", p, q).flatten(2)


@pytest.mark.parametrize("order", ["hbmn", "bmhn"])
def test_unknown_orders_of_dimensions_are_refused(order: str) -> None:
    model = nn.Sequential(type("Attention", (Scores,), {})(order)).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="no map can be made of 0: expected"):
        with attnx.capture(model):
            model(torch.randn(3, 6, 16))


def test_heads_of_the_module_around() -> None:
    class DotProductAttention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    class MultiAttention(nn.Module):
        n_head = 4

        def __init__(self) -> None:
            super().__init__()
            self.attend = DotProductAttention()

        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 4)).transpose(1, 2).flatten(0, 1)
            return self.attend(q, q, q).unflatten(0, (len(x), 4)).transpose(1, 2).flatten(2)

    model = nn.Sequential(MultiAttention()).eval()
    with torch.no_grad(), attnx.capture(model, heads="each") as trace:
        model(X[:1])
    assert trace["0.attend"].shape == (1, 4, 6, 6)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"got \[8, 6, 6\]; MultiAttention has 4 heads"):
        with attnx.capture(model):  # the order of the batch and the heads is unknown
            model(X)


def test_qk_is_refused() -> None:
    model = nn.Sequential(Attention()).eval()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="0: expected keep='map' or 'auto'"):
        with attnx.capture(model, keep="qk"):
            model(X)
    with torch.no_grad(), attnx.capture(model, keep="auto") as trace:
        model(X)
    assert trace["0"].shape == (2, 6, 6)


def test_heads_that_do_not_fit_are_refused() -> None:
    """As in Longformer, whose weights are [B, M, H, window]."""

    class LocalAttention(nn.Module):
        num_heads = 3

        def forward(self, x: Tensor) -> Tensor:
            p = (x.unflatten(-1, (4, 4))[:, :, :3] @ torch.ones(4, 4)).softmax(-1)
            return (p @ torch.ones(4, 2)).flatten(2)

    model = nn.Sequential(LocalAttention()).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"got \[2, 6, 3, 4\]; LocalAttention has 3 heads"):
        with attnx.capture(model):
            model(X)


class Folds(nn.Module):
    """SDPA over the dimensions that a family uses."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.num_heads, self.kind = 4, kind

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 4))  # [B, N, H, D]
        if self.kind == "heads in the batch":
            q = q.transpose(1, 2).flatten(0, 1)  # only timm's, transformers' and torch's classes may do this
            return F.scaled_dot_product_attention(q, q, q).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
        q = q.unflatten(1, (3, 2))  # [B, windows, 2, H, D]
        order = (0, 1, 3, 2, 4) if self.kind == "windows first" else (0, 3, 1, 2, 4)
        back = (0, 1, 3, 2, 4) if self.kind == "windows first" else (0, 2, 3, 1, 4)
        q = q.permute(order)
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, q, q, mask).permute(back).flatten(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["heads in the batch", "windows first", "heads first"])
@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_over_other_dimensions(kind: str, grad: bool) -> None:
    attention = type("Attention", (Folds,), {"__module__": "timm.layers"})(kind)
    model = nn.Sequential(attention, nn.Linear(16, 16)).eval()
    x = torch.randn(5, 6, 16)
    q = x.unflatten(-1, (4, 4)).transpose(1, 2)  # [B, H, N, D]
    if kind != "heads in the batch":
        q = x.unflatten(1, (3, 2)).flatten(0, 1).unflatten(-1, (4, 4)).transpose(1, 2)
    scores = (q @ q.transpose(-2, -1) / 2).double()
    if kind != "heads in the batch":
        scores = scores.masked_fill(~torch.ones(2, 2, dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    with torch.set_grad_enabled(grad):
        plain = model(x)
        with attnx.capture(model, heads="each", grad="signed" if grad else False) as trace:
            out = model(x)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    if grad:
        (gradient,) = torch.autograd.grad(plain.square().sum(), plain)
        upstream = (gradient @ model[1].weight).unflatten(-1, (4, 4))
        upstream = upstream if kind == "heads in the batch" else upstream.unflatten(1, (3, 2)).flatten(0, 1)
        p = p * (upstream.transpose(1, 2).double() @ q.double().transpose(-2, -1))
        trace.backward(out.square().sum())
    torch.testing.assert_close(trace["0"].double(), p, rtol=1e-4, atol=1e-6)


def test_ambiguous_dimensions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"got \[2, 4, 4, 6, 6\]; Attention has 4 heads"):
        folding((2, 4, 4, 6, 6), [(Attention(), X)])
    with pytest.raises(NotImplementedError, match=r"got \[7, 6, 6\]"):
        folding((7, 6, 6), [(Attention(), X)])
