"""`Extractor`: its maps equal those of capture and method, it runs only the needed layers, and restores the model."""

import gc
import mmap
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import attnx
from attnx.extract.extractor import Extractor
from attnx.ops.backends import map_pool
from attnx.trace import attend as kept

TINY = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def stirred(model: nn.Module) -> nn.Module:
    """The model in eval mode, with random noise on its weights so that attention is not nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def vit(size: int = 48, name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return stirred(timm.create_model(name, pretrained=False, **{**TINY, "img_size": size, **options}))


def hugging_face(family: str, implementation: str = "sdpa", **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64)
    config = getattr(transformers, f"{family}Config")(**sizes, image_size=48, patch_size=16, **options)
    config._attn_implementation = implementation
    return stirred(getattr(transformers, f"{family}Model")(config))


def pictures(count: int = 3, size: int = 48) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def by_capture(model: nn.Module, images: Tensor, method: str = "rollout", heads: str = "mean", **options) -> Tensor:
    """The reference: capture the whole forward pass, then apply the method."""
    with torch.no_grad(), attnx.capture(model, heads=heads, keep="map") as trace:
        model(images)
    if method == "rollout":
        return attnx.rollout(trace, **options)
    return attnx.cls_map(trace) if method == "cls" else attnx.layer_maps(trace).maps


def check(model: nn.Module, images: Tensor, method: str = "rollout", **options) -> Extractor:
    """Compare the first call (a trial, then the plan) and the second call (the plan) with `by_capture`."""
    before = state(model)
    extract = Extractor(model, method, **options)
    want = by_capture(model, images, method, **{k: v for k, v in options.items() if k != "keep"})
    for _ in range(2):
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-6 * float(want.max()))
    assert state(model) == before
    return extract


def state(model: nn.Module) -> list[tuple[object, ...]]:
    """The state that a call could change: instance attributes, hooks and flags."""
    left = []
    for module in model.modules():
        config = getattr(module, "config", None)
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_always_called)
        flags = getattr(module, "fused_attn", None), getattr(config, "_attn_implementation_internal", None)
        left.append((*sorted(vars(module)), *hooks, *flags))
    return left


def ran(model: nn.Module, extract: Extractor, images: Tensor) -> list[str]:
    """Names of the modules whose forward ran to its end."""
    names: list[str] = []
    hooks = [
        m.register_forward_hook(lambda module, args, out, name=name: names.append(name))
        for name, m in model.named_modules()
    ]
    extract(images)
    for hook in hooks:
        hook.remove()
    return names


@pytest.mark.parametrize("keep", ["auto", "map", "qk"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rollout", {}),
        ("rollout", {"start": 2}),
        ("rollout", {"residual": 0.2, "start": 1}),
        ("rollout", {"discard": 0.6}),
        ("rollout", {"preset": "vit-explain", "discard": 0.9}),
        ("rollout", {"rows": 4}),
        ("rollout", {"rows": "mean"}),
        ("rollout", {"rows": "all"}),
        ("rollout", {"heads": "max"}),
        ("cls", {}),
        ("cls", {"heads": "each"}),
        ("layers", {}),
        ("layers", {"heads": "min"}),
    ],
)
def test_the_maps_are_those_of_capture_and_method(method: str, options: dict, keep: str) -> None:
    extract = check(vit(), pictures(), method, keep=keep, **options)
    assert extract.plan.bound
    one_row = method != "rollout" or (not options.keys() & {"discard", "preset"} and options.get("rows") in (None, 4))
    assert (extract.plan.row is not None) == one_row
    assert (extract.plan.split is not None) == one_row


@pytest.mark.parametrize(
    ("family", "implementation", "split"),
    [
        ("ViT", "sdpa", True),
        ("ViT", "eager", True),
        ("Dinov2", "sdpa", True),
        ("Dinov2WithRegisters", "eager", True),
        ("DeiT", "sdpa", True),
        ("CLIPVision", "sdpa", True),
        ("DINOv3ViT", "sdpa", False),  # rotary embeddings
        ("SiglipVision", "sdpa", False),  # no class token: the pooling head's map
    ],
)
def test_hugging_face(family: str, implementation: str, split: bool) -> None:
    model = hugging_face(family, implementation)
    extract = check(model, pictures())
    assert extract.plan.bound
    assert (extract.plan.split is not None) == split
    if family != "SiglipVision":
        check(model, pictures(), "cls")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_siglip_224", {}),  # an attention pool
        ("vit_base_patch16_reg4_gap_256", {}),  # registers, no class token
        ("vit_base_patch16_xp_224", {}),  # parallel attention and MLP: the block itself attends
        ("eva02_tiny_patch14_224", {"img_size": 42, "embed_dim": 48, "depth": 2, "num_heads": 3}),  # rotary
        ("beit_base_patch16_224", {}),  # a bias of relative positions
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_timm(name: str, options: dict) -> None:
    model = vit(name=name, **options)
    check(model, pictures(size=options.get("img_size", 48)))


def test_nothing_runs_that_the_answer_does_not_need() -> None:
    model = vit()
    images = pictures()
    for method in ("rollout", "cls", "layers"):
        extract = Extractor(model, method)
        extract(images)
        names = ran(model, extract, images)
        assert "blocks.2.mlp" in names
        assert "blocks.3.norm1" in names
        # (The hooks on the projection keep it from being split.)
        after = {"", "blocks.3.attn", "blocks.3.attn.proj", "blocks.3.norm2", "blocks.3.mlp", "norm", "head"}
        assert not after & set(names)
    # With a depth in the middle, no layer above it runs.
    extract = Extractor(model, "cls", layers=1)
    extract(images)
    names = ran(model, extract, images)
    assert "blocks.0.mlp" in names
    assert not [n for n in names if n.startswith(("blocks.2", "blocks.3"))]


def test_the_last_layers_projection_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = vit(), pictures()
    extract = Extractor(model)
    extract(images)
    shapes: list[tuple[int, ...]] = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: (shapes.append((x.shape[1], len(rest[0]))), real(x, *rest))[1])
    extract(images)
    assert shapes[-2:] == [(1, 48), (10, 48)]  # one query, and the keys of all tokens; no values
    assert shapes[:-2].count((10, 144)) == 3


def test_only_what_is_kept_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = vit(), pictures()
    extract = Extractor(model, "cls")
    extract(images)
    monkeypatch.setattr(kept, "attention", None)
    extract(images)  # only the last layer's row is computed; earlier layers attend without a map


def test_no_mode_is_on_and_no_module_has_hooks_where_blocks_are_known() -> None:
    model, images = vit(), pictures()
    extract = Extractor(model)
    extract(images)
    seen = []

    class Spy(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            modes = torch.overrides._get_current_function_mode_stack()
            seen.append((len(modes), len(model.blocks[0]._forward_hooks), len(model.blocks[0].attn._forward_hooks)))
            return x

    model.norm_pre = Spy()
    extract(images)
    assert seen == [(0, 0, 0)]


class Hidden(nn.Module):
    """A block that calls SDPA in a helper function, where it cannot be bound."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        return x + hidden_attention(*self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)).transpose(
            1, 2
        ).flatten(2)


def hidden_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, 16, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(48, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        return self.head(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))[:, 0])


def test_unknown_blocks_are_listened_to_and_left_as_early() -> None:
    torch.manual_seed(0)
    model = Stack(*(Hidden() for _ in range(3))).eval()
    images = pictures()
    extract = check(model, images)
    assert not extract.plan.bound
    assert "the whole model is intercepted" in str(extract.plan)
    assert extract.plan.split is None  # the roles of its projections are unknown
    assert not {"head", "blocks.2"} & set(ran(model, extract, images))


def test_a_projection_that_does_more_is_not_split() -> None:
    class Scaled(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            return x + F.scaled_dot_product_attention(2 * q, k, v).transpose(1, 2).flatten(2)

    class Hooked(Hidden):
        def __init__(self) -> None:
            super().__init__()
            self.qkv.register_forward_hook(lambda module, args, out: 2 * out)

    for block in (Scaled, Hooked):
        torch.manual_seed(0)
        extract = check(Stack(block(), block()).eval(), pictures())
        assert extract.plan.split is None
        assert extract.plan.row == 0
    # A known block whose linear layer is wrapped after the plan was made.
    model = vit()
    extract = check(model, pictures())
    assert extract.plan.split is not None
    own = model.blocks[-1].attn.qkv.forward
    model.blocks[-1].attn.qkv.forward = lambda x: 2 * own(x)
    torch.testing.assert_close(extract(pictures()), by_capture(model, pictures()), rtol=1e-4, atol=1e-7)


def test_the_plan_is_a_table() -> None:
    model = vit(depth=3)
    extract = Extractor(model, start=1)
    plan = extract.plan  # made from an image of the model's own size
    assert [step.layer for step in plan.steps] == [f"blocks.{i}.attn" for i in range(3)]
    assert [step.nbytes for step in plan.steps] == [0, 4 * 10 * 10, 4 * 10]
    assert plan.nbytes == 440
    text = str(plan)
    assert text.splitlines()[0].split() == ["layer", "runs", "keeps", "bytes/image"]
    assert "its own attention" in text.splitlines()[1]
    assert "map [10, 10]" in text.splitlines()[2]
    assert "keys, and the query of row 0" in text.splitlines()[3]
    assert text.splitlines()[4].startswith("stops in blocks.2.attn")
    cls = Extractor(model, "cls", layers=0).plan
    assert [step.runs for step in cls.steps] == ["keys, and the query of row 0", "nothing", "nothing"]
    assert "q, k" in str(Extractor(model, keep="qk").plan)


def test_a_plan_of_a_model_that_says_no_size_asks_for_a_call() -> None:
    model = Stack(Hidden()).eval()
    extract = Extractor(model)
    with pytest.raises(RuntimeError, match="expected an extractor that was called once"):
        print(extract.plan)
    extract(pictures(1))
    assert extract.plan.last == "blocks.0"


def test_images_of_other_sizes() -> None:
    model = vit(dynamic_img_size=True)
    extract = Extractor(model)
    for height, width in ((48, 48), (64, 32), (48, 96)):
        images = torch.randn(2, 3, height, width)
        want = by_capture(model, images)
        assert want.shape == (2, height // 16, width // 16)
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)


def test_what_was_given_is_not_written_over() -> None:
    """Memory of the last call is reused, but maps that were returned are never overwritten."""
    model = vit()
    for method, options in (("rollout", {}), ("rollout", {"rows": "all"}), ("cls", {}), ("layers", {})):
        extract = Extractor(model, method, **options)
        extract(pictures(2))
        first = extract(pictures(2))
        copy = first.clone()
        extract(pictures(2) + 1)
        assert torch.equal(first, copy)


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="needs MADV_FREE")
def test_memory_is_used_again_and_no_trace_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    map_pool.clear()
    monkeypatch.setattr(map_pool, "LARGE", 0)
    extract = Extractor(vit(), keep="map")
    extract(pictures(2))
    extract(pictures(2))
    free = map_pool.free_bytes()
    assert free > 0
    # No new pages are allocated, and no trace holds any.
    extract(pictures(2))
    assert map_pool.free_bytes() == free
    want = by_capture(extract.model, pictures(1))
    torch.testing.assert_close(extract(pictures(1)), want, rtol=1e-4, atol=1e-7)


def test_an_error_in_the_model_leaves_nothing_behind() -> None:
    model, images = vit(), pictures()
    extract = Extractor(model)
    want = extract(images)
    before = state(model)
    broken = model.blocks[2].mlp.fc1
    for error in (RuntimeError("broken"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        hook = broken.register_forward_pre_hook(fail)
        with pytest.raises(type(error)):
            extract(images)
        hook.remove()
        assert state(model) == before
    torch.testing.assert_close(extract(images), want)


class Twice(nn.Module):
    """A block that attends twice. One of the calls is in a helper function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v) + hidden_attention(k, q, v)
        return x + y.transpose(1, 2).flatten(2)


def test_blocks_that_attend_twice_and_calls_that_binding_misses() -> None:
    torch.manual_seed(0)
    model, images = Stack(Twice(), Twice()).eval(), pictures()
    extract = check(model, images, "cls", layers="blocks.1")
    assert extract.plan.last == "blocks.1#2"
    assert not extract.plan.bound  # the second call is found during the pass
    check(model, images, "layers")


def test_an_interrupt_leaves_nothing_that_hears() -> None:
    model, images = vit(), pictures()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for extract in (Extractor(model), Extractor(model, discard=0.1)):
        for _ in range(2):  # in the trial, and later
            hook = model.blocks[2].mlp.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                extract(images)
            hook.remove()
            assert not torch.overrides._get_current_function_mode_stack()
            want = by_capture(model, images, **extract.options)
            torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)
    hook = model.blocks[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), attnx.capture(model):
        model(images)
    hook.remove()
    assert not torch.overrides._get_current_function_mode_stack()


def test_one_extractor_in_two_threads() -> None:
    model = vit()
    extract = Extractor(model)
    batches = [pictures(2) + i for i in range(4)]
    want = [by_capture(model, images) for images in batches]
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                torch.testing.assert_close(extract(batches[index]), want[index], rtol=1e-4, atol=1e-6)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_further_tensors_of_every_image() -> None:
    torch.manual_seed(0)
    model = transformers.ViTModel(hugging_face("ViT").config, use_mask_token=True)
    model = stirred(model)
    images = pictures(3)
    masked = torch.zeros(3, 9, dtype=torch.bool)
    extract = Extractor(model, model_kwargs={"bool_masked_pos": masked})
    want = by_capture(model, images)
    for _ in range(2):
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)
    assert extract.plan.nbytes == Extractor(model).plan.nbytes  # of one image


def test_a_model_that_changed_since_the_plan() -> None:
    model, images = vit(), pictures()
    extract = Extractor(model)
    extract(images)
    model.blocks[1] = nn.Identity()
    with pytest.raises(
        RuntimeError, match=r"ran other layers than when the plan was made: expected attention in blocks.0"
    ):
        extract(images)
    assert "forward" not in vars(model.blocks[0].attn)
    torch.testing.assert_close(Extractor(model)(images), by_capture(model, images), rtol=1e-4, atol=1e-7)


def test_inside_a_capture_of_the_same_model() -> None:
    """The capture sees the whole pass, and the extractor's maps are the same."""
    model, images = vit(), pictures()
    extract = Extractor(model)
    want = extract(images)
    with attnx.capture(model) as trace:
        ours = extract(images)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(attnx.rollout(trace), want, rtol=1e-5, atol=1e-7)
    handle = attnx.patch(model)
    torch.testing.assert_close(extract(images), want, rtol=1e-5, atol=1e-7)
    assert len(handle.trace) == 4
    handle.remove()
    torch.testing.assert_close(extract(images), want, rtol=1e-5, atol=1e-7)


def test_two_extractors_of_one_model_in_two_threads() -> None:
    model = vit()
    jobs = [(Extractor(model, method), pictures(2) + i) for i, method in enumerate(("rollout", "cls") * 2)]
    want = [extract(images) for extract, images in jobs]
    wrong: list[object] = []

    def work(index: int) -> None:
        extract, images = jobs[index]
        try:
            for _ in range(20):
                torch.testing.assert_close(extract(images), want[index], rtol=1e-4, atol=1e-6)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_compiled_models_run_uncompiled() -> None:
    model, images = vit(), pictures()
    want = by_capture(model, images)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)
    torch.testing.assert_close(Extractor(compiled)(images), want, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        compiled(images)


def test_autocast_and_channels_last() -> None:
    model, images = vit(), pictures()
    want = by_capture(model, images)
    torch.testing.assert_close(Extractor(model, channels_last=True)(images), want, rtol=1e-4, atol=1e-7)
    half = Extractor(model, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        want = by_capture(model, images)
        outside = Extractor(model)(images)
    torch.testing.assert_close(half(images), want, rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(outside, want, rtol=2e-2, atol=1e-4)
    assert half.plan.split is not None


def test_stream() -> None:
    extract = Extractor(vit())
    batches = [pictures(2) + i for i in range(3)]
    given = list(extract.stream(iter(batches)))
    for maps, images in zip(given, batches, strict=True):
        assert torch.equal(maps, extract(images))
    assert list(extract.stream([])) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Extractor(vit(), foo=1),
            "options of method 'rollout': expected residual, discard, start, preset, query, rows; got foo",
        ),
        (lambda: Extractor(vit(), "cls", start=1), "options of method 'cls': expected none; got start"),
        (lambda: Extractor(vit(), dtype="bf16"), "dtype: expected a floating-point torch.dtype; got 'bf16'"),
        (lambda: Extractor("vit"), "model: expected a torch.nn.Module; got str"),
        (lambda: Extractor(vit().train()), "expected eval mode"),
        (
            lambda: Extractor(vit())(pictures()[0]),
            r"images: expected a tensor \[B, channels, height, width\] with B >= 1; got \[3,",
        ),
        (lambda: Extractor(vit())(pictures()[:0]), r"with B >= 1; got \[0, 3, 48, 48\]"),
        (lambda: Extractor(vit())([1]), "images: expected a tensor .*; got list"),
    ],
)
def test_what_does_not_fit_is_said(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_plan_of_a_model_for_grey_images() -> None:
    assert Extractor(vit(in_chans=1)).plan.last == "blocks.3.attn"


def test_compile_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="compile: expected a model on a CUDA device; got cpu"):
        Extractor(vit(), compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("method", ["rollout", "cls"])
def test_graphs(method: str, dtype: torch.dtype | None, device: torch.device) -> None:
    model = vit().to(device)
    plain, graph = Extractor(model, method, dtype=dtype), Extractor(model, method, dtype=dtype, compile=True)
    for count in (1, 2, 1):
        for shift in range(3):
            images = pictures(count).to(device) + shift
            torch.testing.assert_close(graph(images), plain(images), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_stream_on_a_gpu(device: torch.device) -> None:
    extract = Extractor(vit().to(device))
    batches = [pictures(2) + i for i in range(5)]
    for maps, images in zip(extract.stream(batches), batches, strict=True):
        torch.testing.assert_close(maps, extract(images.to(device)))


def test_a_plan_says_why() -> None:
    model = vit()
    steps = {step.layer: step for step in Extractor(model, "cls", layers=1).plan.steps}
    assert steps["blocks.0.attn"].why == "the method does not read it"
    assert steps["blocks.1.attn"].why == ""
    assert steps["blocks.2.attn"].why == "the method reads no layer after blocks.1.attn"

    class Named(type(model.blocks[0].attn)):
        pass

    model.blocks[-1].attn.__class__ = Named
    plan = Extractor(model).plan
    assert plan.split is None
    assert plan.steps[-1].why == "all its projections run: attnx does not know those of Named"
    assert f"{plan.last}: all its projections run: attnx does not know those of Named" in str(plan).splitlines()

    hidden = Extractor(Stack(Hidden()).eval())
    hidden(pictures(1))
    assert not hidden.plan.bound
    assert set(hidden.plan.unbound.values()) == {"its forward does not call F.scaled_dot_product_attention itself"}


def test_a_rollout_never_skips_a_layer() -> None:
    """Block 1 of 3 is unfused. A rollout of blocks 0 and 2 alone would give wrong values."""

    class OwnSoftmaxAttention(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.qkv, self.proj, self.heads = block.qkv, block.proj, block.num_heads

        def forward(self, x: Tensor, **options: object) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            p = torch.exp(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
            return self.proj((p / p.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))

    model = vit(depth=3)
    model.blocks[1].attn = OwnSoftmaxAttention(model.blocks[1].attn)
    gap = r"blocks.1.attn ran without one, so the chain would skip it"
    with torch.no_grad(), pytest.warns(UserWarning, match=r"not intercepted.*blocks.1.attn"):
        with attnx.capture(model) as trace:
            model(pictures())
    with pytest.raises(ValueError, match=gap):
        attnx.rollout(trace)
    assert attnx.cls_map(trace).shape == (3, 3, 3)
    assert attnx.rollout(trace, layers=["blocks.0.attn", "blocks.2.attn"]).shape == (3, 3, 3)  # the user's choice
    for layers in ("blocks.*", "blocks"):
        with pytest.raises(ValueError, match=gap):
            attnx.rollout(trace, layers=layers)
        with torch.no_grad(), attnx.capture(model, layers=layers) as some:
            model(pictures())
        with pytest.raises(ValueError, match=gap):
            attnx.rollout(some)
    with torch.no_grad(), attnx.capture(model, layers=["blocks.0", "blocks.2"]) as chosen:
        model(pictures())
    assert attnx.rollout(chosen).shape == (3, 3, 3)
    with pytest.raises(ValueError, match=gap), pytest.warns(UserWarning, match="not intercepted"):
        Extractor(model)(pictures())
