"""Messages for layers that a capture did not intercept."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import fx

from attnx.trace.adapters import unfused_blocks
from attnx.trace.layers import attention_layers, matches

if TYPE_CHECKING:
    from attnx.trace.interceptor import Interceptor

_NEVER = "it did not call F.scaled_dot_product_attention, and none of its softmaxes multiplied values"
_ADVICE = (
    "no adapter covers these blocks: call F.scaled_dot_product_attention or attnx.attention in them, use the model's "
    "own maps (output_attentions=True), or write an adapter (docs/adding-a-model.md)"
)


def missing_layers(interceptor: "Interceptor", missing: Sequence[str], intercepted: Sequence[str]) -> str:
    """Error message for requested layers that were not intercepted.

    Args:
        interceptor: of the capture.
        missing: the requested names or patterns.
        intercepted: names of the layers that were intercepted.
    """
    unfused = unfused_blocks(interceptor.model)
    reasons = "; ".join(f"{pattern}: {_reason(interceptor, pattern, unfused)}" for pattern in missing)
    return f"not intercepted: {reasons}; intercepted: {', '.join(intercepted) or f'nothing; {_ADVICE}'}"


def unintercepted_layers(interceptor: "Interceptor", intercepted: Collection[str]) -> str | None:
    """Warning message for attention layers that were not intercepted; None if every layer was."""
    reasons = unintercepted(interceptor, intercepted)
    if not reasons:
        return None
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    details = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    return f"attnx: attention layers that were not intercepted, so the trace has no maps of them: {details}"


def unintercepted(interceptor: "Interceptor", intercepted: Collection[str]) -> dict[str, str]:
    """{layer: reason} of the attention layers that were not intercepted."""
    names = dict.fromkeys([*interceptor.trace.tokens.attending, *interceptor.skipped])
    # A layer that attends several times may have a map of only some of its calls.
    missing = [name for name in names if name not in intercepted or name in interceptor.skipped]
    unfused = unfused_blocks(interceptor.model) if missing else {}
    return {name: _reason(interceptor, name, unfused) for name in missing}


def own_weights(interceptor: "Interceptor") -> str:
    """Warning message for layers that compute their softmax themselves, which takes memory."""
    names = sorted(interceptor.explicit)
    which = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"
    model = type(interceptor.model).__name__
    return (
        f"attnx: {model} computes the softmax of {which} itself, so the model holds the weights of all heads, "
        "[B, H, M, N]; attnx adds only the map"
    )


def nothing_captured(interceptor: "Interceptor") -> str:
    """Error message for a model that ran without an attention call that could be captured."""
    return f"nothing was captured: {type(interceptor.model).__name__} ran, but {_nothing_reason(interceptor)}"


def _nothing_reason(interceptor: "Interceptor") -> str:
    model, skipped = interceptor.model, interceptor.skipped
    if skipped:
        name, reason = next(iter(skipped.items()))
        others = f"; {len(skipped) - 1} other layers have no map either" if len(skipped) > 1 else ""
        return f"no map can be made of {name or 'the model itself'}: {reason}{others}"
    if isinstance(model, fx.GraphModule) and "scaled_dot_product_attention" in model.code:
        return (
            "its graph calls attention by torch.ops.aten, which can't be intercepted: capture the model that the graph "
            "was made from"
        )
    layers, unfused = attention_layers(model), unfused_blocks(model)
    reasons = dict.fromkeys(_reason(interceptor, name, unfused) for name in layers)
    details = "; ".join(reason for reason in reasons if reason != _NEVER)
    names = ", ".join(layers) or "none"
    return (
        "it did not call F.scaled_dot_product_attention, and none of its softmaxes is attention; its attention "
        f"modules: {names}; {f'{details}; {_ADVICE}' if details else _ADVICE}"
    )


def _reason(interceptor: "Interceptor", pattern: str, unfused: dict[str, str]) -> str:
    """Reason that a layer has no map in the trace.

    Args:
        interceptor: of the capture.
        pattern: name or pattern of the layer.
        unfused: {module name: reason}, as from `unfused_blocks`.
    """
    earlier = [call for name, call in interceptor.before.items() if matches(pattern, name)]
    if earlier and max(earlier) < interceptor.calls - 1:
        return (
            f"it attended in call {max(earlier) + 1} of {interceptor.calls}, and not in the last; "
            "calls='all' keeps the maps of every call"
        )
    for name, reason in interceptor.skipped.items():
        if matches(pattern, name) or matches(name, pattern):
            return reason
    around = [name for name in unfused if not name or pattern == name or pattern.startswith(name + ".")]
    return unfused[max(around, key=len)] if around else _NEVER
