"""Support of one model: `support` tries every method on it and reports the results and the error messages."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnx.extract.class_maps import class_maps
from attnx.extract.outputs import difference, is_logits
from attnx.extract.tries import (
    MESSAGE,
    TOLERANCE,
    Outcome,
    attempt,
    try_attn_implementation,
    try_extractor,
    try_gradients,
    try_words,
)
from attnx.messages import one_line
from attnx.methods import cls_map, rollout
from attnx.trace.capture import uncompiled
from attnx.trace.explain import unintercepted
from attnx.trace.interceptor import Interceptor
from attnx.trace.layers import attention_layers, matches
from attnx.trace.recorder import Recorder
from attnx.trace.structure import structure_of
from attnx.trace.tokens import Tokens
from attnx.trace.trace import Trace


@dataclass(frozen=True)
class Support:
    """Results of trying attnx on one model.

    Attributes:
        layers: number of attention layers that ran.
        captured: number of those that a capture has maps of.
        own_maps: number of captured layers that compute their own softmax, so the model holds their [B, heads, M, N].
        missing: reason that a layer has no map; "" if every layer has one.
        layouts: the tokens of the keys of each kind of layer, such as "12 layers: 14x14 image, 1 prefix".
        difference: largest difference that a capture makes to the output, relative to the largest number in it.
        restored: True if hooks, attributes and output of the model are afterwards what they were before.
        rollout, cls: `attnx.rollout` and `attnx.cls_map` of a capture of all layers.
        gradients: the maps of a capture with grad=True, in every layer.
        relevance: `attnx.class_maps` of a classifier of images, `attnx.relevance` of another model.
        words: a map of the image for each token of a text, from a capture of all layers.
        extractor: `attnx.Extractor` with method "rollout"; its maps equal those of a capture.
        attn_implementation: `attnx.huggingface.use`, with the same output.
    """

    layers: int
    captured: int
    own_maps: int
    missing: str
    layouts: tuple[str, ...]
    difference: float
    restored: bool
    rollout: Outcome
    cls: Outcome
    gradients: Outcome
    relevance: Outcome
    words: Outcome
    extractor: Outcome
    attn_implementation: Outcome

    @property
    def unchanged(self) -> bool:
        """True if a capture leaves the output as it is, up to rounding."""
        return self.difference <= TOLERANCE

    def row(self) -> dict[str, Any]:
        """The results as a row of the stored table, for JSON: `unchanged` in place of `difference`."""
        values = asdict(self) | {"layouts": list(self.layouts), "unchanged": self.unchanged}
        return {name: value for name, value in values.items() if name != "difference"}


class _Captured(NamedTuple):
    """Results of one capture of every layer."""

    trace: Trace
    output: Any
    layers: int
    own_maps: int
    missing: str


def support(
    model: nn.Module,
    call: Callable[[], Any],
    images: Tensor | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> Support:
    """The results of trying every method on a model, which is called about ten times and not changed.

    Args:
        model: a model in eval mode.
        call: calls the model and returns its output.
        images: [B, channels, height, width], if `call` takes these and `model_kwargs` only; None: `Extractor` and
            `class_maps` do not apply.
        model_kwargs: further arguments of the call, as in `Extractor`.

    Raises:
        ValueError: the model is in training mode.
        Exception: the model's own error, if it does not run without attnx.

    Example:
        >>> import torch
        >>> from attnx.demo.vit import demo_model
        >>> from attnx.extract.support import support
        >>> model, images = demo_model(), torch.rand(1, 3, 96, 96)
        >>> found = support(model, lambda: model(images), images)
        >>> found.layers, found.captured, found.rollout.works, found.layouts
        (4, 4, True, ('4 layers: 12x12 image, 1 prefix',))
    """
    if model.training:
        raise ValueError("model: expected eval mode; got training mode; call model.eval()")
    kwargs = model_kwargs or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            plain = call()
        before = _state(model)
        with torch.no_grad():
            found = _capture(model, call)
            rolled, maps = attempt(partial(rollout, found.trace))
            cls, _ = attempt(partial(cls_map, found.trace))
            words = try_words(found.trace)
        classifies = images is not None and is_logits(plain, len(images))
        gradients, relevant = try_gradients(model, call)
        if images is not None and classifies:
            relevant, _ = attempt(lambda: class_maps(model, images, model_kwargs=kwargs))
        extracted = try_extractor(model, images, kwargs, maps)
        taken = try_attn_implementation(model, call, plain)
        with torch.no_grad():
            restored = _state(model) == before and difference(call(), plain) <= 1e-6
        return Support(
            layers=found.layers,
            captured=len({name.partition("#")[0] for name in found.trace}),
            own_maps=found.own_maps,
            missing=found.missing,
            layouts=_layouts(found.trace),
            difference=difference(found.output, plain),
            restored=restored,
            rollout=rolled,
            cls=cls,
            gradients=gradients,
            relevance=relevant,
            words=words,
            extractor=extracted,
            attn_implementation=taken,
        )


def _capture(model: nn.Module, call: Callable[[], Any]) -> _Captured:
    """A capture of every layer, also of a model without a layer that can be captured."""
    recorder = Recorder(model, "mean", None, "map", None, "auto")
    interceptor = Interceptor(model, None, recorder)
    ran: set[str] = set()
    names = dict(structure_of(model).named_modules())
    with ExitStack() as stack:
        for name in attention_layers(model):
            stack.callback(names[name].register_forward_pre_hook(lambda *_, name=name: ran.add(name)).remove)
        stack.enter_context(uncompiled())
        stack.callback(interceptor.uninstall)
        interceptor.install()
        output = call()
    caught = {name.partition("#")[0] for name in recorder.trace}
    reasons = unintercepted(interceptor, interceptor.intercepted)
    without = {name: reason for name, reason in reasons.items() if name in ran or name in interceptor.skipped}
    if caught:
        without.pop("", None)  # the model's own class may have a name that attends
    # A layer that attends in a part of its own, or in a block around it, has a map under that name.
    without = {n: why for n, why in without.items() if not any(matches(c, n) or matches(n, c) for c in caught)}
    missing = "; ".join(dict.fromkeys(without.values()))
    return _Captured(
        recorder.trace, output, len(caught) + len(without), len(interceptor.explicit), one_line(missing, MESSAGE)
    )


def _layouts(trace: Trace) -> tuple[str, ...]:
    """The tokens of the keys of each kind of layer, in words, in the order of the layers."""
    counts: dict[str, int] = {}
    for layer in trace:
        tokens = _tokens(trace.sides(layer)[1])
        counts[tokens] = counts.get(tokens, 0) + 1
    return tuple(f"{n} layer{'s' * (n > 1)}: {tokens}" for tokens, n in counts.items())


def _tokens(keys: Tokens) -> str:
    """The tokens of one side of a map, in words."""
    if keys.grid is None:
        return str(keys)
    frames = f"{keys.frames}x" * (keys.frames > 1)
    if keys.kind == "windows":
        return f"windows of {keys.count} in {keys.grid[0]}x{keys.grid[1]}"
    of = f" of {keys.part}" * bool(keys.part)
    return (
        f"{frames}{keys.grid[0]}x{keys.grid[1]} {keys.kind}{of}"
        + f", {keys.prefix} prefix" * bool(keys.prefix)
        + f", {keys.suffix} suffix" * bool(keys.suffix)
    )


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """The state of each module that a capture could change: attributes, forwards, hooks, flags, attention settings."""
    return [
        (
            name,
            frozenset(vars(module)),
            id(vars(module).get("forward")),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            vars(module).get("fused_attn"),
            [p.requires_grad for p in module.parameters(recurse=False)],
            getattr(vars(module).get("config"), "_attn_implementation_internal", None),
        )
        for name, module in model.named_modules()
    ]
