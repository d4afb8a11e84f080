"""BLIP of transformers calls SDPA in a capture, and computes the same."""

from typing import Any

import pytest
import torch
from eager_reference import eager_maps
from own_maps import assert_captured, assert_own_code_with_dropout, assert_restored, assert_same_gradients
from test_families import FAMILIES, assert_same, built

import attnx
from attnx.trace.adapters import route_to_sdpa

pytest.importorskip("transformers")
NAMES = ["HF BLIP retrieval", "HF BLIP captions"]
BLOCKS = ("BlipAttention", "BlipTextSelfAttention")
pytestmark = pytest.mark.filterwarnings("error:attnx")


def build(name: str) -> tuple[Any, dict[str, Any]]:
    model, given = FAMILIES[name].build()
    assert isinstance(given, dict)
    return model, given


@pytest.mark.parametrize("name", NAMES)
def test_maps_and_outputs_are_the_models_own(name: str) -> None:
    model, call, _ = built(name)
    assert_captured(model, call, *BLOCKS)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_change(name: str) -> None:
    model, call, _ = built(name)
    assert_same_gradients(model, call)


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_captions_are_the_same_with_a_map_for_each_step(search: dict[str, Any]) -> None:
    model, given = build("HF BLIP captions")
    options = {**given, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **search}
    with torch.no_grad():
        want, plain = eager_maps(model, lambda: model.generate(**options))
        with attnx.capture(model, calls="all") as trace:
            assert torch.equal(model.generate(**options), plain)
    assert_restored(model)
    for name, maps in want.items():
        ours = list(trace.calls[name].values())
        assert len(ours) == len(maps) == (1 if "vision_model" in name else 4)
        for a, b in zip(ours, maps, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    cross = next(name for name in want if "crossattention" in name)
    rows = [amap.shape[1] for amap in trace.calls[cross].values()]
    assert rows[1:] == ([1, 1, 1] if "use_cache" not in search else [rows[0] + 1, rows[0] + 2, rows[0] + 3])


def test_probabilities_that_are_asked_for_are_the_blocks_own() -> None:
    model, given = build("HF BLIP captions")
    with torch.no_grad():
        vision, text = model.vision_model, model.text_decoder.bert
        image = vision(given["pixel_values"])[0]
        words = {name: given[name] for name in ("input_ids", "attention_mask")} | {"encoder_hidden_states": image}
        plain = (vision(given["pixel_values"], output_attentions=True), text(**words, output_attentions=True))
        assert len(plain[0].attentions) == len(plain[1].attentions) == len(plain[1].cross_attentions) == 2
        undo = route_to_sdpa(model)
        ours = (vision(given["pixel_values"], output_attentions=True), text(**words, output_attentions=True))
        for put_back in undo:
            put_back()
        assert_same(ours, plain, 0)
        # transformers' hooks stay on the model; they keep no block from being captured.
        with attnx.capture(model) as trace:
            model(**given)
    assert sum(type(module).__name__ in BLOCKS for module in model.modules()) == len(trace)


def test_a_hook_sees_the_probabilities() -> None:
    model, given = build("HF BLIP retrieval")
    seen: list[Any] = []
    block = model.vision_model.encoder.layers[0].self_attn
    with torch.no_grad(), attnx.capture(model) as own:
        model(**given)
    hook = block.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    own_code = pytest.warns(UserWarning, match="holds the weights of all heads")
    with torch.no_grad(), own_code, attnx.capture(model) as trace:
        model(**given)
    hook.remove()
    assert list(trace) == list(own)
    torch.testing.assert_close(seen[0].mean(1), own["vision_model.encoder.layers.0.self_attn"], rtol=0, atol=1e-5)


def test_dropout_is_left_to_the_block() -> None:
    model, given = build("HF BLIP retrieval")
    assert_own_code_with_dropout(model, lambda: model(**given))


def test_padding_has_no_weight_in_other_dtypes() -> None:
    model, given = build("HF BLIP retrieval")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**given)
        with attnx.capture(model) as trace:
            assert_same(model(**given), plain, 0.05)
    name = next(name for name in trace if "attention.self" in name and "cross" not in name)
    assert float(trace[name][1, :, 6:].max()) == 0
