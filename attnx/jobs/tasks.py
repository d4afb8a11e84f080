"""What a job makes of images: a map of each, or a map for every word piece of each caption."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from attnx.jobs.packing import Format
from attnx.jobs.sources import Entry

if TYPE_CHECKING:
    from attnx.extract.word_maps import CaptionMaps
    from attnx.models.tokenizer import Tokenizer

__all__ = ["Extract", "Find", "Found", "ImageTask", "Task", "WordTask"]

Extract: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Find: TypeAlias = "Callable[[torch.Tensor, list[list[str]]], Sequence[CaptionMaps]]"


class Found(NamedTuple):
    """What was found for an entry: its maps, float32 of any shape, or why there are none; more of a caption."""

    map: np.ndarray | None = None
    error: str | None = None
    tokens: tuple[str, ...] | None = None
    word_of: tuple[int | None, ...] | None = None
    score: float | None = None
    cut: int | None = None


class Task(Protocol):
    """Entries with images to maps."""

    @property
    def format(self) -> Format:
        """Of their rows."""

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """The entries, in order, in groups of one image each."""

    def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[Found]]:
        """Begins with images [I, 3, h, w], of a group each; what it gives waits, and has what was found, in order.

        Raises:
            torch.OutOfMemoryError: of so many images at a time.
        """


@dataclass(frozen=True)
class ImageTask:
    """A map of every image. extract: [B, 3, h, w] float32 -> [B, ...] float maps, on any device."""

    extract: Extract
    format: Format = field(default_factory=Format)

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """One by one."""
        return [[entry] for entry in entries]

    def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[Found]]:
        """The maps are on their way to the CPU; images beyond the groups only fill the batch up."""
        maps = self.extract(images)
        if maps.shape[:1] != (len(images),) or not maps.is_floating_point():
            raise ValueError(f"extract: expected a float tensor [{len(images)}, ...]; got {list(maps.shape)}")
        wait = _fetch(maps)
        return lambda: [Found(amap) for amap in wait()[: len(groups)]]


@dataclass(frozen=True)
class WordTask:
    """A map for every word piece of every caption.

    Args:
        find: images [I, 3, h, w] and captions for each -> their maps, in order.
        tokenizer: of the model, which says what is no caption before the model runs.
    """

    find: Find
    tokenizer: Tokenizer
    format: Format = field(default_factory=partial(Format, captions=True))

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """Consecutive entries of one image, which is encoded once."""

        def image(item: tuple[int, Entry]) -> object:
            number, entry = item
            return number if entry.path is None else (entry.path, entry.offset)

        return [[entry for _, entry in run] for _, run in itertools.groupby(enumerate(entries), image)]

    def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[Found]]:
        """Of captions that are none, why."""
        errors = [[self._error(entry.text) for entry in group] for group in groups]
        texts = [
            [entry.text for entry, error in zip(group, told, strict=True) if error is None and entry.text is not None]
            for group, told in zip(groups, errors, strict=True)
        ]
        asked = [i for i, own in enumerate(texts) if own]
        found: Sequence[CaptionMaps] = ()
        if asked:
            with warnings.catch_warnings():
                # Of captions that are cut: their rows say so.
                warnings.simplefilter("ignore", UserWarning)
                found = self.find(images[asked], [texts[i] for i in asked])
        waits = iter([(each, _fetch(each.maps)) for each in found])

        def wait() -> list[Found]:
            return [
                Found(error=error) if error is not None else _found(*next(waits)) for told in errors for error in told
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


def _found(of: CaptionMaps, wait: Callable[[], np.ndarray]) -> Found:
    caption = of.caption
    return Found(wait(), None, of.tokens, caption.word_of, of.score, caption.cut)


def _fetch(maps: torch.Tensor) -> Callable[[], np.ndarray]:
    """Sends maps to the CPU; what it gives waits for them."""
    maps = maps.detach()
    if maps.device.type != "cuda":
        here = maps.to("cpu", torch.float32)
        return here.numpy
    # Not waited for here: the GPU goes on with the next batch.
    host = torch.empty(maps.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(maps, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(maps.device))

    def wait() -> np.ndarray:
        event.synchronize()
        found: np.ndarray = host.numpy()
        return found

    return wait
