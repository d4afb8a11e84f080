"""What the maps of a job are made with, as JSON, so that any process on any machine can make them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.jobs.decoding import Decode, Decoders
from attnx.jobs.packing import Format
from attnx.jobs.pixels import Pixels
from attnx.jobs.sources import Source, open_source
from attnx.jobs.worker import Extract, Worker

if TYPE_CHECKING:
    import torch

    from attnx.jobs.job import Job
    from attnx.models.loading import Loaded

__all__ = ["Recipe", "Running", "Tools"]

_FEW = 64


@dataclass(frozen=True)
class Running:
    """How a job runs, which no map depends on, but for the batch size where a sum's order does.

    batch_size: images at a time; workers: processes that decode, see `Decoders`; timeout: seconds for an image.
    """

    batch_size: int = 16
    workers: int | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class Recipe:
    """A source, a model and a method. Fields are as the options of `attnx extract`, paths absolute.

    rolling: further arguments of `attnx.rollout`.
    """

    source: str
    kind: str
    root: str | None
    split: str | None
    model: str
    pretrained: bool
    checkpoint: str | None
    image_size: tuple[int, int] | None
    seed: int
    pixels: str | None
    method: str
    layers: list[str | int] | None
    heads: str
    keep: str
    dtype: str
    compile: bool
    rolling: dict[str, Any]
    map_dtype: str
    store: str
    max_pixels: int

    def open_source(self) -> Source:
        """The source."""
        root = None if self.root is None else Path(self.root)
        return open_source(Path(self.source), self.kind, root, self.split)

    def describe_source(self) -> dict[str, Any]:
        """Which source it is, for JSON."""
        return {"kind": self.kind, "path": self.source, "root": self.root, "split": self.split}

    def load(self, device: torch.device) -> Tools:
        """The model, on a device, and what it needs."""
        import torch

        from attnx.models.loading import load_model

        torch.manual_seed(self.seed)
        loaded = load_model(
            self.model,
            pretrained=self.pretrained,
            checkpoint=None if self.checkpoint is None else Path(self.checkpoint),
            image_size=None if self.image_size is None else (self.image_size[0], self.image_size[1]),
        )
        pixels = _pixels(loaded, self.pixels)
        loaded.model.to(device)
        extract = self._extract(loaded)
        # The extractor's first call makes its plan in another way, which may round otherwise: it is no image's.
        shape = tuple(extract(torch.zeros(1, 3, *loaded.size, device=device)).shape[1:])
        return Tools(self, loaded, pixels, extract, device, shape)

    def _extract(self, loaded: Loaded) -> Extract:
        import torch

        from attnx.extractor import Extractor
        from attnx.jobs.heads import EveryHead

        dtype = None if self.dtype == "float32" else getattr(torch, self.dtype)
        if self.store != "map":
            return EveryHead(loaded.model, self.store == "full", self.layers, dtype, loaded.model_kwargs)
        return Extractor(
            loaded.model, self.method, layers=self.layers, heads=self.heads, keep=self.keep, compile=self.compile,
            dtype=dtype, model_kwargs=loaded.model_kwargs, **self.rolling,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Recipe:
        """Of `to_json`."""
        return cls(**value)


@dataclass(frozen=True)
class Tools:
    """A recipe's, on a device. shape: of a map."""

    recipe: Recipe
    loaded: Loaded
    pixels: Pixels
    extract: Extract
    device: torch.device
    shape: tuple[int, ...]

    def settings(self) -> dict[str, Any]:
        """All that decides the maps, for JSON."""
        recipe = self.recipe
        return {
            "model": recipe.model, "weights": self.loaded.fingerprint(), "pixels": self.pixels.describe(),
            "method": recipe.method, "layers": recipe.layers, "heads": recipe.heads, "keep": recipe.keep,
            "dtype": recipe.dtype, "compile": recipe.compile, **recipe.rolling, "map_dtype": recipe.map_dtype,
            "store": recipe.store,
            "max_pixels": recipe.max_pixels, "versions": _versions(),
        }  # fmt: skip

    @property
    def row_bytes(self) -> int:
        """Of a map as it is stored."""
        return math.prod(self.shape) * np.dtype(self.recipe.map_dtype).itemsize

    @contextlib.contextmanager
    def worker(self, job: Job, running: Running, say: Callable[[str], None] = print) -> Iterator[Worker]:
        """What makes the shards of a job. Processes decode from 64 rows on: a smaller job is done before they start."""
        workers = 0 if running.workers is None and job.rows < _FEW else running.workers
        recipe = self.recipe
        decode = Decode(recipe.open_source().reader(), self.pixels, recipe.max_pixels)
        with (
            Decoders(decode, workers, running.timeout) as decoders,
            Worker(
                job, decoders, self.pixels, self.extract, self.device, running.batch_size, Format(recipe.map_dtype),
                recipe.store, say,
            ) as worker,
        ):  # fmt: skip
            yield worker


def _pixels(loaded: Loaded, kind: str | None) -> Pixels:
    of, _, name = loaded.name.partition(":")
    return Pixels(
        kind=kind or ("timm" if of == "timm" else "whole"),
        size=(int(loaded.size[0]), int(loaded.size[1])),
        mean=tuple(map(float, loaded.mean)),
        std=tuple(map(float, loaded.std)),
        interpolation=loaded.interpolation,
        crop_pct=loaded.crop_pct,
        crop_mode=loaded.crop_mode,
        processor=name if of == "hf" else None,
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from attnx import __version__

    return {"attnx": __version__} | {name: version(name) for name in ("torch", "timm", "transformers", "pillow")}
