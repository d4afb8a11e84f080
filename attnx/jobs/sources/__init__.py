"""Where images come from: a folder, a table of paths, tar shards, a data set on disk; all as entries that can be read.

`open_source` says which it is; `entries()` lists what there is, one at a time and always in the same order; and
`reader()` gives what turns an entry into bytes, in any process of any machine that sees the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from attnx.limits import CAPTION_BYTES

if TYPE_CHECKING:
    from attnx.jobs.sources.skipped import Skipped

__all__ = ["KINDS", "Entry", "Listing", "Reader", "Source", "open_source", "shown", "text_of", "wrong_caption"]

KINDS = ("folder", "table", "tar", "dataset")


class Entry(NamedTuple):
    """One row of a job, before it is done.

    key: the row's name, once in a job. path: the file, relative to the source's root, or absolute. offset, size: of a
    tar's member in bytes; of a data set, or of a table with pictures in it, offset is the row. text: the caption.
    error: why there is nothing to read.
    """

    key: str
    path: str | None
    offset: int | None = None
    size: int | None = None
    text: str | None = None
    error: str | None = None


# The file to open, or its content; the path names it in errors.
Reader: TypeAlias = Callable[[Entry], tuple[Path, IO[bytes] | None]]


class Listing(Protocol):
    """Something that lists its images."""

    def entries(self) -> Iterator[Entry]:
        """All there is, in an order that does not change.

        Raises:
            ValueError, OSError: the source itself is none; what is wrong with one row is that entry's `error`.
        """


class Source(Listing, Protocol):
    """And reads them. skipped: what the last listing left out."""

    kind: str

    @property
    def skipped(self) -> Skipped: ...

    def reader(self) -> Reader:
        """Reads an entry; can be pickled."""


def open_source(
    path: str | Path, kind: str | None = None, root: str | Path | None = None, split: str | None = None
) -> Source:
    """The source at a path.

    Args:
        path: a folder of images or one image; a table (.parquet, .csv, .tsv, .jsonl) with the columns path (or image),
            and if you like key and caption (or text); Parquet with pictures in it, as the Hugging Face hub has it; a
            tar of samples, or a folder of them; a Hugging Face data set written by save_to_disk.
        kind: "folder", "table", "tar" or "dataset", where the path doesn't tell.
        root: what a table's paths are relative to; its own folder unless given.
        split: of a data set that has several.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: options that this kind doesn't have; an unknown kind; a pipe, socket or device.
    """
    from attnx.images import image_suffixes
    from attnx.jobs.sources.dataset import DataSet
    from attnx.jobs.sources.folder import Folder
    from attnx.jobs.sources.table import SUFFIXES, Table
    from attnx.jobs.sources.tar import Tars, tars_in

    path = Path(path)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"source: expected one of {', '.join(KINDS)}; got {kind!r}")
    if not path.exists():
        expected = "an image, or a folder, table, tar or data set of images"
        raise FileNotFoundError(f"source: expected {expected}; got {path}, which does not exist")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"source: expected a regular file or a folder; got {path}, which is a pipe, socket or device")
    if kind is None:
        if path.is_dir():
            markers = ("dataset_info.json", "dataset_dict.json")
            kind = "dataset" if any((path / name).is_file() for name in markers) else "folder"
            kind = "tar" if kind == "folder" and tars_in(path, alone=True) else kind
        else:
            kinds = (
                dict.fromkeys(SUFFIXES, "table") | dict.fromkeys((*image_suffixes(), ""), "folder") | {".tar": "tar"}
            )
            kind = kinds.get(path.suffix.lower())
            if kind is None:
                told = f"an image, a table ({' '.join(SUFFIXES)}) or a .tar; got {path}; --kind says what it is"
                raise ValueError(f"source: expected {told}")
    if root is not None and kind != "table":
        raise ValueError(f"root: it is for a table's paths; {path} is taken for a {kind}")
    if split is not None and kind != "dataset":
        raise ValueError(f"split: it is for a data set; {path} is taken for a {kind}")
    if kind == "table" and path.is_dir():
        raise ValueError(f"source: expected a table; got {path}, which is a folder")
    if kind == "table":
        return Table(path, path.parent if root is None else Path(root))
    if kind == "tar":
        return Tars(path)
    return DataSet(path, split) if kind == "dataset" else Folder(path)


def wrong_caption(caption: object) -> str | None:
    """Why what a source has for a caption is none; None where all is well, and where there is no caption."""
    if isinstance(caption, str) and (size := len(caption.encode(errors="surrogatepass"))) > CAPTION_BYTES:
        return f"expected a caption of at most {CAPTION_BYTES:,} bytes; got {size:,}"
    if caption is None or (isinstance(caption, str) and caption == text_of(caption)):
        return None
    kind = "valid Unicode as caption" if isinstance(caption, str) else "a text as caption"
    return f"expected {kind}; got {caption!r}"[:200]


def text_of(value: object) -> str:
    """Text that Parquet can hold: what is no valid Unicode is written out as escapes."""
    return str(value).encode(errors="backslashreplace").decode()


def shown(value: object, length: int = 100) -> str:
    """Text for a message: the first characters, in one line; those that can't be printed are escapes."""
    start = str(value)[:length]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in start)[:length]
