"""Comparison of a capture with the probabilities that a model's own code computes."""

import copy
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from eager_reference import eager_attentions
from torch import Tensor, nn

import attnx


def randomize(model: nn.Module) -> nn.Module:
    """The model in eval mode; every parameter has random numbers, so that a term that is left out shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("logit_scale"):  # above and below the limit of log 100
                p.copy_(torch.linspace(1.0, 5.0, p.numel()).view(p.shape))
            elif p.dim() > 1:
                p.normal_(std=0.2)
            else:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a part of the largest number (at least 1)."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max()) / max(1.0, float(want.abs().max()))


def check_capture(model: nn.Module, *inputs: Tensor, blocks: int, exact_to: float = 1e-10) -> None:
    """Compare outputs, maps and gradients of a float32 model with and without a capture; it must be restored after it.

    The identity is checked in float64. float32 and bfloat16 may be as far from it as the model's own code is, because
    cosine attention multiplies rounding errors by up to 100.
    """
    before = [set(vars(module)) for module in model.modules()]
    double = copy.deepcopy(model).double()
    exact = [x.double() for x in inputs]
    want, probabilities = plain_pass(double, exact)
    assert len(probabilities) == blocks
    got, maps = captured_pass(double, exact)
    assert len(maps) == blocks
    assert error(got, want) < exact_to
    assert max(map(error, maps, probabilities)) < 1e-6
    own, own_maps = plain_pass(model, inputs)
    ours, our_maps = captured_pass(model, inputs)
    ours_off, own_off = error(ours, want), error(own, want)
    assert ours_off <= 4 * own_off + 1e-6, (ours_off, own_off)  # which of the two is nearer depends on the processor
    ours_off, own_off = (max(map(error, maps, probabilities)) for maps in (our_maps, own_maps))
    assert ours_off <= 4 * own_off + 1e-5, (ours_off, own_off)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(captured_pass(model, inputs)[0], want) <= 2 * error(plain_pass(model, inputs)[0], want) + 0.01

    wanted = gradients(double, tensor_of(double(*exact)))
    with attnx.capture(double):
        given = gradients(double, tensor_of(double(*exact)))
    assert wanted.keys() == given.keys()
    assert max(error(given[name], wanted[name]) for name in wanted) < 10 * exact_to
    assert [set(vars(module)) for module in model.modules()] == before


@torch.no_grad()
def plain_pass(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output of the model's own code, and the probabilities of its blocks [B, H, M, N]."""
    attentions, out = eager_attentions(model, lambda: model(*inputs))
    return tensor_of(out), [attention.raw for attention in attentions]


@torch.no_grad()
def captured_pass(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output and the maps [B, H, M, N] of a captured pass, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attnx.capture(model, heads="each") as trace:
            out = tensor_of(model(*inputs))
    return out, [trace[name] for name in trace]


def load(path: Path, name: str, drop: tuple[str, ...] = ()) -> Any:
    """The module of a file of a checkout, without the import lines that name a word of `drop`."""
    lines = [line for line in path.read_text().splitlines() if not any(word in line for word in drop)]
    spec = importlib.util.spec_from_loader(name, loader=None)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's old module names
        sys.modules[name] = module  # timm registers models by their module
        exec(compile("\n".join(lines), str(path), "exec"), vars(module))
    return module
