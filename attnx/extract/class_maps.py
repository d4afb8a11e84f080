"""From images to a map for every class: the gradients of several scores from one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnx.extract.inputs import image_call
from attnx.methods import gradient_rollout, relevance
from attnx.trace.capture import capture
from attnx.trace.layers import Layers
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
    """Which patches speak for each class: [B, K, h, w] float32, from one forward and K backward passes.

    No parameter gets a gradient, and below the first captured layer nothing is kept for one.

    Args:
        model: a classifier in eval mode: its output, or its `logits`, are [B, classes].
        images: [B, 3, height, width].
        targets: the classes, the same K for every image, or [B, K] int64 for each its own; None: each image's first.
        method: "relevance" or "gradient_rollout".
        layers, layout, backend: as in `attnx.capture`.
        model_kwargs: further arguments of the model's call.
        options: of `attnx.relevance` or `attnx.gradient_rollout`.

    Raises:
        ValueError: an unknown method, targets that are no classes, a model whose output is no [B, classes]; and as
            `attnx.capture` and the method.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    grad: bool | str = True if method == "relevance" else "signed"
    call = image_call(model, model_kwargs or {})
    captured = capture(model, layers, grad=grad, layout=layout, backend=backend)
    # Not inside `with` of a caller's inference_mode: its tensors know no gradient.
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), captured as trace:
        output = call(images)
        logits = getattr(output, "logits", output)
        wanted = _targets(targets, logits, len(images))
        maps = []
        for k in range(wanted.shape[1]):
            score = logits.gather(1, wanted[:, k : k + 1]).sum()
            trace.backward(score, retain_graph=k + 1 < wanted.shape[1])
            maps.append(METHODS[method](trace, **options))
    return torch.stack(maps, 1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model needs a gradient inside the `with`."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _targets(targets: Sequence[int] | Tensor | None, logits: Any, count: int) -> Tensor:
    """[B, K] int64 on the logits' device."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits [{count}, classes]; got {came}")
    if targets is None:
        return logits.argmax(1, keepdim=True)
    wanted = torch.as_tensor(targets, device=logits.device)
    if wanted.dim() == 1:
        wanted = wanted.expand(count, -1)
    classes = logits.shape[1]
    right = wanted.dim() == 2 and len(wanted) == count and wanted.shape[1] > 0 and not wanted.is_floating_point()
    if not right or wanted.min() < 0 or wanted.max() >= classes:
        raise ValueError(f"targets: expected classes in 0..{classes - 1}, [K] or [{count}, K]; got {targets!r}")
    return wanted.long()
