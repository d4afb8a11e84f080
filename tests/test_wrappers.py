"""Captures of models in wrappers, copies, threads and graphs are correct or raise an error."""

import copy
import io
import threading
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnx


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    small = dict(embed_dim=48, depth=3, num_heads=3, img_size=48, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **small, **options).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


class Threads(nn.Module):
    """Runs the halves of a batch in threads, as nn.DataParallel does on two GPUs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        outs: list[Tensor] = [x, x]

        def run(i: int, part: Tensor) -> None:
            with torch.no_grad():
                outs[i] = self.module(part)

        threads = [threading.Thread(target=run, args=(i, part)) for i, part in enumerate(x.chunk(2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat(outs)


def test_threads_that_share_a_model_are_refused(images: Tensor) -> None:
    model = Threads(vit())
    plain = model(images)
    with pytest.raises(RuntimeError, match=r"several threads ran it at once.*for nn.DataParallel, its \.module"):
        with attnx.capture(model):
            heard = model(images)
    torch.testing.assert_close(heard, plain, rtol=1e-4, atol=1e-5)
    handle = attnx.patch(model)
    model(images)
    with pytest.raises(RuntimeError, match="several threads"):
        handle.trace  # noqa: B018
    handle.remove()


def test_two_threads_that_call_one_model_are_refused(images: Tensor) -> None:
    model = vit()
    inside = threading.Event()
    go_on = threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(20)

    with pytest.raises(RuntimeError, match="several threads"), torch.no_grad(), attnx.capture(model):
        hook = model.blocks[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=model, args=(images,))
        thread.start()
        assert inside.wait(20)
        hook.remove()
        model(images)
        go_on.set()
        thread.join()


def test_one_thread_after_another_is_fine(images: Tensor) -> None:
    model = vit()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images[:1])
        thread = threading.Thread(target=lambda: torch.no_grad()(model)(images))
        thread.start()
        thread.join()
    assert trace[0].shape[0] == 2


@pytest.mark.parametrize("copied", ["deepcopy", "save"])
@pytest.mark.parametrize("family", ["timm", "timm unfused", "transformers"])
def test_copies_of_a_patched_model_are_not_patched(copied: str, family: str, images: Tensor) -> None:
    if family == "transformers":
        import transformers

        small = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64, image_size=48)
        torch.manual_seed(0)
        model: nn.Module = transformers.ViTModel._from_config(
            transformers.ViTConfig(**small), attn_implementation="eager"
        ).eval()
    else:
        model = vit()
        for block in model.blocks:
            block.attn.fused_attn = family == "timm"
    handle = attnx.patch(model)
    with torch.no_grad():
        model(images)
        want = handle.trace[0].clone()
        if copied == "deepcopy":
            other = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        other(2 * images)
        assert torch.equal(handle.trace[0], want)
        assert len(handle.trace) == 3
    handle.remove()
    # Flags that the capture changed are restored.
    if family == "transformers":
        assert type(other.config._attn_implementation) is str
        assert other.config._attn_implementation == model.config._attn_implementation == "eager"
    else:
        assert [b.attn.fused_attn for b in other.blocks] == [b.attn.fused_attn for b in model.blocks]
        assert {type(block.attn.fused_attn) for block in other.blocks} == {bool}
    with torch.no_grad(), attnx.capture(other) as trace:
        other(images)
    torch.testing.assert_close(trace[0], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("copied", ["deepcopy", "save"])
def test_a_copy_of_a_rewritten_block_runs_its_own_code(copied: str) -> None:
    from test_albef_adapter import BertAttention

    torch.manual_seed(0)
    model, x = BertAttention(48, 48, 3).eval(), torch.randn(2, 5, 48)
    with torch.no_grad():
        plain = model(x)[0]
        handle = attnx.patch(model)
        model(x)
        if copied == "deepcopy":
            other = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        handle.remove()
        rewritten = [module for module in other.modules() if "forward" in vars(module)]
        assert rewritten
        for module in rewritten:
            assert vars(module)["forward"].__func__ is type(module).forward
            assert vars(module)["forward"].__self__ is module
        assert torch.equal(other(x)[0], plain)
        with attnx.capture(other) as trace:
            other(x)
    assert len(trace) == 1


def test_a_traced_graph_keeps_its_layers_names(images: Tensor) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = vit()
    graph = extraction.create_feature_extractor(model, {"blocks.2": "out"})
    with torch.no_grad():
        with attnx.capture(graph) as trace:
            graph(images)
        with attnx.capture(model) as own:
            model(images)
        with attnx.capture(graph, layers="blocks.1") as one:
            graph(images)
    assert list(trace) == list(own)
    assert list(one) == ["blocks.1.attn"]
    torch.testing.assert_close(attnx.rollout(trace), attnx.rollout(own), rtol=1e-5, atol=1e-7)


class Checkpointed(nn.Module):
    """A module that calls torch.utils.checkpoint itself, without a flag."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.model = vit()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        m = self.model
        x = m._pos_embed(m.patch_embed(x))
        for block in m.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return m.forward_head(m.norm(x))


def checkpointed() -> Iterator[tuple[str, nn.Module]]:
    import transformers

    timm_model = vit()
    timm_model.set_grad_checkpointing(True)
    yield "timm", timm_model.train()
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64, image_size=48)
    for reentrant in (False, True):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**small))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        yield f"transformers, reentrant={reentrant}", model.train()
        yield f"own, reentrant={reentrant}", Checkpointed(reentrant)


def score(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    return getattr(out, "logits", out)[:, 1].sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("keep", ["map", "qk"])
@pytest.mark.parametrize("name", [name for name, _ in checkpointed()])
def test_backward_through_checkpoints(name: str, keep: str, inside: bool, images: Tensor) -> None:
    model = dict(checkpointed())[name]
    score(model, images).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with attnx.capture(model, keep=keep) as trace:
        loss = score(model, images)
        maps = {layer: amap.clone() for layer, amap in trace.items()}
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    largest = max(float(grad.abs().max()) for grad in want.values())
    for n, p in model.named_parameters():
        if n in want:
            # A reentrant checkpoint's first pass has no graph: the kernel computes its output, SDPA's up to rounding.
            loose = 1e-5 if "reentrant=True" in name else 0.0
            torch.testing.assert_close(p.grad, want[n], rtol=10 * loose, atol=loose * largest, msg=n)
    # The backward pass runs the blocks again. This does not count as a second call.
    assert list(trace) == list(maps)
    assert len(trace.calls) == 1
    for layer, amap in maps.items():
        assert torch.equal(trace[layer], amap)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("name", ["timm", "transformers, reentrant=False", "transformers, reentrant=True"])
def test_gradient_maps_with_checkpointing_on(name: str, after: bool, images: Tensor) -> None:
    model = dict(checkpointed())[name]
    plain = copy.deepcopy(model)
    plain.set_grad_checkpointing(False) if name == "timm" else plain.gradient_checkpointing_disable()
    maps = []
    for each in (plain, model):
        with attnx.capture(each, grad=True) as trace:
            loss = score(each, images)
            if not after:
                trace.backward(loss)
        if after:
            loss.backward()
        maps.append(attnx.relevance(trace, query=0))
    assert torch.equal(*maps)
    flags = [m.grad_checkpointing for m in model.modules() if hasattr(m, "grad_checkpointing")]
    flags += [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert any(flags)  # it is on again


def test_class_maps_with_checkpointing_on(images: Tensor) -> None:
    model = vit()
    want = attnx.class_maps(model, images, [1, 2])
    model.set_grad_checkpointing(True)
    assert torch.equal(attnx.class_maps(model, images, [1, 2]), want)
    assert model.grad_checkpointing is True


def test_gradients_that_would_begin_in_a_checkpoint_say_so(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected no torch.utils.checkpoint around layers whose input needs no"):
        attnx.class_maps(Checkpointed(False).eval(), images, [1])
    with pytest.raises(ValueError, match=r"torch.utils.checkpoint with use_reentrant=True"):
        attnx.class_maps(Checkpointed(True).eval(), images, [1])
    # Where parameters need gradients the graph begins before the checkpoint.
    model = Checkpointed(False)
    with attnx.capture(model, grad=True, layers=["model.blocks.1", "model.blocks.2"]) as trace:
        trace.backward(score(model, images))
    with attnx.capture(model.model, grad=True, layers=["blocks.1", "blocks.2"]) as want:
        want.backward(score(model.model, images))
    for ours, theirs in zip(trace.values(), want.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


@pytest.fixture
def process_group() -> Iterator[None]:
    from torch import distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_models(process_group: None, images: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = vit()
    want = {method: attnx.Extractor(model, method)(images) for method in ("rollout", "cls")}
    with torch.no_grad():
        plain = model(images)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model(images)
    freed = [type(p) for p in model.parameters()]
    for method, maps in want.items():
        extract = attnx.Extractor(model, method)
        for _ in range(2):
            torch.testing.assert_close(extract(images), maps, rtol=1e-5, atol=1e-7)
        assert "runs the whole model" in str(extract.plan)
        with torch.no_grad():
            torch.testing.assert_close(model(images), plain)
            assert [type(p) for p in model.parameters()] == freed


def test_weights_of_a_tensor_subclass(images: Tensor) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = vit()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(images)
    for method, want in (("rollout", attnx.rollout(trace)), ("cls", attnx.cls_map(trace))):
        extract = attnx.Extractor(model, method)
        for _ in range(2):
            torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-6)
