"""A table of paths: Parquet, CSV, TSV or JSON lines with the column path (or image).

The columns key and caption (or text) are optional. Parquet files with embedded pictures: see `embedded`.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.files import open_regular
from attnx.jobs.sources import Entry, text_of, wrong_caption
from attnx.jobs.sources.embedded import Pictures, footer_hash, is_text, picture_column, picture_entries
from attnx.jobs.sources.skipped import Skipped
from attnx.limits import LINE_BYTES
from attnx.messages import printable
from attnx.remote import check_no_credentials, is_remote, is_url, joined

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
PATH, CAPTION = ("path", "image"), ("caption", "text")
_TRIED = 100


@dataclass(frozen=True)
class Table:
    """A table of paths or pictures.

    Keys are from the column `key`, else the path. In a table with captions, `#` and the row number from 0 are appended
    to the path. An invalid row becomes an entry with an error. At least one of the first 100 paths must exist.
    """

    path: Path
    root: Path
    skipped: Skipped = field(default_factory=Skipped, compare=False, repr=False)
    kind = "table"

    def entries(self) -> Iterator[Entry]:
        """One entry per row. Empty lines are skipped."""
        rows = self._rows()
        first = list(islice(rows, _TRIED))
        if not first:
            raise ValueError(f"source: expected at least one row; {self.path} has none")
        if all(entry.path is None for entry in first):
            raise ValueError(
                f"source: expected rows with a path; the first {len(first)} of {self.path} have none: {first[0].error}"
            )
        paths = [entry.path for entry in first if entry.path is not None and entry.offset is None]
        if paths and not any(_exists(joined(self.root, path)) for path in paths):
            raise FileNotFoundError(
                f"source: none of the first {len(paths)} paths of {self.path} exists below {self.root}, such as "
                f"{printable(paths[0])}; set --root to their folder"
            )
        yield from first
        yield from rows

    def reader(self) -> Pictures:
        """A reader of files below the root and of embedded pictures."""
        return Pictures(self.path, self.root)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the footer of a table with embedded pictures; None for a table of paths."""
        if self.path.suffix.lower() != ".parquet":
            return None
        with _opened(self.path) as file:
            return None if _pictures(self.path, self.root, file) is None else footer_hash(self.path)

    def _rows(self) -> Iterator[Entry]:
        suffix = self.path.suffix.lower()
        try:
            if suffix == ".parquet":
                yield from _parquet(self.path, self.root)
                return
            rows = _json_lines(self.path) if suffix in (".jsonl", ".ndjson") else _csv(self.path, suffix)
            for number, (name, row) in enumerate(rows):
                yield _row_entry(row, name, number)
        except UnicodeDecodeError as error:
            raise ValueError(f"source: expected a table in UTF-8; {self.path}: {error}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    # The name is too long, or has a zero byte.
    except (OSError, ValueError):
        return False


def _row_entry(row: Mapping[str, Any] | str, name: str, number: int) -> Entry:
    try:
        return _entry(row, name, number)
    # Formatting nested lists takes more stack than parsing them.
    except RecursionError:
        return Entry(name, None, error=f"{name}: expected a row; got one nested too deep")


def _entry(row: Mapping[str, Any] | str, name: str, number: int) -> Entry:
    """The entry of a row. `row` is an error message if the row is invalid."""
    if isinstance(row, str):
        return Entry(name, None, error=f"{name}: {row}")
    path, text, key = _first(row, PATH), _first(row, CAPTION), row.get("key")
    key = None if key is None or key == "" else text_of(key)
    if not isinstance(path, str) or not path or "\0" in path:
        message = f"{name}: expected a path in {' or '.join(PATH)}; got {text_of(json.dumps(row, default=str))[:80]}"
        return Entry(key or name, None, error=message)
    if is_url(path):
        try:
            check_no_credentials(path)
        except ValueError as error:
            return Entry(key or name, None, error=f"{name}: {error}")
    # Numbered even if this row has no caption: other rows of the same image may have one.
    key = key or (f"{text_of(path)}#{number}" if set(CAPTION) & set(row) else text_of(path))
    wrong = wrong_caption(text)
    return Entry(key, path, text=text) if wrong is None else Entry(key, path, error=f"{name}: {wrong}")


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _lines(path: Path, newline: str) -> Iterator[str | None]:
    """The lines of a UTF-8 text with their line ends; None for a line that is longer than the limit."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline=newline) as file:
        while line := file.readline(LINE_BYTES):
            if len(line) < LINE_BYTES or line.endswith(("\n", "\r")):
                yield line
                continue
            while (rest := file.readline(LINE_BYTES)) and not rest.endswith(("\n", "\r")):
                pass
            yield None


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    for number, line in enumerate(_lines(path, "\n"), 1):
        name, expected = f"line {number}", 'expected {"path": "photo.jpg", "caption": "a dog"}'
        if line is None:
            yield name, f"expected at most {LINE_BYTES:,} characters; got more"
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except ValueError as error:
            yield name, f"{expected}; {error}"
            continue
        except RecursionError:
            yield name, f"{expected}; got lists or objects nested too deep"
            continue
        yield name, row if isinstance(row, dict) else f"{expected}; got {printable(text_of(line.strip()), 80)}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError if a name is repeated."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{printable(text_of(duplicate))} comes twice")
    return row


def _csv(path: Path, suffix: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    # A line that is too long is replaced by a field that is too long. Only this row gets an error.
    too_long = "x" * (csv.field_size_limit() + 1) + "\n"
    lines = (too_long if line is None else line for line in _lines(path, ""))
    rows = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    columns: list[str] | None = None
    while True:
        try:
            if columns is None:
                columns = list(rows.fieldnames or [])
                _check(path, columns)
            row = next(rows, None)
        except csv.Error as error:
            if columns is None or "field limit" not in str(error):
                raise ValueError(f"source: expected a table; {path}, line {rows.reader.line_num}: {error}") from error
            yield f"line {rows.reader.line_num}", f"expected shorter fields; {error}"
            continue
        if row is None:
            return
        name = f"line {rows.reader.line_num}"
        if None in row:
            yield name, f"expected {len(columns)} columns; got more"
        else:
            yield name, {column: value or None for column, value in row.items()}


@contextlib.contextmanager
def _opened(path: Path) -> "Iterator[pq.ParquetFile]":
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as content:
            # pyarrow opens local files itself, so that a process can fork while they are open.
            source = content if is_remote(path) else path
            with pq.ParquetFile(source, page_checksum_verification=True) as file:
                yield file
    except UnicodeDecodeError:
        raise
    # pyarrow raises nearly any exception for a broken file.
    except Exception as error:
        if str(error).startswith("source: "):
            raise
        raise ValueError(f"source: expected a Parquet file; {path}: {printable(error, 200)}") from error


def _parquet(path: Path, root: Path) -> Iterator[Entry]:
    with _opened(path) as file:
        _check_unique(path, file.schema_arrow.names)
        pictures = _pictures(path, root, file)
        if pictures is not None:
            yield from picture_entries(file, path, pictures, CAPTION)
            return
        names = file.schema_arrow.names
        wanted = [name for name in names if name in (*_text_columns(file), *CAPTION, "key")]
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield _row_entry(row, f"row {number}", number)
                number += 1


def _pictures(path: Path, root: Path, file: "pq.ParquetFile") -> str | None:
    """The column of pictures; None for a table of paths. If both exist, the paths are used if one of them exists.

    Raises:
        ValueError: the table has neither paths nor pictures.
    """
    texts = _text_columns(file)
    if texts:
        rows = next(file.iter_batches(_TRIED, columns=texts), None)
        paths = [value for row in ([] if rows is None else rows.to_pylist()) for value in row.values() if value]
        if any(_exists(joined(root, text)) for text in paths if "\0" not in text):
            return None
    try:
        pictures = picture_column(file)
    except ValueError as error:
        if texts:
            return None
        raise ValueError(f"source: {path}: {error}") from error
    if pictures is None and not texts:
        columns = printable(", ".join(f"{column.name} ({column.type})" for column in file.schema_arrow), 100)
        expected = f"a column {' or '.join(PATH)} of texts, or pictures as {{bytes, path}} or as bytes named image"
        advice = "rename or add a column"
        raise ValueError(f"source: expected {expected}; {path} has {columns or 'none'}; {advice}")
    return pictures


def _text_columns(file: "pq.ParquetFile") -> list[str]:
    return [column.name for column in file.schema_arrow if column.name in PATH and is_text(column.type)]


def _check(path: Path, columns: list[str]) -> None:
    if not set(columns) & set(PATH):
        names = printable(", ".join(columns[:20])) or "none"
        raise ValueError(f"source: expected a column {' or '.join(PATH)}; {path} has {names}")
    _check_unique(path, columns)


def _check_unique(path: Path, columns: list[str]) -> None:
    twice = next((name for name in (*PATH, *CAPTION, "key") if columns.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"source: expected every column once; {path} has {twice} {columns.count(twice)} times")
