"""Maps of images for each of several classes: one forward pass, one backward pass per class."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnx.extract.inputs import check_images, image_call
from attnx.methods import gradient_rollout, relevance
from attnx.methods.queries import renamed
from attnx.trace.capture import capture
from attnx.trace.layers import Layers, check_model
from attnx.trace.layout import TokenLayout

METHODS: dict[str, Callable[..., Tensor]] = {"relevance": relevance, "gradient_rollout": gradient_rollout}


def class_maps(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor | None = None,
    method: str = "relevance",
    *,
    layers: Layers = None,
    layout: TokenLayout | None = None,
    backend: str = "auto",
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Relevance of the patches for each of K classes, from one forward pass and K backward passes.

    No parameter receives a gradient, and no graph is recorded below the first captured layer.

    Args:
        model: a classifier in eval mode whose output, or its attribute `logits`, is [B, classes].
        images: [B, 3, height, width].
        targets: a list of K class indices for all images, or [B, K] int64, such as labels[:, None] for one class
            of each image; None: the predicted class of each image.
        method: "relevance" or "gradient_rollout".
        layers, layout, backend: as in `attnx.capture`.
        model_kwargs: further arguments of the model's call.
        options: further arguments of `attnx.relevance` or `attnx.gradient_rollout`.

    Returns:
        [B, K, h, w] float32.

    Raises:
        ValueError: an unknown method, a model in training mode, targets that are not class indices, an output that is
            not [B, classes]; and as in `attnx.capture` and the method.

    Reference:
        as in `attnx.relevance` and `attnx.gradient_rollout`.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> attnx.class_maps(model, torch.rand(2, 3, 96, 96), [0, 5, 7]).shape
        torch.Size([2, 3, 12, 12])
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    check_model(model)
    check_images(images, videos=True)
    if model.training:
        raise ValueError("model: expected eval mode; got training mode; call model.eval()")
    if "rows" in options:
        options["query"] = renamed(options.get("query"), options.pop("rows"))
    known = [name for name in signature(METHODS[method]).parameters if name not in ("trace", "layers", "rows")]
    if not set(options) <= set(known):
        raise ValueError(f"options of method {method!r}: expected {', '.join(known)}; got {', '.join(options)}")
    grad: bool | str = True if method == "relevance" else "signed"
    call = image_call(model, model_kwargs or {})
    captured = capture(model, layers, grad=grad, layout=layout, backend=backend)
    # Leave the caller's inference_mode: its tensors cannot require gradients.
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), captured as trace:
        output = call(images)
        logits = getattr(output, "logits", output)
        chosen = _targets(targets, logits, len(images))
        maps = []
        for k in range(chosen.shape[1]):
            score = logits.gather(1, chosen[:, k : k + 1]).sum()
            trace.backward(score, retain_graph=k + 1 < chosen.shape[1])
            maps.append(METHODS[method](trace, **options))
    return torch.stack(maps, 1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context manager in which no parameter of the model requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _targets(targets: Sequence[int] | Tensor | None, logits: Any, count: int) -> Tensor:
    """Class indices [B, K] int64 on the device of the logits."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits [{count}, classes]; got {got}")
    if targets is None:
        return logits.argmax(1, keepdim=True)
    classes = logits.shape[1]
    several = f"a list of classes of all images, or a tensor [{count}, K]"
    wrong = f"targets: expected class indices in 0..{classes - 1}: {several}; got {targets!r}"
    if isinstance(targets, (Tensor, np.ndarray)) and targets.ndim == 1:
        # [B] labels would mean B classes for each image.
        raise ValueError(
            f"targets: expected {several}; got a tensor {list(targets.shape)}: for one class of each image pass "
            "targets[:, None], for the same classes of all images targets.tolist()"
        )
    try:
        indices = torch.as_tensor(targets, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(wrong) from error
    if indices.dim() == 1:
        indices = indices.expand(count, -1)
    valid = indices.dim() == 2 and len(indices) == count and indices.shape[1] > 0 and not indices.is_floating_point()
    if not valid or indices.min() < 0 or indices.max() >= classes:
        raise ValueError(wrong)
    return indices.long()
