"""ViLT, VisualBERT, LXMERT, FLAVA and TimeSformer call SDPA in a capture, and compute the same."""

import pytest
import torch
from own_maps import assert_captured, assert_own_code_with_dropout, assert_restored, assert_same_gradients
from test_families import FAMILIES, assert_same, built
from torch import Tensor, nn

import attnx
from attnx.trace.adapters import route_to_sdpa

pytest.importorskip("transformers")
BLOCKS = {
    "HF ViLT": "ViltSelfAttention",
    "HF VisualBERT": "VisualBertSelfAttention",
    "HF LXMERT": "LxmertAttention",
    "HF FLAVA": "FlavaSelfAttention",
    "HF TimeSformer": "TimesformerSelfAttention",
}
NAMES = [pytest.param(name, marks=pytest.mark.filterwarnings("error:attnx")) for name in BLOCKS]


@pytest.mark.parametrize("name", NAMES)
def test_maps_and_outputs_are_the_models_own(name: str) -> None:
    model, call, _ = built(name)
    assert_captured(model, call, BLOCKS[name])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_change(name: str) -> None:
    model, call, _ = built(name)
    assert_same_gradients(model, call)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_and_returned_probabilities_are_left_to_the_block(name: str) -> None:
    model, given = FAMILIES[name].build()
    assert isinstance(given, dict)
    with torch.no_grad():
        plain = model(**given, output_attentions=True)
        undo = route_to_sdpa(model)
        assert undo
        # Some models ask only a part of their blocks for probabilities.
        assert_same(model(**given, output_attentions=True), plain, 1e-5)
        for put_back in undo:
            put_back()
        assert_restored(model)
    assert_own_code_with_dropout(model, lambda: model(**given))


def test_masked_tokens_have_no_weight() -> None:
    model, call, _ = built("HF ViLT")
    with torch.no_grad(), attnx.capture(model) as trace:
        call()
    assert trace[0].shape == (2, 24, 24)
    assert float(trace[0][1, :, 6:8].max()) == 0  # the padding of the text
    assert float(trace[0][1, :, 20:].max()) == 0  # and of the image


def test_a_forward_that_computes_something_else_is_left() -> None:
    model, _, _ = built("HF ViLT")
    block = next(module for module in model.modules() if type(module).__name__ == "ViltSelfAttention")
    own = type(block)

    def gated(
        self: nn.Module, hidden_states: Tensor, attention_mask: Tensor, output_attentions: bool = False
    ) -> Tensor:
        return own.forward(self, hidden_states, attention_mask, output_attentions)[0] * self.gate

    other = type(own.__name__, (own,), {"forward": gated, "__module__": own.__module__})
    block.__class__ = other
    assert route_to_sdpa(block) == []
    block.__class__ = own
    (undo,) = route_to_sdpa(block)
    assert route_to_sdpa(block) == []  # bound already
    undo()
    assert_restored(block)
