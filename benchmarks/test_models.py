"""Whole models: images to an all-layer rollout, beside the plain forward pass. The rollouts must agree first."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import models, peers
from benchmarks.timing import CLOCK, cuda_peak_mb, race, wall_timer

AGREEMENT = 1e-4  # of the reference's largest entry, in fp32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = models.QUICK if metafunc.config.getoption("--quick") else models.FULL
    pairs = [(model, name) for model in names for name in models.SPECS[model].contestants]
    metafunc.parametrize(("model", "name"), pairs, ids=map("-".join, pairs))


class Case:
    """A model, its images, and the rollout that its peer makes of whole fp32 matrices."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.peer = models.SPECS[name].contestants[-1]
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.images = {torch.float32: models.images(name, device)}
        self.models = {torch.float32: models.build(name).to(device)}
        self.images[self.dtype] = self.images[torch.float32].to(self.dtype)
        self.models[self.dtype] = copy.deepcopy(self.models[torch.float32]).to(self.dtype)
        self.reference = self._rollout(self.peer, torch.float32)
        self.peer_error = 0.0 if self.dtype == torch.float32 else self.error(self.peer, self.dtype)

    def call(self, contestant: str, dtype: torch.dtype) -> peers.Rollout:
        """The contestant with a copy of the model that it may change."""
        model: nn.Module = copy.deepcopy(self.models[dtype])
        return peers.MODELS[contestant](model)

    def error(self, contestant: str, dtype: torch.dtype) -> float:
        """Largest difference from the reference, as a share of its largest entry."""
        rollout = self._rollout(contestant, dtype)
        assert rollout.shape == self.reference.shape, f"{list(rollout.shape)}; expected {list(self.reference.shape)}"
        return float((rollout.float() - self.reference).abs().max() / self.reference.max())

    def _rollout(self, contestant: str, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode():
            result = self.call(contestant, dtype)(self.images[dtype])
        assert result is not None, f"{contestant}: expected a rollout; got none"
        return result


_case = lru_cache(maxsize=1)(Case)


@pytest.mark.benchmark(group="models", timer=CLOCK)
@pytest.mark.timeout(1200)
def test_rollout(benchmark: Any, model: str, name: str, device: str, quick: bool) -> None:
    case = _case(model, device)
    images = case.images[case.dtype]
    error = None if name == "plain" else _checked_error(case, name)

    call = case.call(name, case.dtype)
    benchmark.extra_info.update(
        shape=f"{model} b{len(images)}",
        dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype],
        contestant=name,
        timing="wall",
        max_error=error,
        peak_mb=cuda_peak_mb(call, (images,)),
    )
    floor = wall_timer(case.call("plain", case.dtype), [(images,)])
    race(benchmark, wall_timer(call, [(images,)]), floor, quick)


def _checked_error(case: Case, name: str) -> float:
    """The contestant's error in the dtype that is timed, once it agrees with the peer in fp32."""
    if name == case.peer:
        return case.peer_error
    error = case.error(name, torch.float32)
    assert error <= AGREEMENT, f"{name}: in fp32 off by {error:.1e} of the largest entry that {case.peer} gives"
    if case.dtype == torch.float32:
        return error
    error, budget = case.error(name, case.dtype), 2 * case.peer_error + torch.finfo(case.dtype).eps
    assert error <= budget, f"{name}: off by {error:.1e} in {case.dtype}; expected at most {budget:.1e}"
    return error
