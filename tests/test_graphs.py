"""Recorded and replayed calls of a function, and dropped graphs; with recordings that run on any device."""

import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import attnx
from attnx.extract.cuda_graphs import Graphs
from attnx.extract.model_state import model_state

MADE = []


class Replayed:
    """A recording of `Scale`. Like a CUDA graph it calls no Python of the model, and reads the weight where it was."""

    nbytes = 100

    def __init__(self, function, x):
        self.weight = function.__self__.weight.data
        self.calls = 0
        MADE.append(self)

    def __call__(self, x):
        self.calls += 1
        return x * self.weight


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.called = 0

    def forward(self, x):
        self.called += 1
        return (x * self.weight).detach()


@pytest.fixture
def model():
    MADE.clear()
    return Scale()


def graphs_of(model, auto=True, record=Replayed, limit=10**6):
    return Graphs(model.forward, lambda: model_state(model), auto, record, lambda x: limit)


def images(size=2, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_a_graph_is_recorded_at_the_second_call_of_a_shape(model):
    graphs = graphs_of(model)
    for i in range(4):
        x = images(seed=i)
        torch.testing.assert_close(graphs(x), x * 3)
    assert model.called == 2
    (graph,) = MADE
    assert graph.calls == 3  # the first is the check
    assert graphs.nbytes == 100
    graphs(images(3))
    assert len(MADE) == 1
    graphs(images(3))
    assert len(MADE) == 2


def test_on_request_at_the_first(model):
    graphs = graphs_of(model, auto=False)
    for i in range(3):
        graphs(images(seed=i))
    assert model.called == len(MADE) == 1


def test_a_call_that_was_noted_counts(model):
    graphs = graphs_of(model)
    graphs.note(images())
    graphs(images())
    assert len(MADE) == 1


def test_four_graphs_are_kept_and_the_oldest_is_dropped(model):
    graphs = graphs_of(model, auto=False)
    for size in (1, 2, 3, 4, 1, 5):
        graphs(images(size))
    assert graphs.nbytes == 400
    assert len(MADE) == 5
    graphs(images(1))
    assert len(MADE) == 5
    graphs(images(2))  # was dropped
    assert len(MADE) == 6


def test_their_memory_is_bounded(model):
    graphs = graphs_of(model, limit=250)
    for size in (1, 2, 3):
        graphs(images(size))
        graphs(images(size))
        assert graphs.nbytes <= 250
    assert graphs.nbytes == 200
    graphs = graphs_of(model, limit=50)
    graphs(images())
    with pytest.warns(UserWarning, match="without CUDA graphs: a graph takes 100 bytes, more than 50"):
        graphs(images())
    torch.testing.assert_close(graphs(images()), images() * 3)
    assert graphs.nbytes == 0


def test_other_settings_are_other_graphs(model):
    graphs = graphs_of(model, auto=False)
    graphs(images())
    with torch.autocast("cpu", torch.bfloat16):
        graphs(images())
    graphs(images().double())
    graphs(images(4)[::2])
    assert len(MADE) == 4
    graphs(images())
    assert len(MADE) == 4


def test_a_change_of_the_model_drops_the_graphs(model):
    graphs = graphs_of(model, auto=False)
    graphs(images())
    with torch.no_grad():
        model.weight.mul_(2)  # in place: the graph reads it
    torch.testing.assert_close(graphs(images()), images() * 6)
    assert len(MADE) == 1
    model.weight = nn.Parameter(torch.tensor(5.0))
    torch.testing.assert_close(graphs(images()), images() * 5)
    model.weight.data = torch.tensor(7.0)
    torch.testing.assert_close(graphs(images()), images() * 7)
    model.other = nn.Linear(1, 1)
    graphs(images())
    model.other.eval()
    graphs(images())
    assert len(MADE) == 5
    assert graphs.nbytes == 100


def test_hooks_are_not_left_out(model):
    graphs, seen = graphs_of(model), []
    for _ in range(2):
        graphs(images())
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="got hooks of the model"):
        graphs(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs(images())
    assert model.called == 4
    hook.remove()
    graphs(images())
    assert model.called == 4  # by the graph again
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="compile: expected no hooks, which a graph would not run"):
        graphs_of(model, auto=False)(images())


class Fails(Replayed):
    def __init__(self, function, x):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


class Differs(Replayed):
    def __call__(self, x):
        return super().__call__(x) * 1.01


@pytest.mark.parametrize(
    ("record", "message"),
    [(Fails, "RuntimeError: CUDA error: operation not permitted when stream is capturing$"), (Differs, "differ")],
)
def test_a_model_that_can_not_be_recorded(model, record, message):
    graphs = graphs_of(model, record=record)
    graphs(images())
    with pytest.warns(UserWarning, match=message):
        torch.testing.assert_close(graphs(images()), images() * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2):
            torch.testing.assert_close(graphs(images(seed=i)), images(seed=i) * 3)
    assert model.called == 4
    with pytest.raises(RuntimeError, match="compile: expected a pass that can be recorded as a CUDA graph"):
        graphs_of(model, auto=False, record=record)(images())


def test_infinite_and_missing_numbers_may_be_replayed(model):
    x = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    graphs = graphs_of(model, auto=False)
    graphs(x)
    torch.testing.assert_close(graphs(x), x * 3, equal_nan=True)
    graphs(x[1:])


def test_the_state_of_a_model():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32).eval()
    before = model_state(vit)
    assert model_state(vit) == before
    vit(torch.zeros(1, 3, 32, 32))
    assert model_state(vit) == before
    vit.blocks[1].mlp.fc1.forward = lambda x: x
    assert model_state(vit) != before
    del vit.blocks[1].mlp.fc1.forward
    assert model_state(vit) == before
    vit.half()
    assert model_state(vit) != before
    handle = attnx.patch(vit.float())
    with pytest.raises(ValueError, match="expected no hooks"):
        model_state(vit)
    handle.remove()
    with pytest.raises(ValueError, match="expected modules of Python; got the scripted"):
        model_state(torch.jit.script(nn.Linear(1, 1)))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="global forward hooks"):
        model_state(vit)
    handle.remove()


def test_extractor_on_a_cpu_needs_no_graph():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32).eval()
    extractor, plain = attnx.Extractor(vit, compile="auto"), attnx.Extractor(vit)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        assert torch.equal(extractor(x), plain(x))
    assert extractor.graph_nbytes == plain.graph_nbytes == 0
    with pytest.raises(ValueError, match="compile: expected False, True or 'auto'; got 'yes'"):
        attnx.Extractor(vit, compile="yes")


@pytest.mark.gpu
def test_auto_on_a_gpu(device: torch.device) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32).eval().to(device)
    extractor, plain = attnx.Extractor(vit, compile="auto"), attnx.Extractor(vit)
    for i in range(5):
        x = torch.randn(2, 3, 32, 32, device=device)
        torch.testing.assert_close(extractor(x), plain(x), rtol=1e-3, atol=1e-5)
        assert (extractor.graph_nbytes > 0) == (i > 0)
    with attnx.capture(vit) as trace, pytest.warns(UserWarning, match="got hooks"):
        extractor(x)
    assert len(trace) == 2
    vit.blocks[0].mlp.fc1.weight = nn.Parameter(torch.randn_like(vit.blocks[0].mlp.fc1.weight))
    torch.testing.assert_close(extractor(x), plain(x), rtol=1e-3, atol=1e-5)


class Synchronises(nn.Module):
    """A block that waits for the GPU, which a graph can't."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * (2.0 if float(x.sum()) > 1e9 else 1.0)


@pytest.mark.gpu
def test_a_model_that_synchronises_runs_without_graphs(device: torch.device) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32).eval()
    vit.blocks[0] = Synchronises(vit.blocks[0])
    extractor, plain = attnx.Extractor(vit.to(device), compile="auto"), attnx.Extractor(vit)
    x = torch.randn(2, 3, 32, 32, device=device)
    torch.testing.assert_close(extractor(x), plain(x))
    with pytest.warns(UserWarning, match="Extractor runs without CUDA graphs"):
        torch.testing.assert_close(extractor(x), plain(x))
    torch.testing.assert_close(extractor(x), plain(x))
    assert extractor.graph_nbytes == 0
