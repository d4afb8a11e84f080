"""The attention probabilities of a model's own eager softmax, without attnx: the reference of captured maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
PASSIVE = (nn.Softmax, nn.Dropout, nn.Identity)  # these run inside of the module that attends
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_attn_heads")
# 5-D probabilities whose axis of heads is not the second: {class: axis}.
AXES = {"LocallyGroupedAttn": 2}
# Classes that call softmax once for each head, so that no axis has the heads.
ONE_HEAD_A_CALL = {"CascadedGroupAttention"}
# Classes whose softmax has one more column than keys: the sink of each head, which the class drops.
SINKS = {"GptOssAttention"}


@dataclass(frozen=True)
class Attention:
    """One softmax over the last dimension, as the model computed it.

    Args:
        name: of the innermost running module.
        kind: class of that module.
        raw: the probabilities in the model's own shape, in its autograd graph.
        dead: bool, shape of `raw` without the last dimension: rows in which every key is masked.
        axis: axis of the heads; None: the heads are folded into the first dimension, or there are none.
        heads: number of heads, as the module declares it; None: it declares none.
    """

    name: str
    kind: str
    raw: Tensor
    dead: Tensor
    axis: int | None
    heads: int | None

    def fused(self, each: Tensor, fuse: str = "mean") -> Tensor:
        """`each` (in the shape of `raw`) fused over the heads: [B, M, N], other leading dimensions folded into B."""
        if self.axis is not None:
            each = each.mean(self.axis) if fuse == "mean" else each.amax(self.axis)
        elif each.dim() == 3 and self.heads and self.heads > 1 and len(each) % self.heads == 0:
            each = each.unflatten(0, (-1, self.heads))
            each = each.mean(1) if fuse == "mean" else each.amax(1)
        return each.reshape(prod(each.shape[:-2]), *each.shape[-2:])

    def map(self) -> Tensor:
        """The mean of the probabilities over the heads: [B, M, N]."""
        return self.over_keys(self.fused(self.raw.detach()))

    def over_keys(self, each: Tensor) -> Tensor:
        """`each` without the column of the sink."""
        return each[..., :-1] if self.kind in SINKS else each

    def dead_rows(self) -> Tensor:
        """bool [B, M]: rows in which every key is masked for some head."""
        return self.fused(self.dead[..., None].double(), "max")[..., 0] > 0


def eager_maps(model: nn.Module, call: Callable[[], Any]) -> tuple[dict[str, list[Tensor]], Any]:
    """{module name: head means [B, M, N] of its softmaxes, one a call} of an eager run, and its output."""
    maps: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        found, output = eager_attentions(model, call)
    for attention in found:
        maps.setdefault(attention.name, []).append(attention.map())
    return maps, output


def eager_attentions(
    model: nn.Module, call: Callable[[], Any], keep: tuple[str, ...] = ()
) -> tuple[list[Attention], Any]:
    """Every softmax of a call in the model's eager form, in order, and the output of the call.

    Args:
        model: of timm, transformers, or any other.
        call: calls the model.
        keep: names of submodels of transformers that keep their implementation.
    """
    recorder = Recorder()
    with eager(model, keep), recorder.in_modules(model), recorder:
        output = call()
    return recorder.found, output


@contextmanager
def eager(model: nn.Module, keep: tuple[str, ...] = ()) -> Iterator[None]:
    """A context in which the blocks of timm and transformers compute their softmax themselves."""
    flags = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    switches = [(c, c._attn_implementation_internal) for c in configs(model, keep)]
    fast = torch.backends.mha.get_fastpath_enabled()
    before = [m.fused_attn for m in flags]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in flags:
            module.fused_attn = False
        for config, _ in switches:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in zip(flags, before, strict=True):
            module.fused_attn = flag
        for config, implementation in switches:
            config._attn_implementation_internal = implementation


def configs(model: nn.Module, keep: tuple[str, ...] = ()) -> list[Any]:
    """Every configuration of transformers in a model, each once, and the configurations inside."""
    kept = {id(getattr(model.get_submodule(name), "config", None)) for name in keep}
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if not hasattr(config, "_attn_implementation_internal") or id(config) in found or id(config) in kept:
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


class Recorder(TorchFunctionMode):
    """Records every softmax over the last dimension, with the module that was running."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attention] = []
        self.running: list[tuple[str, nn.Module]] = []

    @contextmanager
    def in_modules(self, model: nn.Module) -> Iterator[None]:
        """A context in which hooks note which module is running."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if isinstance(module, PASSIVE):
                    continue
                enter = module.register_forward_pre_hook(lambda m, _, name=name: self.running.append((name, m)))
                leave = module.register_forward_hook(lambda *_: self.running.pop() and None)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Its own mode is off inside of a function that it handles.
            with mock.patch.object(F, "softmax", self.softmax):
                return func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
        if func in SOFTMAX:
            return self.softmax(*args, func=func, **kwargs)
        return func(*args, **kwargs)

    def softmax(self, x: Tensor, *args: Any, func: Any = torch.softmax, **kwargs: Any) -> Tensor:
        """The softmax of `x`, noted if it is over the last dimension."""
        p = func(x, *args, **kwargs)
        dim = kwargs.get("dim", args[0] if args else None)
        if dim in (-1, x.dim() - 1) and x.dim() >= 3:
            self.note(p, x)
        return p

    def sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The output of F.scaled_dot_product_attention by an explicit softmax in float64, which is noted."""
        assert dropout_p == 0
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if attn_mask is not None:
            bool_mask = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if bool_mask else scores + attn_mask.double()
        p = scores.softmax(-1)
        self.note(p, scores)
        return (p.nan_to_num(0.0) @ v.double()).to(q.dtype)

    def note(self, p: Tensor, scores: Tensor) -> None:
        """Add probabilities to `found`."""
        name, module = self.running[-1]
        heads = None if type(module).__name__ in ONE_HEAD_A_CALL else declared_heads(module)
        axis = None
        if p.dim() == 4:
            axis = 1
        elif p.dim() > 4:
            axis = AXES.get(type(module).__name__, 1)
            assert heads is None or p.shape[axis] == heads, (name, p.shape, heads)
        dead = scores.detach().amax(-1) < -1e30 if scores.numel() else scores[..., 0] > 0
        self.found.append(Attention(name, type(module).__name__, p, dead, axis, heads))


def declared_heads(module: nn.Module) -> int | None:
    """The number of heads that a module, or its configuration, declares."""
    for holder in (module, getattr(module, "config", None)):
        for attribute in HEADS:
            number = getattr(holder, attribute, None)
            if isinstance(number, int):
                return number
    return None
