"""Support of one model: `support` tries every method on it and reports the results and the error messages."""

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnx.extract.class_maps import class_maps, frozen
from attnx.extract.extractor import Extractor
from attnx.extract.outputs import difference, is_logits, score_of
from attnx.messages import one_line
from attnx.methods import cls_map, relevance, rollout
from attnx.trace.adapters.huggingface import configurations
from attnx.trace.capture import capture, uncompiled
from attnx.trace.explain import unintercepted
from attnx.trace.interceptor import Interceptor
from attnx.trace.layers import attention_layers, clean_name, matches
from attnx.trace.recorder import Recorder
from attnx.trace.tokens import Tokens
from attnx.trace.trace import Trace

TOLERANCE = 1e-4  # of the largest number in a tensor
_MESSAGE = 240  # characters


@dataclass(frozen=True)
class Outcome:
    """Result of trying one method.

    Attributes:
        works: True if it works, False if it raised an error or gave a wrong result, None if it does not apply.
        reason: one line; "" if it works.
    """

    works: bool | None
    reason: str = ""


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
            rolled, maps = _try(partial(rollout, found.trace))
            cls, _ = _try(partial(cls_map, found.trace))
        classifies = images is not None and is_logits(plain, len(images))
        gradients, relevant = _gradients(model, call)
        if images is not None and classifies:
            relevant, _ = _try(lambda: class_maps(model, images, model_kwargs=kwargs))
        extracted = _extractor(model, images, kwargs, maps)
        taken = _attn_implementation(model, call, plain)
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
            extractor=extracted,
            attn_implementation=taken,
        )


def _message(error: Exception) -> str:
    """The message of an error in one line, with the type of an error that attnx does not raise itself."""
    known = isinstance(error, (ValueError, RuntimeError)) and str(error)
    return one_line(str(error) if known else f"{type(error).__name__}: {error}", _MESSAGE)


def _try(function: Callable[[], Tensor]) -> tuple[Outcome, Tensor | None]:
    """The outcome of a function that makes maps, and the maps."""
    try:
        maps = function()
    except Exception as error:
        return Outcome(False, _message(error)), None
    if not bool(maps.isfinite().all()):
        return Outcome(False, "its maps are not finite"), None
    return Outcome(True), maps


def _capture(model: nn.Module, call: Callable[[], Any]) -> _Captured:
    """A capture of every layer, also of a model without a layer that can be captured."""
    recorder = Recorder(model, "mean", None, "map", None, "auto")
    interceptor = Interceptor(model, None, recorder)
    ran: set[str] = set()
    names = {clean_name(name): module for name, module in model.named_modules()}
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
        recorder.trace, output, len(caught) + len(without), len(interceptor.explicit), one_line(missing, _MESSAGE)
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


def _gradients(model: nn.Module, call: Callable[[], Any]) -> tuple[Outcome, Outcome]:
    """The outcomes of maps weighted by their gradients, and of relevance."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), frozen(model), capture(model, grad=True) as trace:
            trace.backward(score_of(call()))
    except Exception as error:
        failed = Outcome(False, _message(error))
        return failed, failed
    failures = [outcome for layer in trace if not (outcome := _try(partial(trace.__getitem__, layer))[0]).works]
    relevant, _ = _try(partial(relevance, trace))
    if not failures:
        return Outcome(True), relevant
    return Outcome(False, f"{len(failures)} of {len(trace)} layers: {failures[0].reason}"), relevant


def _extractor(model: nn.Module, images: Tensor | None, kwargs: dict[str, Any], maps: Tensor | None) -> Outcome:
    """The outcome of an Extractor's rollout, compared with `maps`, the rollout of a capture."""
    if images is None:
        return Outcome(None, "its call takes more than images")

    def extract() -> Tensor:
        extractor = Extractor(model, model_kwargs=kwargs)
        extractor(images)  # makes the plan
        return extractor(images)

    outcome, extracted = _try(extract)
    if extracted is None or maps is None:
        return outcome
    same = extracted.shape == maps.shape and difference(extracted, maps) <= TOLERANCE
    return outcome if same else Outcome(False, "its maps differ from those of a capture")


def _attn_implementation(model: nn.Module, call: Callable[[], Any], plain: Any) -> Outcome:
    """The outcome of running a transformers model with attnx as its attention implementation."""
    if "transformers" not in sys.modules:
        return Outcome(None, "no transformers model")
    from transformers import PreTrainedModel

    from attnx.huggingface import use

    if not isinstance(model, PreTrainedModel):
        return Outcome(None, "no transformers model")
    before = [(config, config._attn_implementation_internal) for config, _ in configurations(model)]
    try:
        with warnings.catch_warnings(record=True) as warned, torch.no_grad():
            warnings.simplefilter("always")
            use(model)
            off = difference(call(), plain)
    except Exception as error:
        return Outcome(False, _message(error))
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
    if off > TOLERANCE:
        return Outcome(False, f"the output differs by {off:.0e} of its largest number")
    own = [str(w.message) for w in warned if str(w.message).startswith("attnx: ")]
    return Outcome(False, one_line(own[0].removeprefix("attnx: "), _MESSAGE)) if own else Outcome(True)


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
