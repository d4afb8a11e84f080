"""Whole models: from images to a rollout over all layers. Each rollout is checked before it is timed."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import exact
from benchmarks.peers import networks as models
from benchmarks.peers import rollouts
from benchmarks.suites import memory
from benchmarks.timing import CLOCK, race, try_to, wall_timer

KIND = {"cls": "cls"}  # all other contestants compute a rollout
AGREEMENT = 1e-4  # maximum error in fp32, as a share of the exact rollout's largest entry
FP32_BYTES = 4 << 30  # on a GPU, models with more attention weights are checked only in the timed dtype


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = metafunc.config.getoption("--device"), metafunc.config.getoption("--quick")
    runs = models.RUNS["quick" if quick else device]
    dtype = "bf16" if device == "cuda" else "fp32"
    # CUDA graphs only on a GPU.
    left_out = () if device == "cuda" else ("extractor_graph",)
    pairs = [(run, name) for run in runs for name in models.SPECS[run.model].contestants if name not in left_out]
    metafunc.parametrize(("run", "name"), pairs, ids=[f"{run} {dtype} {name}" for run, name in pairs])


class Case:
    """A model and its images in fp32 and in the timed dtype, with the exact rollout and class token's map."""

    def __init__(self, run: models.Run, device: str) -> None:
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        images = models.images(run.model, device, run.batch)
        model = models.build(run.model).to(device)
        self.images = {torch.float32: images}
        self.models = {torch.float32: model}
        if self.dtype != torch.float32:
            self.images[self.dtype] = images.to(self.dtype)
            self.models[self.dtype] = copy.deepcopy(model).to(self.dtype)
        layers = exact.layers_of(model, images)
        self.weight_bytes = 4 * sum(x.q.shape[:3].numel() * x.k.shape[2] for x in layers)  # in fp32
        with torch.inference_mode():
            self.reference = {"rollout": exact.rollout(layers), "cls": exact.cls_row(layers[-1])}
            self.tokens = layers[0].q.shape[2]
            del layers
        # The error from rounded weights and activations alone, which every contestant has.
        self.rounding = dict.fromkeys(self.reference, 0.0) if self.dtype == torch.float32 else self._rounding()

    def call(self, contestant: str, dtype: torch.dtype) -> rollouts.Rollout:
        """The contestant with its own copy of the model."""
        model: nn.Module = copy.deepcopy(self.models[dtype])
        return rollouts.CONTESTANTS[contestant](model)

    def error(self, contestant: str, dtype: torch.dtype) -> float:
        """Largest difference from the exact rollout (or class token's map), as a share of its largest entry."""
        with torch.inference_mode():
            result = self.call(contestant, dtype)(self.images[dtype])
        assert result is not None, f"{contestant}: expected a rollout; got none"
        return self._distance(result, KIND.get(contestant, "rollout"))

    def _rounding(self) -> dict[str, float]:
        with torch.inference_mode():
            layers = exact.layers_of(self.models[self.dtype], self.images[self.dtype])
            rollout, row = exact.rollout(layers), exact.cls_row(layers[-1])
            return {"rollout": self._distance(rollout, "rollout"), "cls": self._distance(row, "cls")}

    def _distance(self, result: Tensor, kind: str) -> float:
        reference = self.reference[kind]
        assert result.shape == reference.shape, f"{list(result.shape)}; expected {list(reference.shape)}"
        return float((result.double() - reference).abs().max() / reference.max())


_case = lru_cache(maxsize=1)(Case)


@pytest.mark.benchmark(group="models", timer=CLOCK)
def test_rollout(benchmark: Any, run: models.Run, name: str, device: str, quick: bool, record: Any) -> None:
    found = try_to(lambda: _measure(benchmark, run, name, device, quick))
    record.measured(f"{name}, {run}", found, suite="models", shape=str(run), contestant=name)


def _measure(benchmark: Any, run: models.Run, name: str, device: str, quick: bool) -> dict[str, Any]:
    case = _case(run, device)
    images = case.images[case.dtype]
    error = None if name == "plain" else _checked_error(case, name, device)
    call = case.call(name, case.dtype)
    floor = wall_timer(case.call("plain", case.dtype), [(images,)])
    peak = memory.cuda_peak_mb(call, (images,))
    times = race(wall_timer(call, [(images,)]), floor, 8.0 if device == "cpu" else 2.0, quick, benchmark)
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]
    return dict(dtype=dtype, timing="wall", **times, peak_mb=peak, max_error=error, tokens=case.tokens)


def _checked_error(case: Case, name: str, device: str) -> float:
    """The contestant's error in the timed dtype, after a check in fp32."""
    if device == "cpu" or case.weight_bytes <= FP32_BYTES:
        error = case.error(name, torch.float32)
        assert error <= AGREEMENT, f"{name}: in fp32 off by {error:.1e} of the largest entry"
    if case.dtype == torch.float32:
        return error
    error, budget = (
        case.error(name, case.dtype),
        2 * case.rounding[KIND.get(name, "rollout")] + torch.finfo(case.dtype).eps,
    )
    # Eager attention also rounds its weights to the dtype, so it has a larger error.
    assert error <= budget or name in rollouts.EAGER, f"{name}: off by {error:.1e}; expected at most {budget:.1e}"
    return error
