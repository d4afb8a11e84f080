"""Tries of single methods on one model, for `support`."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnx.extract.class_maps import frozen
from attnx.extract.extractor import Extractor
from attnx.extract.outputs import difference, score_of
from attnx.messages import one_line
from attnx.methods import relevance
from attnx.trace.adapters.huggingface import configurations
from attnx.trace.capture import capture
from attnx.trace.structure import structure_of
from attnx.trace.trace import Trace

TOLERANCE = 1e-4  # of the largest number in a tensor
MESSAGE = 240  # characters


@dataclass(frozen=True)
class Outcome:
    """Result of trying one method.

    Attributes:
        works: True if it works, False if it raised an error or gave a wrong result, None if it does not apply.
        reason: one line; "" if it works.
    """

    works: bool | None
    reason: str = ""


def message_of(error: Exception) -> str:
    """The message of an error in one line, with the type of an error that attnx does not raise itself."""
    known = isinstance(error, (ValueError, RuntimeError)) and str(error)
    return one_line(str(error) if known else f"{type(error).__name__}: {error}", MESSAGE)


def attempt(function: Callable[[], Tensor]) -> tuple[Outcome, Tensor | None]:
    """The outcome of a function that makes maps, and the maps."""
    try:
        maps = function()
    except Exception as error:
        return Outcome(False, message_of(error)), None
    if not bool(maps.isfinite().all()):
        return Outcome(False, "its maps are not finite"), None
    return Outcome(True), maps


def try_words(trace: Trace) -> Outcome:
    """The outcome of a map of the image for each token of a text: layers from text to the patches of an image."""
    sides = trace.all_sides()
    kinds = {side.kind for pair in sides.values() for side in pair}
    if "text" not in kinds or kinds.isdisjoint(("image", "windows")):
        return Outcome(None, "it has no layers over both text and images")
    from_text = [layer for layer, (queries, keys) in sides.items() if queries.kind == "text" != keys.kind]
    outcomes = [attempt(partial(_patches, trace, layer))[0] for layer in from_text]
    nothing = Outcome(False, "no layer has queries of a text and keys of an image")
    return next((outcome for outcome in outcomes if outcome.works), outcomes[-1] if outcomes else nothing)


def _patches(trace: Trace, layer: str) -> Tensor:
    return trace.layout_of(layer).patches(trace[layer])


def try_gradients(model: nn.Module, call: Callable[[], Any]) -> tuple[Outcome, Outcome]:
    """The outcomes of maps weighted by their gradients, and of relevance."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), frozen(model), capture(model, grad=True) as trace:
            trace.backward(score_of(call()))
    except Exception as error:
        failed = Outcome(False, message_of(error))
        return failed, failed
    failures = [outcome for layer in trace if not (outcome := attempt(partial(trace.__getitem__, layer))[0]).works]
    relevant, _ = attempt(partial(relevance, trace))
    if not failures:
        return Outcome(True), relevant
    return Outcome(False, f"{len(failures)} of {len(trace)} layers: {failures[0].reason}"), relevant


def try_extractor(model: nn.Module, images: Tensor | None, kwargs: dict[str, Any], maps: Tensor | None) -> Outcome:
    """The outcome of an Extractor's rollout, compared with `maps`, the rollout of a capture."""
    if images is None:
        return Outcome(None, "its call takes more than images")

    def extract() -> Tensor:
        extractor = Extractor(model, model_kwargs=kwargs)
        extractor(images)  # makes the plan
        return extractor(images)

    outcome, extracted = attempt(extract)
    if extracted is None or maps is None:
        return outcome
    same = extracted.shape == maps.shape and difference(extracted, maps) <= TOLERANCE
    return outcome if same else Outcome(False, "its maps differ from those of a capture")


def try_attn_implementation(model: nn.Module, call: Callable[[], Any], plain: Any) -> Outcome:
    """The outcome of running a transformers model with attnx as its attention implementation."""
    if "transformers" not in sys.modules:
        return Outcome(None, "no transformers model")
    from transformers import PreTrainedModel

    from attnx.huggingface import use

    if not isinstance(model, PreTrainedModel):
        return Outcome(None, "no transformers model")
    before = [(config, config._attn_implementation_internal) for config, _ in configurations(structure_of(model))]
    try:
        with warnings.catch_warnings(record=True) as warned, torch.no_grad():
            warnings.simplefilter("always")
            use(model)
            off = difference(call(), plain)
    except Exception as error:
        return Outcome(False, message_of(error))
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
    if off > TOLERANCE:
        return Outcome(False, f"the output differs by {off:.0e} of its largest number")
    own = [str(w.message) for w in warned if str(w.message).startswith("attnx: ")]
    return Outcome(False, one_line(own[0].removeprefix("attnx: "), MESSAGE)) if own else Outcome(True)
