"""Clones of attention layers' forwards, which a capture binds instead of watching the functions that they call."""

import copy
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

import attnx
from attnx.trace.adapters.clones import Clones
from attnx.trace.adapters.switches import own_forward_only
from attnx.trace.followed import sdpa_modules
from attnx.trace.quiet import sdpa_is_on
from attnx.trace.structure import structure_of

DEPTH = 2


class Attention(nn.Module):
    """Notes how many function modes are on when its projection runs."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.modes = []
        self.qkv.register_forward_hook(lambda *_: self.modes.append(torch._C._len_torch_function_stack()))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AndItsOwnSoftmax(Attention):
    """Attends a second time, by its own code."""

    def forward(self, x):
        y = super().forward(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class InPlace(Attention):
    """Writes to its input, which a capture notes."""

    def forward(self, x):
        x += 1
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Counts(nn.Module):
    """Writes a global variable, which a clone would not."""

    def forward(self, x):
        global CALLS
        CALLS += 1
        return F.scaled_dot_product_attention(x, x, x)


CALLS = 0


class PastHooks(nn.Module):
    """Calls the forward of its attention, so that no hook of the attention runs."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return self.attn.forward(x)


def small_timm(**options):
    torch.manual_seed(0)
    options = dict(depth=DEPTH, embed_dim=24, num_heads=3, img_size=32, num_classes=5) | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval(), torch.randn(2, 3, 32, 32)


def small_transformers(attn_implementation):
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=DEPTH, num_attention_heads=3, intermediate_size=32, image_size=32)
    model = ViTModel._from_config(ViTConfig(**sizes), attn_implementation=attn_implementation)
    return model.eval(), torch.randn(2, 3, 32, 32)


def watched(model, x, **options):
    """The maps of a patch, which binds no clones, and the output of the pass."""
    handle = attnx.patch(model, **options)
    try:
        out = model(x)
        return dict(handle.trace), out
    finally:
        handle.remove()


def bound(model):
    """Names of the modules with a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_same(trace, expected):
    assert list(trace) == list(expected)
    for name in expected:
        torch.testing.assert_close(trace[name], expected[name], rtol=0, atol=0)


def test_the_functions_of_a_layer_that_calls_sdpa_alone_are_not_watched():
    model, x = nn.Sequential(Attention(), Attention()), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected, out = watched(model, x)
        assert model[0].modes == model[1].modes == [1]
        with attnx.capture(model) as trace:
            torch.testing.assert_close(model(x), out)
            assert bound(model) == ["0", "1"]
    assert model[0].modes == model[1].modes == [1, 0]
    assert_same(trace, expected)
    assert bound(model) == []


@pytest.mark.parametrize("kind", [AndItsOwnSoftmax, InPlace])
def test_layers_that_do_more_are_watched(kind):
    model, x = nn.Sequential(kind()), torch.randn(2, 5, 8)
    assert not structure_of(model).derived(sdpa_modules)
    with torch.no_grad(), attnx.capture(model) as trace:
        assert bound(model) == []
        model(x.clone())
    assert set(model[0].modes) == {1}
    with torch.no_grad():
        assert_same(trace, watched(model, x.clone())[0])


def test_why_a_block_has_no_clone():
    clones, model = Clones(F.scaled_dot_product_attention), Attention()
    assert not isinstance(clones.of(model), str)
    model.forward = model.forward
    assert not isinstance(clones.of(model), str)  # a bound method of its own class
    model.forward = lambda x: x
    assert clones.of(model) == "its forward was replaced on the instance"
    assert clones.of(Counts()) == "its forward writes global variables"
    assert clones.of(nn.Linear(2, 2)) == "its forward does not call F.scaled_dot_product_attention itself"


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    model, images = small_timm()
    for block in model.blocks:
        block.attn.fused_attn = fused
    layers = [f"blocks.{i}.attn" for i in range(DEPTH)]
    assert sorted(structure_of(model).derived(sdpa_modules)) == layers
    with torch.no_grad():
        plain = model(images)
        expected, _ = watched(model, images)
        with attnx.capture(model) as trace:
            assert bound(model) == layers
            torch.testing.assert_close(model(images), plain)
    assert_same(trace, expected)
    assert bound(model) == []
    assert all(block.attn.fused_attn is fused for block in model.blocks)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_transformers(attn_implementation):
    model, images = small_transformers(attn_implementation)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        expected, _ = watched(model, images)
        with attnx.capture(model) as trace:
            assert len(bound(model)) == DEPTH
            torch.testing.assert_close(model(images).last_hidden_state, plain)
    assert_same(trace, expected)
    assert bound(model) == []


def test_a_layer_whose_flag_or_configuration_switches_sdpa_off_is_not_bound():
    (vit, _), (other, _) = small_timm(), small_transformers("sdpa")
    attention = vit.blocks[0].attn
    assert sdpa_is_on(attention)
    attention.fused_attn = False
    assert not sdpa_is_on(attention)
    name = next(iter(structure_of(other).derived(sdpa_modules)))
    attention = other.get_submodule(name)
    assert sdpa_is_on(attention)
    other.config._attn_implementation = "eager"
    assert not sdpa_is_on(attention)


def test_only_requested_layers_are_bound():
    model, images = small_timm()
    with torch.no_grad(), attnx.capture(model, layers=[-1]) as trace:
        assert bound(model) == ["blocks.1.attn"]
        model(images)
    assert list(trace) == ["blocks.1.attn"]


def test_a_second_capture_of_the_model_removes_the_clones():
    model, images = small_timm()
    with torch.no_grad():
        expected, _ = watched(model, images)
        with attnx.capture(model) as outer:
            model(images)
            first = dict(outer)
            with attnx.capture(model) as inner:
                assert bound(model) == []
                model(images)
            assert_same(inner, expected)
            assert_same(outer, expected)
            model(images)
            maps = attnx.Extractor(model)(images)
        assert_same(outer, expected)
        assert_same(first, expected)
        torch.testing.assert_close(maps, attnx.rollout(inner))
    assert bound(model) == []


def test_a_part_of_the_model_that_is_captured_beside_it():
    model, images = small_timm()
    with torch.no_grad():
        expected, _ = watched(model, images)
        with attnx.capture(model) as outer, attnx.capture(model.blocks[1], layers=["attn"]) as inner:
            assert bound(model) == []
            model(images)
    assert_same(outer, expected)
    torch.testing.assert_close(inner[0], expected["blocks.1.attn"])


def test_a_forward_that_is_called_past_the_hooks():
    model, x = PastHooks(), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected, out = watched(model, x, layers=[""])
        with attnx.capture(model, layers=[""]) as trace:
            torch.testing.assert_close(model(x), out)
    assert list(trace) == list(expected)


@pytest.mark.parametrize("grad", [True, "signed"])
def test_gradients(grad):
    model, images = small_timm()
    found = []
    for capture in (attnx.patch, attnx.capture):
        captured = capture(model, grad=grad)
        trace = captured.__enter__() if capture is attnx.capture else None
        logits = model(images)
        trace = trace if trace is not None else captured.trace
        trace.backward(logits[:, 1].sum())
        found.append(dict(trace))
        if capture is attnx.capture:
            captured.__exit__(None, None, None)
        else:
            captured.remove()
    assert_same(found[1], found[0])


def test_gradients_of_the_model_are_its_own():
    model, images = small_timm()
    model(images).sum().backward()
    expected = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    with attnx.capture(model):
        model(images).sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, expected)


def test_a_copy_of_the_model_has_its_own_forwards():
    model, images = small_timm()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
        before = dict(trace)
        other = copy.deepcopy(model)
        other(images + 1)
        assert_same(trace, before)
    assert all(own_forward_only(module) for module in other.modules())


def test_a_pass_in_another_thread_is_captured():
    model, images = small_timm()
    with torch.no_grad():
        expected, _ = watched(model, images)

    def run():
        with torch.no_grad():
            model(images)

    with attnx.capture(model) as trace:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert_same(trace, expected)


def test_copies_of_data_parallel_are_refused():
    model, images = small_timm()
    with pytest.raises(RuntimeError, match=r"expected one copy of the model; got copies by nn.DataParallel"):
        with torch.no_grad(), attnx.capture(model):
            model._replicate_for_data_parallel()(images)
    assert bound(model) == []


def test_an_error_or_an_interrupt_leaves_no_clone():
    model, images = small_timm()
    for error in (RuntimeError, KeyboardInterrupt):
        hook = model.blocks[1].attn.proj.register_forward_hook(lambda *_, error=error: (_ for _ in ()).throw(error()))
        with pytest.raises(error), torch.no_grad(), attnx.capture(model):
            model(images)
        hook.remove()
        assert bound(model) == []
        with torch.no_grad(), attnx.capture(model) as trace:
            model(images)
        assert len(trace) == DEPTH
