"""transformers: every argument of its attention functions is honoured, or the original function runs."""

from collections.abc import Iterator
from typing import Any

import families_hf
import pytest
import torch
from test_families import BUDGET, FAMILIES, assert_same
from torch import Tensor, nn

import attnx
from attnx import huggingface
from attnx.trace.adapters import route_to_sdpa

transformers = pytest.importorskip("transformers")
SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def vit(implementation: str = "sdpa") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=64)).eval()
    model.set_attn_implementation(implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model, torch.randn(1, 3, 64, 64)


def family(name: str) -> tuple[nn.Module, dict[str, Any]]:
    found = {f.name: f for f in families_hf.FAMILIES}.get(name)
    if found is None:
        pytest.skip(f"this transformers has no {name}")
    return found.build()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [f.name for f in families_hf.FAMILIES])
def test_use_leaves_the_output_or_refuses(name: str) -> None:
    model, given = FAMILIES[name].build()
    if name == "HF Gemma 2":
        model.set_attn_implementation("eager")  # some versions run it by SDPA, without its soft capping
    with torch.no_grad():
        plain = model(**given)
        before = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
        try:
            huggingface.use(model)
        except (NotImplementedError, RuntimeError) as error:
            why = str(error)
            assert why.startswith(("transformers has no SDPA for", "not every submodel took"))
            after = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
            assert after == before
        assert_same(model(**given), plain)


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("name", ["HF T5 encoder", "HF LayoutLMv3", "HF Pix2Struct", "HF Gemma 2", "HF GPT-OSS"])
def test_biases_caps_and_sinks_are_in_the_maps(name: str, heads: str) -> None:
    model, given = family(name)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(**given, output_attentions=True)
        try:
            huggingface.use(model, heads=heads)
        except NotImplementedError as error:
            # Every one of these models works since 5.24.
            if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
                raise
            pytest.skip(f"this transformers: {error}")
        got = model(**given, output_attentions=True)
    key = "attentions" if getattr(want, "attentions", None) else "encoder_attentions"
    pairs = list(zip(getattr(got, key), getattr(want, key), strict=True))
    assert pairs
    for ours, theirs in pairs:
        fused = theirs.mean(1) if heads == "mean" else theirs.amax(1)
        seen = ours.sum(-1) > 0
        torch.testing.assert_close(ours[seen], fused[seen].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["HF Gemma 2", "HF GPT-OSS"])
def test_a_capture_hears_what_sdpa_can_not_run(name: str) -> None:
    model, given = family(name)
    model.set_attn_implementation("eager")  # some versions run Gemma 2 by SDPA, without its soft capping
    with torch.no_grad():
        plain = model(**given)
        with attnx.capture(model) as own:
            assert_same(model(**given), plain)
        model.set_attn_implementation("eager")
        want = model(**given, output_attentions=True).attentions
        for ours, theirs in zip(own.values(), want, strict=True):
            torch.testing.assert_close(ours, theirs.mean(1), rtol=1e-5, atol=1e-6)
        huggingface.use(model)
        for keep in ("map", "qk"):
            with attnx.capture(model, keep=keep) as trace:
                assert_same(model(**given), plain)
            for ours, theirs in zip(trace.values(), want, strict=True):
                seen = ours.sum(-1) > 0
                torch.testing.assert_close(ours[seen], theirs.mean(1)[seen], rtol=1e-3, atol=1e-5)
                r = torch.rand(ours.shape[:2])
                kept = trace.kept(next(iter(trace)))
                torch.testing.assert_close(kept.vecmat(r[:, None])[:, 0], (r[:, None] @ trace[0])[:, 0])
                torch.testing.assert_close(kept.row_sums(), trace[0].sum(-1), rtol=1e-4, atol=1e-5)
    with attnx.capture(model, grad=True) as weighted:
        weighted.backward(model(**given).logits.sum())
    assert weighted
    assert all(torch.isfinite(amap).all() and amap.sum() > 0 for amap in weighted.values())


def test_unknown_arguments_are_refused_by_name() -> None:
    huggingface.register()
    model, _ = vit("attnx")
    block = next(m for m in model.modules() if type(m).__name__ == "ViTAttention")
    function = transformers.AttentionInterface()["attnx"]
    q = torch.randn(1, 3, 5, 16)
    out, amap = function(block, q, q, q, None, output_attentions=True, sliding_window=7, use_cache=False, odd=None)
    assert (out.shape, amap.shape) == ((1, 5, 3, 16), (1, 5, 5))
    with pytest.raises(NotImplementedError, match=r"ViTAttention passes block_indices to its attention, which"):
        function(block, q, q, q, None, block_indices=torch.zeros(1))
    with pytest.raises(ValueError, match=r"attention dropout: expected 0; got 0\.5"):
        function(block, q, q, q, None, dropout=0.5)
    for wrong in ({"heads": "median"}, {"backend": "cuda"}):
        with pytest.raises(ValueError, match="expected one of"):
            huggingface.register("attnx_wrong", **wrong)
    with pytest.raises(ValueError, match=r"expected a transformers\.PreTrainedModel; got Linear"):
        huggingface.use(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["HF GIT", "HF BridgeTower"])
def test_models_without_sdpa_are_refused_however_it_is_set(name: str) -> None:
    huggingface.register()
    model, given = family(name)
    model.set_attn_implementation("attnx")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="transformers has no SDPA for the model of"):
        model(**given)


def test_a_function_of_the_users_is_kept() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def cold(module: nn.Module, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, 4 * q, *args, **kwargs)

    def own(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return (q @ k.mT).sigmoid().matmul(v).transpose(1, 2), None

    transformers.AttentionInterface.register("cold", cold)
    transformers.AttentionInterface.register("own", own)
    model, images = vit("cold")
    with torch.no_grad():
        plain = model(images).last_hidden_state
        with attnx.capture(model) as trace:
            heard = model(images).last_hidden_state
        torch.testing.assert_close(heard, plain, rtol=1e-4, atol=1e-5)
        for method, want in (("rollout", attnx.rollout(trace)), ("cls", attnx.cls_map(trace))):
            extract = attnx.Extractor(model, method)
            for _ in range(2):
                torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-6)
        model.set_attn_implementation("own")
        plain = model(images).last_hidden_state
        with pytest.raises(
            RuntimeError, match=r"its attention function is 'own'; model.set_attn_implementation\('sdpa"
        ):
            with attnx.capture(model):
                assert torch.equal(model(images).last_hidden_state, plain)
        assert model.config._attn_implementation == "own"


def test_a_function_that_is_registered_as_eager_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return (q @ k.mT).sigmoid().matmul(v).transpose(1, 2), None

    model, images = vit("eager")
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "eager", own)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        with pytest.raises(RuntimeError, match="its attention function was registered as 'eager'"):
            with attnx.capture(model):
                assert torch.equal(model(images).last_hidden_state, plain)


def test_a_part_without_sdpa_is_heard_by_its_softmax() -> None:
    model, given = family("HF TrOCR")
    with torch.no_grad():
        plain = model(**given)
        with attnx.capture(model) as trace:
            assert_same(model(**given), plain)
    assert {layer.partition(".")[0] for layer in trace} == {"encoder", "decoder"}


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_models_that_call_attnx_themselves_are_heard(heads: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(48, 144)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            out, amap = attnx.attention(q, k, v, scale=0.3, heads=heads)
            return x + out.transpose(1, 2).flatten(2), amap

    torch.manual_seed(0)
    model, x = nn.Sequential(Own()).eval(), torch.randn(2, 5, 48)
    with torch.no_grad():
        plain, amap = model(x)
        with attnx.capture(model) as trace, attnx.capture(model, keep="qk", heads="max") as qk:
            heard, again = model(x)
    assert torch.equal(heard, plain)
    assert torch.equal(again, amap)
    mean = amap if heads == "mean" else amap.mean(1)
    torch.testing.assert_close(trace["0"], mean, rtol=1e-5, atol=1e-7)
    assert (qk["0"] >= mean - 1e-6).all()
    with attnx.capture(model, grad=True) as weighted:
        weighted.backward(model(x)[0].sum())
    assert weighted["0"].shape == (2, 5, 5)


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e9])
def test_rows_whose_keys_are_all_hidden_by_finite_numbers(hidden: float) -> None:
    """SDPA still attends in such rows. The model's output is kept, and the map has no weights."""

    class Masked(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(2, 3, 5, 16)
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :2] = hidden
    with torch.no_grad():
        plain = Masked()(q, mask)
        model = Masked()
        with attnx.capture(model) as trace:
            heard = model(q, mask)
    torch.testing.assert_close(heard, plain, rtol=1e-5, atol=1e-6)
    assert trace[""][0, :2].abs().max() == 0
    torch.testing.assert_close(trace[""][1].sum(-1), torch.ones(5))


def llama() -> nn.Module:
    torch.manual_seed(0)
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    config = transformers.LlamaConfig(**small, intermediate_size=64, vocab_size=60)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("mask", ["left", "right", "boolean", "float"])
def test_eager_models_keep_their_masks(mask: str) -> None:
    """Eager attention and SDPA differ in rows without keys and for boolean masks, which eager adds as 1."""
    model = llama()
    ids = torch.tensor([[5, 6, 7, 8, 9, 4], [9, 5, 6, 7, 8, 4]])
    masks = {
        "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]),
        "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
        "boolean": torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6),
        "float": torch.randn(2, 1, 6, 6),
    }
    given = dict(input_ids=ids, attention_mask=masks[mask])
    with torch.no_grad():
        plain = model(**given)
        with attnx.capture(model) as trace:
            assert_same(model(**given), plain)
        assert model.config._attn_implementation == "eager"
        want = model(**given, output_attentions=True).attentions
    for ours, theirs in zip(trace.values(), want, strict=True):
        seen = ours.sum(-1) > 0
        assert seen[..., -1].all()
        torch.testing.assert_close(ours[seen], theirs.mean(1)[seen], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [f.name for f in families_hf.FAMILIES])
def test_a_capture_of_a_model_set_to_eager_leaves_the_output(name: str) -> None:
    model, given = FAMILIES[name].build()
    if not isinstance(model, transformers.PreTrainedModel):
        pytest.skip("no model of transformers")
    model.set_attn_implementation("eager")
    # One selects queries by their scores, the other masks by a threshold. Both amplify rounding errors by ten, and
    # torch's own fused attention has the same error against float64.
    budget = 1e-3 if name in ("HF Grounding DINO", "HF Mask2Former") else BUDGET
    with torch.no_grad():
        plain = model(**given)
        try:
            with attnx.capture(model):
                heard = model(**given)
            # Some versions of Kosmos-2 return eager attention's weights without being asked.
            unasked = [key for key in plain if key.endswith("attentions") and key not in heard]
            assert_same(heard, {key: plain[key] for key in plain if key not in unasked}, budget)
        except RuntimeError as error:
            why = str(error)
            assert why.startswith("nothing was captured")
        assert_same(model(**given), plain)


def test_eager_masks_stay_finite_under_autocast() -> None:
    model = llama()
    given = dict(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.tensor([[0, 0, 1, 1]]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**given).logits
        with attnx.capture(model):
            heard = model(**given).logits
    assert plain.isfinite().all()
    torch.testing.assert_close(heard.float(), plain.float(), rtol=0, atol=3e-2 * float(plain.abs().max()))


def test_a_configuration_that_asks_for_output_attentions_is_left() -> None:
    model = llama()
    model.config.output_attentions = True
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = model(ids)
        with attnx.capture(model) as trace:
            assert len(model(ids).attentions) == len(plain.attentions) == 2
    for ours, theirs in zip(trace.values(), plain.attentions, strict=True):
        torch.testing.assert_close(ours, theirs.mean(1), rtol=1e-5, atol=1e-6)


def test_another_thread_runs_an_eager_model_while_captures_come_and_go() -> None:
    import sys
    import threading

    model, ids = llama(), torch.tensor([[5, 6, 7, 8, 9, 4]])
    with torch.no_grad():
        plain = model(ids).logits
    done, wrong = threading.Event(), []

    def run() -> None:
        with torch.no_grad():
            while not done.is_set():
                error = float((model(ids).logits - plain).abs().max())
                if error > 1e-4 * float(plain.abs().max()):
                    wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(200):
            for undo in route_to_sdpa(model):
                undo()
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert not wrong


def test_a_switch_by_the_user_during_a_patch_stays() -> None:
    model = llama()
    handle = attnx.patch(model)
    model.set_attn_implementation("sdpa")
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
