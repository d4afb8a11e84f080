"""Maps of a capture against the model's own eager softmax: every family of `test_families`, every attention.

`python tests/test_family_maps.py` prints a table of all families.
"""

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from eager_reference import Attention, eager_attentions
from packaging.version import Version
from test_families import EACH, FAMILIES, UNFUSED, built, tensors
from torch import Tensor, nn

import attnx

TOLERANCE = 2e-5  # with AVX2 the eager softmax of Grounding DINO is off by 1.3e-5
GRADIENT_TOLERANCE = 2e-4  # of the largest number in a map; davit needs 1.3e-4 with AVX2

# Softmaxes over the last dimension that are no attention over keys: {class of the module: reason}.
NOT_ATTENTION = {
    "DeformableDetrMultiscaleDeformableAttention": "weights of sampled points: [B, queries, heads, levels * points]",
    "RTDetrMultiscaleDeformableAttention": "weights of sampled points: [B, queries, heads, levels * points]",
    "GroundingDinoMultiscaleDeformableAttention": "weights of sampled points: [B, queries, heads, levels * points]",
    "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention": "weights of sampled points, as in Deformable DETR",
}
# Classes that compute a softmax over the heads of each token, which nothing uses, before their attention.
UNUSED_FIRST = {"Sam2MultiScaleAttention"}

# Classes that compute two softmaxes, and then multiply values by the second first.
REVERSED = {"GroundingDinoBiMultiHeadAttention"}

# Untrained weights make fp32 itself differ by more than the tolerance.
DOUBLE = {"timm visformer", "timm mobilenetv4 hybrid", "HF Mask2Former", "HF CLIPSeg"}
# transformers makes another mask for the eager form of this text backbone; its SDPA form is the reference.
NATIVE = {"HF Grounding DINO": ("text_backbone",)}

# Families that run a part without gradients: the layers with gradients.
WITH_GRADIENTS = {"HF CLIPSeg": "decoder"}

# Families whose blocks combine two softmaxes before the product with the values; they have their own test.
COMBINED = {"timm convit"}
MAPPED = [p for p in EACH if p.values[0] not in UNFUSED]
OLD = Version(version("transformers")) < Version("5.24")
# Older versions of transformers compute something else with SDPA than in the eager form of these: Gemma 2 without its
# softcap, Kosmos 2 with a causal mask in cross-attention.
OTHER_EAGER = {"HF Gemma 2", "HF Kosmos 2"} if OLD else set[str]()
# Models that do not run under autocast in older versions of transformers, with or without attnx.
NO_AUTOCAST = {"HF SmolVLM"} if OLD else set[str]()
COMPARED = [p for p in MAPPED if p.values[0] not in COMBINED | OTHER_EAGER]


def model_and_call(name: str) -> tuple[nn.Module, Callable[[], Any]]:
    """The model of a family and its call, in float64 where fp32 is not precise enough."""
    model, call, _ = built(name)
    if name not in DOUBLE:
        return model, call
    family = FAMILIES[name]
    model, given = family.build()
    model.double()
    if isinstance(given, dict):
        given = {key: in_double(value) for key, value in given.items()}
        return model, lambda: model(**given)
    given = tuple(map(in_double, given))
    return model, lambda: model(*given)


def in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def reference(name: str, model: nn.Module, call: Callable[[], Any]) -> tuple[dict[str, Attention], Any]:
    """{name as in a trace: attention} in the order of the calls, and the output of the eager model."""
    eager, output = eager_attentions(model, call, NATIVE.get(name, ()))
    found: dict[str, list[Attention]] = {}
    order: list[tuple[str, Attention]] = []
    for attention in eager:
        if attention.kind in NOT_ATTENTION:
            continue
        calls = found.setdefault(attention.name, [])
        calls.append(attention)
        if attention.kind in UNUSED_FIRST:
            if len(calls) % 2 == 0:
                order.append((numbered(attention.name, len(calls) // 2), attention))
            continue
        order.append((numbered(attention.name, len(calls)), attention))
        if attention.kind in REVERSED and len(calls) % 2 == 0:
            (first, one), (second, other) = order[-2:]
            order[-2:] = (first, other), (second, one)
    return dict(order), output


def numbered(name: str, call: int) -> str:
    return name if call == 1 else f"{name}#{call}"


def difference(got: Tensor, attention: Attention, want: Tensor) -> float:
    """The largest difference over rows that have a key; rows without one are 0 or what the eager softmax gave."""
    assert got.shape == want.shape, (attention.name, list(got.shape), list(want.shape))
    dead = attention.dead_rows()
    off = (got.double() - want.double()).abs()
    assert got.isfinite().all(), attention.name
    assert ((got[dead] == 0).all(-1) | (off[dead] <= TOLERANCE).all(-1)).all(), attention.name
    return float(off[~dead].max()) if (~dead).any() else 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPARED)
def test_the_maps_are_those_of_the_eager_softmax(name: str) -> None:
    model, call = model_and_call(name)
    with torch.no_grad():
        attentions, _ = reference(name, model, call)
        with attnx.capture(model, heads="mean") as trace:
            call()
    assert attentions
    assert list(trace) == list(attentions)
    for layer, attention in attentions.items():
        assert difference(trace[layer], attention, attention.map()) <= TOLERANCE, layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [p for p in MAPPED if p.values[0] not in NO_AUTOCAST])
def test_under_autocast_the_output_is_as_close_as_without_a_capture(name: str) -> None:
    model, call, _ = built(name)
    with torch.no_grad():
        exact = list(tensors(call()))
        with torch.autocast("cpu", torch.bfloat16):
            plain = list(tensors(call()))
            with attnx.capture(model) as trace:
                captured = list(tensors(call()))
    for want, without, got in zip(exact, plain, captured, strict=True):
        finite = want.isfinite()
        if not finite.any():
            continue
        want, without, got = (t[finite].double() for t in (want, without, got))
        budget = 2 * (without - want).abs().max() + torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (got - want).abs().max() <= budget
    for layer in trace:
        assert trace[layer].isfinite().all(), layer
        assert trace[layer].dtype == torch.float32


def score_of(output: Any) -> Tensor:
    """One number that depends on every floating-point number of an output, each with its own weight."""
    total = torch.zeros(())
    for i, tensor in enumerate(t for t in tensors(output) if t.requires_grad):
        weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)).to(tensor.dtype)
        total = total + (torch.where(tensor.isfinite(), tensor, 0) * weights).sum()
    return total


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPARED)
def test_gradient_maps_are_those_of_the_eager_softmax(name: str) -> None:
    model, call = model_and_call(name)
    model.requires_grad_(True)
    attentions, output = reference(name, model, call)
    part = WITH_GRADIENTS.get(name)
    attentions = {layer: a for layer, a in attentions.items() if part is None or layer.startswith(part)}
    raw = [attention.raw for attention in attentions.values()]
    needed = [p for p in raw if p.requires_grad]
    slopes = dict(zip(map(id, needed), torch.autograd.grad(score_of(output), needed, allow_unused=True), strict=True))
    with attnx.capture(model, None if part is None else [f"{part}.*"], grad=True) as trace:
        output = call()
        trace.backward(score_of(output))
    assert list(trace) == list(attentions)
    checked = 0
    for layer, attention in attentions.items():
        slope = slopes.get(id(attention.raw))
        if slope is None:  # the output does not depend on it
            continue
        weighted = (slope * attention.raw.detach()).clamp(min=0)
        want = attention.over_keys(attention.fused(weighted.nan_to_num(0.0)))
        largest = float(want.abs().max())
        alive = ~attention.dead_rows()
        off = (trace[layer].double() - want.double()).abs()[alive]
        assert trace[layer].shape == want.shape, layer
        assert float(off.max()) <= GRADIENT_TOLERANCE * largest + 1e-12, (layer, float(off.max()), largest)
        checked += largest > 0
    assert checked


def test_convits_map_is_the_gated_sum_of_its_softmaxes() -> None:
    model, call = model_and_call("timm convit")
    blocks = {name: module for name, module in model.named_modules() if type(module).__name__ == "GPSA"}
    inputs: dict[str, Tensor] = {}
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        with attnx.capture(model) as trace:
            call()
        assert len(blocks) == 2
        for name, block in blocks.items():
            want = block.get_attention(inputs[name]).mean(1)
            torch.testing.assert_close(trace[name], want, rtol=0, atol=TOLERANCE)
    model.requires_grad_(False)
    with attnx.capture(model, grad=True) as trace:
        trace.backward(score_of(call()))
    assert all(trace[name].sum() > 0 for name in trace)


def row_of(name: str) -> str:
    """A line of the report: attentions of the reference, maps of the trace, largest difference, and what is missing."""
    model, call = model_and_call(name)
    trace: dict[str, Tensor] = {}
    notes = []
    with torch.no_grad():
        attentions, _ = reference(name, model, call)
        try:
            with attnx.capture(model) as captured:
                call()
            trace = dict(captured)
        except RuntimeError as error:
            notes.append(str(error)[:160])
    largest = 0.0
    for layer in attentions.keys() & trace.keys():
        try:
            off = difference(trace[layer], attentions[layer], attentions[layer].map())
            largest = max(largest, off)
        except AssertionError as error:
            notes.append(f"differs: {error}")
    if trace:
        missing = {attentions[layer].kind for layer in attentions.keys() - trace.keys()}
        notes += [f"not captured: {', '.join(sorted(missing))}"] * bool(missing)
        extra = sorted(trace.keys() - attentions.keys())
        notes += [f"not in the reference: {', '.join(extra)}"] * bool(extra)
        if not missing and not extra and list(trace) != list(attentions):
            notes.append("in another order")
    return f"| {name} | {len(attentions)} | {len(trace)} | {largest:.0e} | {'; '.join(notes)} |"


def main(words: list[str]) -> None:
    """Print the report of all families, or of those whose names contain one of the words."""
    warnings.simplefilter("ignore")
    print("| family | attentions | maps | largest difference | what is missing |\n|---|---|---|---|---|")
    for name in FAMILIES:
        if not words or any(word in name for word in words):
            print(row_of(name), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
