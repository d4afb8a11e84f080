"""Tasks of a job: a map of every image, or a map of every word piece of each caption."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch

from attnx.jobs.columns import MapRow
from attnx.jobs.packing import Format
from attnx.jobs.sources import Entry

if TYPE_CHECKING:
    from attnx.extract.captions import CaptionMaps
    from attnx.models.tokenizer import Tokenizer

__all__ = ["Extract", "Find", "ImageTask", "Task", "WordTask", "fetch"]

Extract: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Find: TypeAlias = "Callable[[torch.Tensor, list[list[str]]], Sequence[CaptionMaps]]"


class Task(Protocol):
    """Computes maps of entries and their images."""

    @property
    def format(self) -> Format:
        """The format of the rows."""

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """The entries in order, grouped by image."""

    def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[MapRow]]:
        """Start with images [I, 3, h, w], one per group. The returned function waits, and returns the rows of all
        entries in order, without what the worker adds: the caption and the picture's size.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
        """


@dataclass(frozen=True)
class ImageTask:
    """A map of every image. extract: [B, 3, h, w] float32 -> [B, ...] float maps, on any device."""

    extract: Extract
    format: Format = field(default_factory=Format)

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """Groups of one entry each."""
        return [[entry] for entry in entries]

    def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[MapRow]]:
        """Start the extraction and the copy to the CPU. Images beyond the groups are padding."""
        maps = self.extract(images)
        if maps.shape[:1] != (len(images),) or not maps.is_floating_point():
            raise ValueError(f"extract: expected a float tensor [{len(images)}, ...]; got {list(maps.shape)}")
        wait = fetch(maps)
        return lambda: [MapRow(group[0].key, map=amap) for group, amap in zip(groups, wait(), strict=False)]


@dataclass(frozen=True)
class WordTask:
    """A map for every word piece of every caption.

    Args:
        find: images [I, 3, h, w] and a list of captions per image -> their maps in order.
        tokenizer: the model's tokenizer, which rejects invalid captions before the model runs.
        result: class of the maps of a caption.
    """

    find: Find
    tokenizer: Tokenizer
    result: type[CaptionMaps]
    format: Format = field(default_factory=partial(Format, captions=True))

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """Groups of consecutive entries of the same image, so that each image is encoded once."""

        def image(item: tuple[int, Entry]) -> object:
            number, entry = item
            return number if entry.path is None else (entry.path, entry.offset)

        return [[entry for _, entry in run] for _, run in itertools.groupby(enumerate(entries), image)]

    def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[MapRow]]:
        """Start the computation. Invalid captions become error rows."""
        errors = [[self._error(entry.text) for entry in group] for group in groups]
        texts = [
            [entry.text for entry, error in zip(group, own, strict=True) if error is None and entry.text is not None]
            for group, own in zip(groups, errors, strict=True)
        ]
        valid = [i for i, own in enumerate(texts) if own]
        results: Sequence[CaptionMaps] = ()
        if valid:
            with warnings.catch_warnings():
                # Truncated captions are recorded in their rows.
                warnings.simplefilter("ignore", UserWarning)
                results = self.find(images[valid], [texts[i] for i in valid])
        waits = iter([(result, fetch(result.maps)) for result in results])

        def wait() -> list[MapRow]:
            pairs = [pair for group, own in zip(groups, errors, strict=True) for pair in zip(group, own, strict=True)]
            return [
                MapRow(entry.key, error=error) if error is not None else _row(entry, *next(waits))
                for entry, error in pairs
            ]

        return wait

    def _error(self, text: str | None) -> str | None:
        if text is None:
            return "caption: expected text; got none"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                self.tokenizer(text)
        except ValueError as error:
            return str(error)
        return None


def _row(entry: Entry, result: CaptionMaps, wait: Callable[[], np.ndarray]) -> MapRow:
    caption = result.caption
    return MapRow(
        entry.key, map=wait(), tokens=result.tokens, word_of=caption.word_of, score=result.score, cut=caption.cut,
        words=result.words,
    )  # fmt: skip


def fetch(maps: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start a copy of the maps to the CPU. The returned function waits for it."""
    maps = maps.detach()
    if maps.device.type != "cuda":
        return maps.to("cpu", torch.float32).numpy
    # Asynchronous, so that the GPU can start the next batch.
    host = torch.empty(maps.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(maps, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(maps.device))

    def wait() -> np.ndarray:
        event.synchronize()
        values: np.ndarray = host.numpy()
        return values

    return wait
