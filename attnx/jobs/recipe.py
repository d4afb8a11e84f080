"""Recipes: the source, the model and the storage options of a job. A recipe is JSON, so any process can load it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnx.jobs.packing import Format
from attnx.jobs.runtime import Runtime
from attnx.jobs.sources import Source, open_source
from attnx.jobs.tasks import Extract, Find, ImageTask, WordTask
from attnx.models.loaded import Loaded
from attnx.models.loading import load_model, load_word_model
from attnx.models.pixels import Pixels
from attnx.models.registry import IMAGE_MODELS
from attnx.version import MAPS_VERSION

__all__ = ["ExtractRecipe", "ProbeRecipe", "Recipe", "WordsRecipe", "recipe_of"]


@dataclass(frozen=True)
class Recipe(ABC):
    """A source, a model and the storage options. The fields match the command line options; paths are absolute."""

    source: str
    kind: str
    root: str | None
    split: str | None
    model: str
    pretrained: bool
    checkpoint: str | None
    image_size: tuple[int, int] | None
    seed: int
    method: str
    heads: str
    dtype: str
    map_dtype: str
    max_pixels: int

    def open_source(self) -> Source:
        """The source of the job."""
        return open_source(self.source, self.kind, self.root, self.split)

    def describe_source(self) -> dict[str, Any]:
        """The source's kind, path and fingerprint, for JSON."""
        fingerprint = self.open_source().fingerprint
        rows = {} if fingerprint is None else {"fingerprint": fingerprint}
        return {"kind": self.kind, "path": self.source, "root": self.root, "split": self.split, **rows}

    def describe_model(self) -> str:
        """The model's name and the origin of its weights, as text."""
        if self.checkpoint is not None:
            weights = f"weights of {self.checkpoint}"
        elif self.pretrained:
            weights = "its bundled weights" if self.model in IMAGE_MODELS else "its published weights"
        else:
            weights = f"random weights, seed {self.seed}"
        return f"{self.model} ({weights})"

    @abstractmethod
    def load(self, device: torch.device) -> Runtime:
        """The runtime: the model on a device, its preprocessing and its task."""

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON; `recipe_of` is the inverse."""
        return {"recipe": type(self).__name__, **asdict(self)}

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast dtype; None for float32."""
        dtype: torch.dtype | None = None if self.dtype == "float32" else getattr(torch, self.dtype)
        return dtype

    def _load_image_model(self, device: torch.device, kind: str | None) -> tuple[Loaded, Pixels]:
        """The model on a device, and its preprocessing of a kind; None: the model's own."""
        torch.manual_seed(self.seed)
        checkpoint = None if self.checkpoint is None else Path(self.checkpoint)
        loaded = load_model(
            self.model, pretrained=self.pretrained, checkpoint=checkpoint, image_size=_size(self.image_size)
        )
        pixels = loaded.pixels(kind or _own_pixels(loaded))
        pixels.check()
        loaded.model.to(device)
        return loaded, pixels

    def _settings(self, loaded: Loaded, pixels: Pixels) -> dict[str, Any]:
        """The settings that determine the maps of every kind of recipe."""
        return {
            "model": self.model, "weights": loaded.fingerprint(), "pixels": pixels.describe(), "method": self.method,
            "heads": self.heads, "dtype": self.dtype, "map_dtype": self.map_dtype, "max_pixels": self.max_pixels,
            "versions": _versions(),
        }  # fmt: skip


@dataclass(frozen=True)
class ExtractRecipe(Recipe):
    """A recipe for maps of images. rolling: more arguments of `attnx.rollout`; token: as in `Place.parse`."""

    pixels: str | None
    layers: list[str | int] | None
    keep: str
    compile: bool
    store: str
    rolling: dict[str, Any]
    token: str | None = None

    def load(self, device: torch.device) -> Runtime:
        """The runtime: the model on a device, its preprocessing and its task."""
        loaded, pixels = self._load_image_model(device, self.pixels)
        extract = self._extract(loaded, device)
        # The extractor's first call builds its plan and may round differently, so it gets no real image.
        shape = tuple(extract(torch.zeros(1, 3, *loaded.size, device=device)).shape[1:])
        settings = self._settings(loaded, pixels) | {
            "layers": self.layers, "keep": self.keep, "compile": self.compile, "store": self.store, **self.rolling
        }  # fmt: skip
        settings |= {} if self.token is None else {"token": self.token}
        task = ImageTask(extract, Format(self.map_dtype))
        row_bytes = math.prod(shape) * np.dtype(self.map_dtype).itemsize
        return Runtime(self, device, loaded, pixels, task, settings, row_bytes, self.store == "full", self.compile)

    def _extract(self, loaded: Loaded, device: torch.device) -> Extract:
        from attnx.extract.extractor import Extractor
        from attnx.jobs.heads import AllHeads

        if self.store != "map":
            return AllHeads(loaded.model, self.store == "full", self.layers, self.autocast, loaded.model_kwargs)
        return Extractor(
            loaded.model, self.method, layers=self.layers, heads=self.heads, keep=self.keep, compile=self.compile,
            dtype=self.autocast, model_kwargs=loaded.model_kwargs, **self.rolling, **self._token(loaded, device),
        )  # fmt: skip

    def _token(self, loaded: Loaded, device: torch.device) -> dict[str, Any]:
        """The option of the extractor's method "token", from a pass over an empty picture."""
        from attnx.extract.place import Place, layout_of_tokens
        from attnx.trace.capture import capture

        if self.token is None:
            return {}
        place = Place.parse(self.token)
        if place.index is not None:
            return {"token": place.index}
        with torch.inference_mode(), capture(loaded.model, self.layers, rows=0) as trace:
            loaded.model(torch.zeros(1, 3, *loaded.size, device=device), **loaded.model_kwargs)
        return {"token": place.token(layout_of_tokens(trace)[1], None)}


@dataclass(frozen=True)
class ProbeRecipe(Recipe):
    """A recipe for statistics of heads.

    Args:
        stats: names of the statistics; None: those that the model has.
        targets: the file of the images' classes; None: no importance of heads.
        pixels, layers, patch_size: as in `attnx.jobs.probes.HeadProbes`.
    """

    pixels: str | None
    layers: list[str | int] | None
    stats: list[str] | None
    targets: str | None
    patch_size: float | None

    def load(self, device: torch.device) -> Runtime:
        """The runtime: the model on a device, its preprocessing and its task."""
        from attnx.jobs.probes import HeadProbes, ProbeTask, Targets

        loaded, pixels = self._load_image_model(device, self.pixels)
        targets = None if self.targets is None else Targets(Path(self.targets))
        probes = HeadProbes(
            loaded.model, self.stats, targets is not None, self.layers, self.patch_size, self.autocast,
            loaded.model_kwargs,
        )  # fmt: skip
        # The first call chooses the layers.
        shape = probes(torch.zeros(1, 3, *loaded.size, device=device), torch.zeros(1, dtype=torch.int64, device=device))
        if targets is not None:
            targets.check(probes.classes)
        settings = self._settings(loaded, pixels) | {
            "stats": list(probes.names), "layers": probes.layers_of, "left_out": probes.left_out,
            "uniform": probes.uniform, "input_size": list(loaded.size),
            "targets_sha256": None if targets is None else targets.fingerprint,
        }  # fmt: skip
        task = ProbeTask(probes, Format(self.map_dtype, stats=probes.names), targets)
        return Runtime(self, device, loaded, pixels, task, settings, 4 * shape[0].numel(), tensors=False, fill=False)


@dataclass(frozen=True)
class WordsRecipe(Recipe):
    """A recipe for maps of the words of captions. layer: of ALBEF; stage: of LAVT."""

    vocab: str | None
    layer: int | None
    preset: str | None
    stage: int | None = None

    def load(self, device: torch.device) -> Runtime:
        """The runtime: the model on a device, its preprocessing and its task."""
        from attnx.extract.captions import CaptionMaps
        from attnx.extract.lavt_maps import ExpressionMaps
        from attnx.models.lavt import Lavt

        loaded, find = self.load_words(device)
        model: Any = loaded.model
        assert model.tokenizer is not None
        pixels, result = loaded.pixels("whole"), CaptionMaps
        options = {"layer": self.layer, "preset": self.preset}
        images = torch.empty(1, 3, *loaded.size)
        if isinstance(model, Lavt):
            options, result = {"stage": self.stage}, ExpressionMaps
            grid = model.grids(images)[0 if self.method == "rollout" else self.stage or 0]
        else:
            grid = model.grid(images)
        settings = self._settings(loaded, pixels) | options | {"vocab": model.tokenizer.fingerprint()}
        task = WordTask(find, model.tokenizer, result, Format(self.map_dtype, captions=True))
        # Captions have about 12 word pieces on average.
        row_bytes = 12 * math.prod(grid) * np.dtype(self.map_dtype).itemsize
        return Runtime(self, device, loaded, pixels, task, settings, row_bytes, tensors=False, fill=False)

    def load_words(self, device: torch.device) -> tuple[Loaded, Find]:
        """The model on a device, and the function that computes the maps."""
        from attnx.extract.lavt_maps import find_expressions
        from attnx.extract.word_maps import find_words
        from attnx.models.lavt import Lavt

        torch.manual_seed(self.seed)
        checkpoint, vocab = (None if path is None else Path(path) for path in (self.checkpoint, self.vocab))
        loaded = load_word_model(
            self.model, pretrained=self.pretrained, checkpoint=checkpoint, vocab=vocab,
            image_size=_size(self.image_size), preset=self.preset,
        )  # fmt: skip
        model: Any = loaded.model.to(device)
        if isinstance(model, Lavt):
            return loaded, find_expressions(model, self.method, self.stage, self.autocast)
        if self.layer is None:
            raise ValueError("layer: expected a number with ALBEF; got none")
        return loaded, find_words(model, self.method, self.layer, self.heads, self.preset, self.autocast)


def recipe_of(value: dict[str, Any] | None) -> Recipe:
    """The recipe from the JSON of `Recipe.to_json`.

    Raises:
        ValueError: `value` is not a recipe, or another version of attnx wrote it.
    """
    fields = dict(value or {})
    kind = {each.__name__: each for each in (ExtractRecipe, ProbeRecipe, WordsRecipe)}.get(fields.pop("recipe", ""))
    if kind is None:
        raise ValueError("recipe: expected a recipe of attnx extract, words or probe; the job has none")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"recipe: another version of attnx wrote it: {error}") from error


def _own_pixels(loaded: Loaded) -> str:
    """The kind of preprocessing of a job without `--pixels`."""
    return "timm" if loaded.library in ("timm", "torchvision", "open_clip") else "whole"


def _size(size: tuple[int, int] | list[int] | None) -> tuple[int, int] | None:
    """The size as a tuple: JSON turns tuples into lists."""
    return None if size is None else (size[0], size[1])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"attnx": MAPS_VERSION} | {name: version(name) for name in ("torch", "timm", "transformers", "pillow")}
