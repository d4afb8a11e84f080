"""The batch job of captions: image files and texts in, shards with a map for every word piece out, in order."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.jobs.extract import Summary
from attnx.jobs.reading import Prepare, Progress, Read, read, read_in_order, reader_pool
from attnx.jobs.shards import ShardWriter

if TYPE_CHECKING:
    import torch

    from attnx.models.words import Tokenizer
    from attnx.pairs import CaptionMaps

    Find = Callable[[torch.Tensor, list[list[str]]], Sequence[CaptionMaps]]
    Seen = Callable[[int, Path, CaptionMaps], None]

__all__ = ["Pair", "extract_words", "read_pairs"]

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Pair:
    """A line of a file of pairs. `image`: as it stands there. `error`: why the line is none; `text` is None then."""

    image: str
    text: str | None
    error: str | None = None


@dataclass(frozen=True)
class _Group:
    """Consecutive pairs of one image, in order; the first is number `first` of all."""

    first: int
    pairs: tuple[Pair, ...]
    image: Read


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file of JSON lines: {"image": "photo.jpg", "caption": "a dog"}; other fields are left.

    A line that is no such pair has its error; empty lines are none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it isn't text, or has no lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"pairs: expected a file of JSON lines; {path} is none")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"pairs: expected JSON lines in UTF-8; {path}: {error}") from error
    pairs = [_pair(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise ValueError(f"pairs: expected at least one line; {path} has none")
    return pairs


def _pair(number: int, line: str) -> Pair:
    expected = f'line {number}: expected {{"image": "photo.jpg", "caption": "a dog"}}'
    try:
        fields = json.loads(line)
    except ValueError as error:
        return Pair(f"line {number}", None, f"{expected}; {error}")
    image = fields.get("image") if isinstance(fields, dict) else None
    if not isinstance(image, str) or not image or "\0" in image:
        return Pair(f"line {number}", None, f"{expected}; got {line.strip()[:80]}")
    text = fields.get("caption")
    if not isinstance(text, str):
        return Pair(image, None, f"{expected}; got {'no caption' if text is None else f'the caption {text!r}'[:80]}")
    return Pair(image, text)


def extract_words(
    pairs: Sequence[Pair],
    root: Path,
    prepare: Prepare,
    find: Find,
    tokenizer: Tokenizer,
    out: Path,
    settings: dict[str, Any],
    *,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    seen: Seen | None = None,
    workers: int | None = None,
    rows_per_shard: int = 4096,
) -> Summary:
    """Writes one row a pair to `out`, in the order of `pairs`, and says how it went.

    A pair without a caption or with an empty one, whose image can't be read, or whose map float16 can't hold, becomes a
    row with an error, and the job goes on. Any other exception ends it after the rows before are written. Consecutive
    pairs of one image are a single batch's, which encodes the image once.

    Args:
        pairs: of `read_pairs`; images are relative to `root`, or absolute.
        prepare: upright RGB picture -> [3, h, w] float, the same h and w for all. Called from several threads.
        find: images [I, 3, h, w], a list of captions for each -> the captions' maps, in order.
        tokenizer: of the model, which says what is no caption before the model runs.
        out, settings, rows_per_shard: as for `ShardWriter`.
        batch_size: pairs at a time, at least 1; more where one image has more captions.
        device: where images go before `find`; None leaves them on the CPU.
        progress: called as progress(done, total) after every batch; done counts all rows so far.
        seen: called as seen(number, image file, maps) for every pair that has maps.
        workers: threads that decode and prepare; by default the number of usable cores, at most 16.

    Raises:
        ValueError: a wrong argument.
        OSError: `out` can't be written to; known before the first image is read.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    start, cut = time.perf_counter(), 0

    def load(job: tuple[int, tuple[Pair, ...]]) -> _Group:
        first, group = job
        if all(pair.error for pair in group):
            return _Group(first, group, Read(group[0].image, None, error=group[0].error))
        return _Group(first, group, read(group[0].image, root / group[0].image, prepare))

    with reader_pool(workers) as pool, ShardWriter(out, settings, rows_per_shard, captions=True) as writer:
        for batch in _batches(read_in_order(pool, load, _runs(pairs), _BATCHES_AHEAD * batch_size), batch_size):
            cut += _write_batch(writer, batch, find, tokenizer, device, root, seen)
            if progress is not None:
                progress(writer.rows, len(pairs))
    return Summary(writer.rows - writer.failed, writer.failed, time.perf_counter() - start, writer.shards, cut)


def _runs(pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[Pair, ...]]]:
    """Consecutive pairs of one image, and the number of the first."""
    for _, run in groupby(enumerate(pairs), lambda item: item[1].image):
        numbered = tuple(run)
        yield numbered[0][0], tuple(pair for _, pair in numbered)


def _batches(groups: Iterable[_Group], size: int) -> Iterator[list[_Group]]:
    """Whole groups, as many as stay within `size` pairs, at least one."""
    batch: list[_Group] = []
    for group in groups:
        if batch and sum(len(g.pairs) for g in batch) + len(group.pairs) > size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _write_batch(
    writer: ShardWriter,
    batch: list[_Group],
    find: Find,
    tokenizer: Tokenizer,
    device: torch.device | str | None,
    root: Path,
    seen: Seen | None,
) -> int:
    """Writes the rows of a batch; gives how many captions were cut."""
    import torch

    errors = [[_error(group.image, pair, tokenizer) for pair in group.pairs] for group in batch]
    texts = [
        [pair.text for pair, error in zip(group.pairs, told, strict=True) if error is None and pair.text is not None]
        for group, told in zip(batch, errors, strict=True)
    ]
    asked = [(group.image.tensor, own) for group, own in zip(batch, texts, strict=True) if own]
    maps: Iterator[CaptionMaps] = iter(())
    if asked:
        images = torch.stack([tensor for tensor, _ in asked if tensor is not None]).to(device=device)
        with warnings.catch_warnings():
            # Of captions that are cut; the job counts them.
            warnings.simplefilter("ignore", UserWarning)
            maps = iter(find(images, [own for _, own in asked]))
    cut = 0
    for group, told in zip(batch, errors, strict=True):
        image = group.image
        for number, (pair, error) in enumerate(zip(group.pairs, told, strict=True), group.first):
            # JSON can hold what is no valid Unicode, and Parquet can't.
            key = pair.image.encode(errors="backslashreplace").decode()
            if error is not None:
                writer.add(key, None, image.width, image.height, error, text=pair.text)
                continue
            found = next(maps)
            cut += found.caption.cut > 0
            writer.add(
                key, found.maps.float().cpu().numpy(), image.width, image.height,
                text=pair.text, tokens=found.tokens, word_of=found.caption.word_of, score=found.score,
            )  # fmt: skip
            if seen is not None:
                seen(number, root / pair.image, found)
    return cut


def _error(image: Read, pair: Pair, tokenizer: Tokenizer) -> str | None:
    """Why a pair has no maps, if so."""
    if pair.error is not None or pair.text is None:
        return pair.error
    if image.error is not None:
        return image.error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tokenizer(pair.text)
    except ValueError as error:
        return str(error)
    return None
