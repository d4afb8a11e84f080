"""Sources of images: a folder, a table, tar shards, or a data set on disk.

`open_source` opens a source. `entries()` iterates over its entries, always in the same order. `reader()` returns a
function that reads an entry, in any process on any machine with access to the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from attnx.limits import CAPTION_BYTES
from attnx.remote import is_remote, location

if TYPE_CHECKING:
    from attnx.jobs.sources.skipped import Skipped

__all__ = ["KINDS", "Entry", "Listing", "Reader", "Source", "open_source", "text_of", "wrong_caption"]

KINDS = ("folder", "table", "tar", "dataset")


class Entry(NamedTuple):
    """One row of a job's plan.

    Attributes:
        key: the row's name, unique in a job.
        path: the file, absolute or relative to the source's root.
        offset, size: position of a tar member in bytes. In a data set or a table of pictures, offset is the row.
        text: the caption.
        error: the reason if the row can't be read.
    """

    key: str
    path: str | None
    offset: int | None = None
    size: int | None = None
    text: str | None = None
    error: str | None = None


# Returns the path, and the content if it is not the file at that path. Errors name the path.
Reader: TypeAlias = Callable[[Entry], tuple[Path, IO[bytes] | None]]


class Listing(Protocol):
    """A list of images."""

    def entries(self) -> Iterator[Entry]:
        """All entries, always in the same order. A problem with one row becomes that entry's `error`.

        Raises:
            ValueError, OSError: the source as a whole can't be read.
        """


class Source(Listing, Protocol):
    """A list of images that can be read.

    Attributes:
        kind: one of KINDS.
        skipped: counts of the files that the last listing skipped.
        fingerprint: changes when the rows do; None for a source that has none. It is stored in run.json.
    """

    kind: str

    @property
    def fingerprint(self) -> str | None:
        """A hash that changes when the rows do, else None."""

    @property
    def skipped(self) -> Skipped:
        """Counts of the files that the last listing skipped."""

    def reader(self) -> Reader:
        """A function that reads an entry; it can be pickled."""


def open_source(
    path: str | Path, kind: str | None = None, root: str | Path | None = None, split: str | None = None
) -> Source:
    """The source at a path.

    Args:
        path: path, or URL for fsspec such as s3://bucket/folder, of a folder of images or one image; a table
            (.parquet, .csv, .tsv, .jsonl) with the column path (or image), and optionally key and caption (or text);
            Parquet with embedded pictures, as on the Hugging Face hub; a tar of samples, or a folder of tars; a
            Hugging Face data set written by save_to_disk.
        kind: "folder", "table", "tar" or "dataset"; by default inferred from the path.
        root: folder for relative paths in a table; by default the table's folder.
        split: split of a data set with several splits.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: an option does not apply to this kind; the kind is unknown; the path is a pipe, socket or device.
    """
    from attnx.images import image_suffixes
    from attnx.jobs.sources.dataset import DataSet
    from attnx.jobs.sources.folder import Folder
    from attnx.jobs.sources.table import SUFFIXES, Table
    from attnx.jobs.sources.tar import Tars, tars_in

    path = location(path)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"source: expected one of {', '.join(KINDS)}; got {kind!r}")
    if not path.exists():
        expected = "an image, or a folder, table, tar or data set of images"
        raise FileNotFoundError(f"source: expected {expected}; got {path}, which does not exist")
    if kind == "dataset" and is_remote(path):
        raise ValueError(f"source: expected a data set in a folder of this machine; got {path}")
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
                message = f"an image, a table ({' '.join(SUFFIXES)}) or a .tar; got {path}; set --kind for other names"
                raise ValueError(f"source: expected {message}")
    if root is not None and kind != "table":
        raise ValueError(f"root: only for tables; {path} is read as a {kind}")
    if split is not None and kind != "dataset":
        raise ValueError(f"split: only for data sets; {path} is read as a {kind}")
    if kind == "table" and path.is_dir():
        raise ValueError(f"source: expected a table; got {path}, which is a folder")
    if kind == "table":
        return Table(path, path.parent if root is None else location(root))
    if kind == "tar":
        return Tars(path)
    return DataSet(path, split) if kind == "dataset" else Folder(path)


def wrong_caption(caption: object) -> str | None:
    """Error message if the caption is invalid, else None. A missing caption (None) is valid."""
    if isinstance(caption, str) and (size := len(caption.encode(errors="surrogatepass"))) > CAPTION_BYTES:
        return f"expected a caption of at most {CAPTION_BYTES:,} bytes; got {size:,}"
    if caption is None or (isinstance(caption, str) and caption == text_of(caption)):
        return None
    kind = "valid Unicode as caption" if isinstance(caption, str) else "a text as caption"
    return f"expected {kind}; got {caption!r}"[:200]


def text_of(value: object) -> str:
    """The value as a valid Unicode string, as Parquet requires. Invalid characters become escapes."""
    return str(value).encode(errors="backslashreplace").decode()
