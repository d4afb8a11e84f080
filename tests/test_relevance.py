"""Relevance and gradient rollout of a model's own pass, against their formulas on eager float64 attention."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import attnx


def small_vit(dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = dict(img_size=(32, 48), embed_dim=48, depth=3, num_heads=3, num_classes=7) | options
    return timm.create_model("vit_tiny_patch16_224", patch_size=8, **sizes).eval().to(dtype)


def some_images(count=2, dtype=torch.float64):
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=dtype)


def eager_layers(model, images, target):
    """P and its gradient [B, H, N, N] in every layer, with fused attention off, for the logits of one class."""
    kept, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda module, args, out: kept.append(out)))
    logits = model(images)
    gradients = torch.autograd.grad(logits[:, target].sum(), kept)
    for block, hook in zip(model.blocks, hooks, strict=True):
        block.attn.fused_attn = True
        hook.remove()
    return [(p.detach(), dp) for p, dp in zip(kept, gradients, strict=True)]


def chefer(layers, start=0):
    """R [B, N, N] by rules 5 and 6 of the paper."""
    B, _, N, _ = layers[0][0].shape
    R = torch.eye(N, dtype=torch.float64).expand(B, N, N)
    for p, dp in layers[start:]:
        R = R + (dp * p).clamp(min=0).mean(1) @ R
    return R


@pytest.mark.parametrize("start", [0, 1, -1])
def test_relevance_of_images_and_classes(start):
    model, images = small_vit(), some_images()
    maps = attnx.class_maps(model, images, [2, 5], start=start)
    assert maps.shape == (2, 2, 4, 6)
    for k, target in enumerate((2, 5)):
        R = chefer(eager_layers(model, images, target), start)
        torch.testing.assert_close(maps[:, k].flatten(1).double(), R[:, 0, 1:], rtol=2e-6, atol=1e-9)


def test_the_whole_relevance_matrix():
    model, images = small_vit(), some_images()
    with attnx.capture(model, grad=True) as trace:
        trace.backward(model(images)[:, 3].sum())
    R = chefer(eager_layers(model, images, 3))
    torch.testing.assert_close(attnx.relevance(trace, query="all").double(), R, rtol=2e-6, atol=1e-9)
    row = attnx.relevance(trace, query=4)
    torch.testing.assert_close(row.flatten(1).double(), R[:, 4, 1:], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("discard", [0.0, 0.6])
def test_gradient_rollout_has_each_layers_own_gradient(discard):
    model, images = small_vit(), some_images(1)
    ours = attnx.class_maps(model, images, [4], "gradient_rollout", discard=discard)
    N = 25
    R = torch.eye(N, dtype=torch.float64)
    for p, dp in eager_layers(model, images, 4):
        fused = (p * dp).mean(1)[0].clamp(min=0).flatten()
        fused[fused.topk(int(N * N * discard), largest=False).indices] = 0
        step = (fused.view(N, N) + torch.eye(N, dtype=torch.float64)) / 2
        R = step / step.sum(-1, keepdim=True) @ R
    torch.testing.assert_close(ours.flatten().double(), R[0, 1:], rtol=1e-5, atol=1e-9)


def test_each_image_its_own_classes():
    model, images = small_vit(torch.float32), some_images(3, torch.float32)
    targets = torch.tensor([[0, 1], [2, 3], [6, 0]])
    together = attnx.class_maps(model, images, targets)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], attnx.class_maps(model, images[i : i + 1], targets[i : i + 1]))
    first = attnx.class_maps(model, images)
    top = model(images).argmax(1)
    assert torch.equal(first, attnx.class_maps(model, images, top[:, None]))


def test_maps_are_autograds_of_the_same_pass():
    model, images = small_vit(), some_images()
    with attnx.capture(model, grad=True) as trace, attnx.capture(model) as plain:
        logits = model(images)
        with pytest.raises(RuntimeError, match="no gradient reached this layer"):
            trace[0]
        logits[:, 1].sum().backward()
    assert torch.equal(logits, model(images))
    for layer, (p, dp) in enumerate(eager_layers(model, images, 1)):
        torch.testing.assert_close(trace[layer].double(), (dp.clamp(min=0) * p).mean(1), rtol=2e-6, atol=1e-10)
        torch.testing.assert_close(plain[layer].double(), p.mean(1), rtol=2e-6, atol=1e-10)
    assert model.blocks[0].attn.qkv.weight.grad is not None  # the user's own backward pass, whole


def test_every_backward_pass_makes_them_anew():
    model, images = small_vit(), some_images()
    with attnx.capture(model, layers=-1, grad="signed", rows=[0], heads="each") as trace:
        logits = model(images)
    trace.backward(logits[:, 0].sum(), retain_graph=True)
    first = trace[0].clone()
    trace.backward(logits[:, 1].sum())
    p, dp = eager_layers(model, images, 1)[-1]
    assert not torch.equal(first, trace[0])
    torch.testing.assert_close(trace[0].double(), (p * dp)[:, :, :1], rtol=2e-6, atol=1e-10)
    with pytest.raises(ValueError, match="a graph that was not freed"):
        trace.backward(logits[:, 1].sum())
    assert model.head.weight.grad is None


def test_a_frozen_model_keeps_nothing_below_the_first_layer():
    model = small_vit(torch.float32).requires_grad_(False)
    with attnx.capture(model, layers=-1, grad=True) as trace:
        logits = model(some_images(dtype=torch.float32))
    node, seen = [logits.grad_fn], set()
    while node:
        at = node.pop()
        if at is not None and at not in seen:
            seen.add(at)
            node += [parent for parent, _ in at.next_functions]
    # Of the blocks' linear maps the last block's projection and MLP and the head alone are in the graph.
    assert sum("Addmm" in type(at).__name__ for at in seen) == 4
    trace.backward(logits[:, 0].sum())
    assert trace[0].shape == (2, 25, 25)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_off_are_said(mode):
    model, images = small_vit(), some_images()
    with mode(), pytest.raises(ValueError, match=r"blocks.0.attn: grad: expected gradients to be enabled"):
        with attnx.capture(model, grad=True):
            model(images)
    with mode():
        assert attnx.class_maps(model, images, [0]).shape == (2, 1, 4, 6)


def test_under_autocast():
    model, images = small_vit(torch.float32), some_images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = attnx.class_maps(model, images, [1])
    high = attnx.class_maps(model, images, [1])
    assert nn.functional.cosine_similarity(low.flatten(1), high.flatten(1)).min() > 0.95


def test_hugging_faces_models(poisoned):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = attnx.class_maps(model, images, [0, 1])
    eager = transformers.ViTForImageClassification(config).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    output = eager(images, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[:, 1].sum(), output.attentions)
    R = torch.eye(17).expand(2, 17, 17)
    for p, dp in zip(output.attentions, gradients, strict=True):
        R = R + (dp * p).clamp(min=0).mean(1) @ R
    torch.testing.assert_close(maps[:, 1].flatten(1), R[:, 0, 1:].detach(), rtol=1e-3, atol=1e-7)


WRONG = {
    "method": (dict(method="lrp"), "method: expected one of relevance, gradient_rollout; got 'lrp'"),
    "beyond": (
        dict(targets=[7]),
        r"targets: expected class indices in 0..6: a list of .* \[2, K\]",
    ),
    "floats": (dict(targets=torch.ones(2, 1)), "targets: expected class indices"),
    "count": (dict(targets=torch.ones(3, 1, dtype=torch.int64)), "targets: expected class indices"),
    "words": (dict(targets="cat"), r"targets: expected class indices in 0..6: .*; got 'cat'"),
    "labels": (dict(targets=torch.tensor([1, 2])), r"for one class of each image pass targets\[:, None\]"),
    "label arrays": (dict(targets=np.array([1, 2, 3])), r"got a tensor \[3\]: .* targets.tolist\(\)"),
    "none": (dict(targets=[]), "targets: expected class indices"),
    "start": (dict(targets=[0], start=3), r"start: expected a layer index in -3..2; got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name):
    options, expected = WRONG[name]
    model = small_vit(torch.float32)
    with pytest.raises(ValueError, match=expected):
        attnx.class_maps(model, some_images(dtype=torch.float32), **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="model: expected eval mode; got training mode"):
        attnx.class_maps(model.train(), some_images(dtype=torch.float32))


def test_wrong_captures_are_said():
    model, images = small_vit(torch.float32), some_images(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"grad: expected False, True or 'signed'; got 'x'"):
        with attnx.capture(model, grad="x"):
            pass
    with pytest.raises(ValueError, match="keep: expected 'map' with grad"):
        with attnx.capture(model, grad=True, keep="qk"):
            pass
    with attnx.capture(model) as trace:
        logits = model(images)
    with pytest.raises(ValueError, match="expected a capture with grad=True"):
        trace.backward(logits.sum())
    with attnx.capture(model, grad=True) as trace:
        logits = model(images)
    with pytest.raises(ValueError, match=r"score: expected one number.*\[2, 7\]"):
        trace.backward(logits)
    with pytest.raises(ValueError, match=r"score.*depends on none"):
        trace.backward(torch.ones(1, requires_grad=True).sum())
    with pytest.raises(ValueError, match=r"score.*needs no gradient"):
        trace.backward(torch.ones(()))
    with pytest.raises(ValueError, match=r"model: expected logits \[2, classes\]"):
        attnx.class_maps(timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", img_size=32).eval(),
                         torch.randn(2, 3, 32, 32))  # fmt: skip
