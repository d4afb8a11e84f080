"""Statistics of heads as a batch job: the task of `attnx probe`, and the targets of its images."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.files import open_regular
from attnx.jobs.columns import MapRow
from attnx.jobs.packing import Format
from attnx.jobs.sources import Entry
from attnx.jobs.tasks import fetch
from attnx.methods.probes import head_means, layer_means, pixels_of, uniform_means
from attnx.ops.statistics import NAMES
from attnx.trace.capture import capture
from attnx.trace.layers import Layers
from attnx.trace.row_stats import RowStats
from attnx.trace.trace import Trace

__all__ = ["HeadProbes", "ProbeTask", "Targets"]


class Targets:
    """The classes of images, from a CSV file with the columns key and target.

    Attributes:
        of: {key: class}.
        fingerprint: SHA-256 of the file.

    Raises:
        ValueError: the file has other columns, a repeated key, or a target that is no whole number.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open_regular(path) as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"targets: expected a CSV file; got {path}: {error.strerror or error}") from error
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.of: dict[str, int] = {}
        try:
            rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
            names = list(rows.fieldnames or ())
            if not {"key", "target"} <= set(names):
                raise ValueError(
                    f"targets: expected the columns 'key' and 'target' in {path}; got "
                    + (", ".join(map(repr, names)) or "none")
                )
            for row in rows:
                key, target = row["key"], row["target"] or ""
                if not target.strip().isdecimal() or len(target) > 9:
                    raise ValueError(
                        f"targets: expected the number of a class, from 0 on, in line {rows.line_num} of {path}; got "
                        f"{target[:80]!r}"
                    )
                if not key or None in row:
                    raise ValueError(
                        f"targets: expected a key, and no more columns than names, in line {rows.line_num}"
                    )
                key = key.removeprefix("./")
                if key in self.of:
                    raise ValueError(f"targets: expected every key once; {key[:200]!r} is repeated")
                self.of[key] = int(target)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"targets: expected a CSV file in UTF-8; {path}: {error}") from error

    def check(self, classes: int) -> None:
        """Raise ValueError if a target is not below the number of classes."""
        wrong = next((key for key, target in self.of.items() if target >= classes), None)
        if wrong is not None:
            raise ValueError(f"targets: expected classes in 0..{classes - 1}; got {self.of[wrong]} for {wrong[:200]!r}")

    def check_keys(self, keys: Sequence[str]) -> None:
        """Raise ValueError if none of the keys of images has a target."""
        if keys and self.of.keys().isdisjoint(keys):
            first = repr(next(iter(self.of))[:200]) if self.of else "none"
            raise ValueError(f"targets: expected keys of images, such as {keys[0][:200]!r}; got {first}")


class HeadProbes:
    """The mean statistics of the heads of all layers: `HeadProbes(model)(images)` -> [B, S, T].

    The first image chooses the layers: with layers=None, those that have all of the statistics.

    Args:
        stats: names among those of `attnx.attention_stats`; None: those that some layer has.
        importance: also compute "importance", of the cross entropy of the model's logits and the targets. The model's
            parameters then need no gradients any more.
        patch_size: as in `attnx.mean_attention_distance`.
        layers, model_kwargs, dtype: see `attnx.Extractor`.

    Attributes:
        names: the statistics.
        layers_of: {layer: {"heads": ..., "queries": ..., "keys": ..., "prefix": ..., "grid": ..., "patch_size": ...}};
            what is not known is None.
        uniform: {statistic: its value in each layer for heads that attend to all keys alike}.
        left_out: {layer: reason} of layers without one of the statistics.
        classes: number of classes of the logits; 0 without importance.

    Raises:
        ValueError: no layer has all of the statistics, or a requested one does not; the model gives no logits.
    """

    def __init__(
        self,
        model: nn.Module,
        stats: Sequence[str] | None = None,
        importance: bool = False,
        layers: Layers = None,
        patch_size: float | None = None,
        dtype: torch.dtype | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False) if importance else model
        self.names = (*(stats or NAMES), *(("importance",) if importance else ()))
        self.all_stats = stats is None
        self.importance = importance
        self.layers = layers
        self.patch_size = patch_size
        self.dtype = dtype
        self.model_kwargs = model_kwargs or {}
        self.layers_of: dict[str, dict[str, Any]] = {}
        self.uniform: dict[str, list[float]] = {}
        self.left_out: dict[str, str] = {}
        self.classes = 0

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, 3, height, width] on the model's device, and [B] classes -> float32 [B, S, T], see `head_means`."""
        with torch.inference_mode(not self.importance):
            trace, means = self._pass(images, targets)
            if not self.layers_of:
                self._choose(trace, means)
            layers = list(self.layers_of)
            found = torch.cat([means[layer] for layer in layers], 2)
            if not self.importance:
                return found
            return torch.cat([found, head_means(trace.select(layers), ["importance"])], 1)

    def _pass(self, images: Tensor, targets: Tensor | None) -> tuple[Trace, dict[str, Tensor]]:
        """The trace of a pass of the model, and {layer: means [B, S, H]} of the statistics that the layer has.

        The means are taken as the statistics come, so that the rows of one layer are in memory at a time.
        """
        means: dict[str, Tensor] = {}

        def reduce(layer: str, stats: RowStats) -> None:
            if stats:
                means[layer] = layer_means(trace, layer, list(stats), self.patch_size)
                stats.clear()

        with (
            torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None),
            torch.enable_grad() if self.importance else nullcontext(),
            capture(self.model, self.layers, keep="stats", stats=self.names, grad=self.importance) as trace,
        ):
            trace.on_stats = reduce
            out = self.model(images, **self.model_kwargs)
        if self.importance:
            assert targets is not None
            logits = _logits(out, len(images))
            self.classes = logits.shape[1]
            trace.backward(F.cross_entropy(logits, targets, reduction="sum"))
        return trace, means

    def _choose(self, trace: Trace, means: dict[str, Tensor]) -> None:
        """Choose the statistics, and the layers that have all of them, after the first pass."""
        missing = {layer: dict(trace.stats[layer].missing) for layer in trace}
        if self.all_stats:
            # Those that every layer lacks are not wanted.
            none = set.intersection(*(set(reasons) for reasons in missing.values())) - {"importance"}
            self.names = tuple(name for name in self.names if name not in none)
            missing = {
                layer: {name: why for name, why in reasons.items() if name not in none}
                for layer, reasons in missing.items()
            }
        self.left_out = {layer: next(iter(reasons.values())) for layer, reasons in missing.items() if reasons}
        chosen = [layer for layer in trace if layer not in self.left_out]
        if not chosen or (self.left_out and self.layers is not None):
            raise ValueError(f"stats: {next(iter(self.left_out.values()))}; choose others by --stat or layers=")
        trace = trace.select(chosen)
        self.layers_of = {layer: self._about(trace, layer, means[layer].shape[2]) for layer in chosen}
        uniform = uniform_means(trace, self.names, self.patch_size).tolist()
        self.uniform = {name: found for name, found in zip(self.names, uniform, strict=True) if name != "importance"}

    def _about(self, trace: Trace, layer: str, heads: int) -> dict[str, Any]:
        queries, keys = trace.sides(layer)
        pixels = self.patch_size
        if pixels is None and "distance" in self.names:
            pixels = pixels_of(trace, layer)
        size = dict(heads=heads, queries=trace.kept(layer).shape[-2], keys=trace.kept(layer).shape[-1])
        return size | dict(prefix=keys.prefix, grid=queries.grid, patch_size=pixels)


def _logits(out: Any, count: int) -> Tensor:
    """The logits [B, classes] of a model's output."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        came = f"{list(logits.shape)}" if isinstance(logits, Tensor) else type(out).__name__
        raise ValueError(f"targets: expected a model that gives logits [{count}, classes]; got {came}")
    return logits.float()


@dataclass(frozen=True)
class ProbeTask:
    """The statistics of the heads for every image.

    Args:
        probes: computes them.
        format: its `stats` are those of `probes`.
        targets: of the images; None without importance.
    """

    probes: HeadProbes
    format: Format
    targets: Targets | None = None

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """Groups of one entry each."""
        return [[entry] for entry in entries]

    def start(self, images: Tensor, groups: list[list[Entry]]) -> Callable[[], list[MapRow]]:
        """Start the computation and the copy to the CPU. An image without a target becomes a row with an error."""
        keys = [group[0].key for group in groups]
        errors = [self._error(key) for key in keys]
        targets = None
        if self.targets is not None:
            classes = [0 if error else self.targets.of[key] for key, error in zip(keys, errors, strict=True)]
            targets = torch.tensor(classes, device=images.device)
        wait = fetch(self.probes(images, targets))

        def rows() -> list[MapRow]:
            return [
                MapRow(key, error=error) if error else MapRow(key, **dict(zip(self.probes.names, values, strict=True)))
                for key, error, values in zip(keys, errors, wait(), strict=True)
            ]

        return rows

    def _error(self, key: str) -> str | None:
        if self.targets is None:
            return None
        target = self.targets.of.get(key)
        return "target: expected one in the file of --targets; got none" if target is None else None
