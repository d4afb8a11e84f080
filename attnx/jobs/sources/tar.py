"""webdataset's tar shards: members of one name are one sample; its picture, and its caption in .txt or .json."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

from attnx.images import IMAGE_SUFFIXES
from attnx.jobs.sources import Entry, text_of

_TEXT = (".txt", ".json", ".caption")
_SHORT = tarfile.LENGTH_NAME - 20


@dataclass(frozen=True)
class Tars:
    """Keys are the tar's name, / and the sample's: its members' path up to the first dot of the name.

    Planning reads headers and captions, no picture; a job then reads each picture where it lies. A tar that ends early
    gives the samples that are whole, and a row that says so.
    """

    path: Path
    kind = "tar"

    def entries(self) -> Iterator[Entry]:
        """Samples in the order of names of tars, and of places in them."""
        tars = [self.path] if self.path.is_file() else tars_in(self.path)
        if not tars:
            raise ValueError(f"source: expected tar shards; {self.path} has none")
        root = self.root
        for tar in tars:
            yield from _samples(tar, tar.relative_to(root).as_posix())

    def reader(self) -> "Members":
        """Parts of the tars below the folder."""
        return Members(self.root)

    @property
    def root(self) -> Path:
        """What the tars' paths are relative to."""
        return self.path.parent if self.path.is_file() else self.path


@dataclass(frozen=True)
class Members:
    """Reads one member, by its place."""

    root: Path

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        assert entry.path is not None
        assert entry.offset is not None
        with (self.root / entry.path).open("rb") as file:
            file.seek(entry.offset - tarfile.BLOCKSIZE)
            _check_header(file.read(tarfile.BLOCKSIZE), entry)
            return self.root / entry.path / entry.key.rpartition("/")[2], io.BytesIO(file.read(entry.size))


def _check_header(block: bytes, entry: Entry) -> None:
    """Raises ValueError if it is not that of the entry's picture: another tar has been put in its place."""
    sample = entry.key.removeprefix(f"{text_of(entry.path)}/")
    try:
        member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        found = f"{text_of(_sample(member))} of {member.size:,} bytes"
    except tarfile.HeaderError:
        member, found = None, "something else"
    # Of a name that is no ASCII, or with its suffix too long for a header, every writer has its own short form there.
    whole = sample.isascii() and len(sample) <= _SHORT
    if member is None or member.size != entry.size or (whole and text_of(_sample(member)) != sample):
        expected = f"{sample[:200]} of {entry.size:,} bytes"
        raise ValueError(f"the tar has changed since the job was planned: expected {expected}; got {found[:200]}")


def tars_in(folder: Path, alone: bool = False) -> list[Path]:
    """The tars of a folder, by name; alone: none where images lie beside them."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    if alone and any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return []
    return sorted(path for path in files if path.suffix.lower() == ".tar")


def _samples(tar: Path, name: str) -> Iterator[Entry]:
    name = text_of(name)
    with tar.open("rb") as start:
        packed = start.read(2) == b"\x1f\x8b"
    if packed:
        yield Entry(name, None, error=f"{tar}: expected a tar without compression; got one of gzip")
        return
    size, read = tar.stat().st_size, 0
    try:
        with tarfile.open(tar, "r:") as file:
            files = (member for member in file if member.isfile() and not _name(member).startswith("."))
            for sample, members in groupby(files, _sample):
                entry = _entry(file, name, sample, list(members), size)
                read += 1
                if entry is not None:
                    yield entry
            # tarfile takes a header that is cut or broken, but for the first, for the end.
            if _ends_in_a_header(tar, file.offset):
                raise tarfile.ReadError("expected a header")
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Entry(f"{name}/", None, error=f"{tar}: the tar ends early or is broken, after {read} samples: {error}")


def _ends_in_a_header(tar: Path, offset: int) -> bool:
    with tar.open("rb") as file:
        file.seek(offset)
        return any(file.read(tarfile.BLOCKSIZE))


def _entry(file: tarfile.TarFile, name: str, sample: str, members: list[tarfile.TarInfo], size: int) -> Entry | None:
    """None: a sample without a picture."""
    # x.jpg is sample x's picture, and x.depth.png another part of it.
    parts = {member.name.removeprefix(sample).lower(): member for member in reversed(members)}
    pictures = [member for part, member in parts.items() if part in IMAGE_SUFFIXES]
    pictures = pictures or [member for part, member in parts.items() if part.endswith(IMAGE_SUFFIXES)]
    if not pictures:
        return None
    text, key = None, f"{name}/{text_of(sample)}"
    if len(pictures) > 1:
        told = ", ".join(text_of(_name(picture)) for picture in reversed(pictures))
        return Entry(key, None, error=f"{name}: expected one picture in this sample; got {told}")
    picture = pictures[0]
    if any(member.offset_data + member.size > size for member in members):
        return Entry(key, None, error=f"{name}: the tar ends early, in this sample")
    for suffix in _TEXT:
        if text is None and suffix in parts:
            content = file.extractfile(parts[suffix])
            assert content is not None
            text = _caption(content.read().decode(errors="replace"), suffix)
    return Entry(key, name, picture.offset_data, picture.size, text)


def _caption(content: str, suffix: str) -> str | None:
    if suffix != ".json":
        return content
    try:
        fields = json.loads(content)
    except ValueError:
        return None
    found = [fields.get(name) for name in ("caption", "text")] if isinstance(fields, dict) else []
    return next((value for value in found if isinstance(value, str)), None)


def _name(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2]


def _sample(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]
