"""Capture never changes a model: every family of timm, torch, torchvision, open_clip and transformers, one by one."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import families_hf
import families_timm
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import attnx

BUDGET = 1e-4  # of the largest number in an output
FAMILIES: dict[str, Any] = {family.name: family for family in (*families_timm.FAMILIES, *families_hf.FAMILIES)}
# Families without a map: the weights of their softmax multiply no matrix of values. The error says so.
UNFUSED = {"timm mobilevitv2"}

# The default run takes every sixteenth family; the whole file takes minutes.
FEW = set(list(FAMILIES)[::16])
EACH = [pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in FAMILIES]

# Which families have SDPA changes with the versions of transformers and timm.
NEWEST = Version(version("transformers")) >= Version("5.24") and Version(version("timm")) >= Version("1.0.31")


def tensors(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in an output, at any level of nesting."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)


def built(name: str) -> tuple[nn.Module, Callable[[], Any], Tensor | None]:
    """The model, its call, and its images if they are the only argument of the call."""
    family = FAMILIES[name]
    if getattr(family, "needs", None):
        pytest.importorskip(family.needs)
    model, given = family.build()
    if isinstance(given, dict):
        return model, lambda: model(**given), next(iter(given.values())) if family.images_only else None
    return model, lambda: model(*given), given[0] if family.images_only else None


def assert_same(got: Any, want: Any, budget: float = BUDGET) -> None:
    if isinstance(want, dict):
        got = {key: got[key] for key in want}
    pairs = list(zip(tensors(got), tensors(want), strict=True))
    assert pairs
    for a, b in pairs:
        finite = b.isfinite()
        assert torch.equal(finite, a.isfinite())
        largest = b[finite].abs().max().clamp(min=1e-6) if finite.any() else 1.0
        assert float(((a - b)[finite].abs().max() if finite.any() else a.new_zeros(())) / largest) <= budget


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EACH)
def test_a_capture_leaves_the_output(name: str) -> None:
    model, call, images = built(name)
    with torch.no_grad():
        plain = call()
        captured = True
        try:
            with attnx.capture(model):
                assert_same(call(), plain)
        except RuntimeError as error:
            captured = False
            why = str(error)
            assert why.startswith("nothing was captured")
        assert captured == (name not in UNFUSED) or not NEWEST
        handle = attnx.patch(model)
        assert_same(call(), plain)
        handle.remove()
        assert_same(call(), plain)
        if images is not None and captured:
            for method in ("rollout", "cls"):
                # Many families have none. The model must be restored in this case, too.
                with suppress(ValueError, RuntimeError):
                    attnx.Extractor(model, method=method)(images)
                assert_same(call(), plain)
    if FAMILIES[name].classes and images is not None and captured:
        with suppress(ValueError):
            attnx.class_maps(model, images, [1])
        with torch.no_grad():
            assert_same(call(), plain)
