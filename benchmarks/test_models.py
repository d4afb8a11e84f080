"""Whole models: images to an all-layer rollout, beside the model's plain forward pass. The rollouts must agree first."""

import copy
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
    metafunc.parametrize(("case", "name"), pairs, indirect=["case"], ids=map("-".join, pairs), scope="module")


class Case:
    """A model, its images, and the rollout that whole matrices in fp32 give."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = models.build(name).to(device)
        images = models.images(name, device)
        self.peer = models.SPECS[name].contestants[-1]
        self.reference = self._rollout(self.peer, model, images)
        self.disagreement = {"plain": 0.0, self.peer: 0.0}
        for other in models.SPECS[name].contestants[1:-1]:
            self.disagreement[other] = self.error(self._rollout(other, model, images))
        self.model = model.to(self.dtype)
        self.images = images.to(self.dtype)
        self.peer_error = self.error(self._rollout(self.peer, self.model, self.images))

    def error(self, rollout: Tensor) -> float:
        """Largest difference from the reference, as a share of its largest entry."""
        assert rollout.shape == self.reference.shape, f"{list(rollout.shape)}; expected {list(self.reference.shape)}"
        return float((rollout.float() - self.reference).abs().max() / self.reference.max())

    def call(self, contestant: str) -> peers.Rollout:
        """The contestant with a copy of the model that it may change."""
        return peers.MODELS[contestant](copy.deepcopy(self.model))

    @staticmethod
    def _rollout(contestant: str, model: nn.Module, images: Tensor) -> Tensor:
        with torch.inference_mode():
            result = peers.MODELS[contestant](copy.deepcopy(model))(images)
        assert result is not None
        return result.float()


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, device: str) -> Case:
    return Case(request.param, device)


@pytest.mark.benchmark(group="models", timer=CLOCK)
@pytest.mark.timeout(1200)
def test_rollout(benchmark: Any, case: Case, name: str, quick: bool) -> None:
    disagreement = case.disagreement[name]
    assert disagreement <= AGREEMENT, f"{name}: off by {disagreement:.1e} of {case.peer}'s largest; both in fp32"

    call = case.call(name)
    with torch.inference_mode():
        rollout = call(case.images)
    error = None if rollout is None else case.error(rollout)
    if error is not None and name != case.peer:
        budget = 2 * case.peer_error + max(AGREEMENT, torch.finfo(case.dtype).eps)
        assert error <= budget, f"{name}: off by {error:.1e}; expected at most {budget:.1e} in {case.dtype}"

    contestant = wall_timer(call, [(case.images,)])
    floor = wall_timer(case.call("plain"), [(case.images,)])
    benchmark.extra_info.update(
        shape=f"{case.name} b{len(case.images)}",
        dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype],
        contestant=name,
        timing="wall",
        max_error=error,
        peak_mb=cuda_peak_mb(call, (case.images,)),
    )
    race(benchmark, contestant, floor, quick)
