"""Chains over the tokens of a text need no layout, and errors of models with two towers name the way out."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnx

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=60)).eval()


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    torch.manual_seed(0)
    ends = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    text = dict(SMALL, vocab_size=60, max_position_embeddings=8, **ends)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(SMALL, image_size=32, patch_size=16))
    return transformers.CLIPModel(config).eval()


IDS = torch.tensor([[5, 6, 7, 2, 9], [9, 8, 7, 6, 5]])


def product(maps: list[Tensor], residual: float = 0.5) -> Tensor:
    """The matrix of a rollout, in float64."""
    whole = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for amap in maps:
        step = (1 - residual) * amap.double() + residual * torch.eye(amap.shape[-1])
        whole = step / step.sum(-1, keepdim=True) @ whole
    return whole


def test_rollout_of_text(bert: nn.Module) -> None:
    with torch.no_grad(), attnx.capture(bert) as trace:
        bert(input_ids=IDS)
    want = product(list(trace.values())).float()
    for query in (0, 3, -1):
        torch.testing.assert_close(attnx.rollout(trace, query=query), want[:, query])
    torch.testing.assert_close(attnx.rollout(trace, query="mean"), want.mean(1))
    torch.testing.assert_close(attnx.rollout(trace, query="all"), want)
    discarded = attnx.rollout(trace, query=0, preset="vit-explain", discard=0.5)
    assert discarded.shape == (2, 5)
    torch.testing.assert_close(discarded.amax(1), torch.ones(2))
    with pytest.raises(ValueError, match="query: expected a token of the text, such as 0 or -1, 'mean' or 'all'"):
        attnx.rollout(trace)
    with pytest.raises(ValueError, match=r"query: expected 'all', 'mean' or an index in -5\.\.4; got 5"):
        attnx.rollout(trace, query=5)


def test_relevance_of_text(bert: nn.Module) -> None:
    with attnx.capture(bert, grad=True) as trace:
        logits = bert(input_ids=IDS).logits
    trace.backward(logits[:, 1].sum())
    whole = attnx.relevance(trace, query="all")
    weighted = list(trace.values())
    want = torch.eye(5)
    for amap in weighted:
        want = want + amap @ want
    torch.testing.assert_close(whole, want)
    torch.testing.assert_close(attnx.relevance(trace, query=0), want[:, 0])
    torch.testing.assert_close(attnx.relevance(trace, query=-1), want[:, -1])
    with attnx.capture(bert, grad="signed") as signed:
        logits = bert(input_ids=IDS).logits
    signed.backward(logits[:, 1].sum())
    assert attnx.gradient_rollout(signed, query=0).shape == (2, 5)


def test_a_negative_query_of_an_image() -> None:
    from attnx.demo.vit import demo_model

    model = demo_model()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.rand(2, 3, 96, 96))
    torch.testing.assert_close(attnx.rollout(trace, query=-1), attnx.rollout(trace, query=144))
    extract = attnx.Extractor(model, query=-1)
    images = torch.rand(2, 3, 96, 96)
    for _ in range(2):
        torch.testing.assert_close(extract(images), attnx.Extractor(model, query=144)(images), rtol=1e-4, atol=1e-6)


def test_errors_of_two_towers_name_the_way_out(clip: nn.Module) -> None:
    with torch.no_grad(), attnx.capture(clip) as trace:
        clip(input_ids=IDS[:1, :4], pixel_values=torch.randn(1, 3, 32, 32))
    way = r"use model\.vision_model, or layers='vision_model\.\*'"
    for call in (attnx.rollout, attnx.layer_maps, lambda trace: trace.layout):
        with pytest.raises(ValueError, match=way):
            call(trace)
    images = attnx.rollout(trace, layers="vision_model.*")
    assert images.shape == (1, 2, 2)
    assert attnx.rollout(trace, layers="text_model.*", query=-1).shape == (1, 4)
    with pytest.raises(ValueError, match=r"over 4 text tokens of text_model.*trace\[layer\] has the whole map"):
        trace.select("text_model.*").layout  # noqa: B018
    with torch.no_grad(), attnx.capture(clip.vision_model) as alone:
        clip.vision_model(torch.randn(1, 3, 32, 32))
    assert alone.layout == attnx.TokenLayout(1, (2, 2))


def test_no_layout_where_none_is_read() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

    model = nn.Sequential(Plain(), Plain())
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(2, 10, 8))
    torch.testing.assert_close(attnx.rollout(trace, query="all"), product(list(trace.values())).float())
    with pytest.raises(ValueError, match=r"pass layout=attnx\.TokenLayout"):
        attnx.rollout(trace)
    layout = attnx.TokenLayout(1, (2, 3), suffix=3)
    with torch.no_grad(), attnx.capture(model, layout=layout) as given:
        model(torch.randn(2, 10, 8))
    assert attnx.rollout(given).shape == (2, 2, 3)
