"""webdataset's tar shards: members of one name are one sample; its picture, and its caption in .txt or .json."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO

from attnx.images import image_suffixes, is_unreadable_image
from attnx.jobs.sources import Entry, text_of
from attnx.jobs.sources.skipped import LINK, PART, UNREAD, Skipped

_TEXT = (".txt", ".json", ".caption")
_SHORT = tarfile.LENGTH_NAME - 20


@dataclass(frozen=True)
class Tars:
    """Keys are the tar's name, / and the sample's: its members' path up to the first dot of the name.

    Planning reads headers and captions, no picture; a job then reads each picture where it lies. A tar that ends early
    gives the samples that are whole, and a row that says so. A picture that comes twice in a sample, whatever the case
    of its suffix, is two entries of one key, which is no job; pictures that are left out are counted in `skipped`.
    """

    path: Path
    skipped: Skipped = field(default_factory=Skipped, compare=False, repr=False)
    kind = "tar"

    def entries(self) -> Iterator[Entry]:
        """Samples in the order of names of tars, and of places in them."""
        tars = [self.path] if self.path.is_file() else tars_in(self.path)
        if not tars:
            raise ValueError(f"source: expected tar shards; {self.path} has none")
        root = self.root
        self.skipped.clear()
        if self.path.is_dir():
            for path in sorted(self.path.iterdir()):
                if is_unreadable_image(path.name) and not path.name.startswith(".") and path.is_file():
                    self.skipped.add(UNREAD, path.name)
        for tar in tars:
            yield from _samples(tar, tar.relative_to(root).as_posix(), self.skipped)

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
    if alone and any(path.suffix.lower() in image_suffixes() for path in files):
        return []
    return sorted(path for path in files if path.suffix.lower() == ".tar")


def _samples(tar: Path, name: str, skipped: Skipped) -> Iterator[Entry]:
    name = text_of(name)
    with tar.open("rb") as start:
        packed = start.read(2) == b"\x1f\x8b"
    if packed:
        yield Entry(name, None, error=f"{tar}: expected a tar without compression; got one of gzip")
        return
    size, read = tar.stat().st_size, 0
    try:
        with tarfile.open(tar, "r:") as file:
            for sample, members in groupby(_files(file, name, skipped), _sample):
                found = _entries(file, name, sample, list(members), size, skipped)
                read += 1
                yield from found
            # tarfile takes a header that is cut or broken, but for the first, for the end.
            if _ends_in_a_header(tar, file.offset):
                raise tarfile.ReadError("expected a header")
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Entry(f"{name}/", None, error=f"{tar}: the tar ends early or is broken, after {read} samples: {error}")


def _ends_in_a_header(tar: Path, offset: int) -> bool:
    with tar.open("rb") as file:
        file.seek(offset)
        return any(file.read(tarfile.BLOCKSIZE))


def _files(file: tarfile.TarFile, name: str, skipped: Skipped) -> Iterator[tarfile.TarInfo]:
    """The members that are files and not hidden; counts the links to pictures."""
    for member in file:
        if _name(member).startswith("."):
            continue
        if member.isfile():
            yield member
        elif (member.islnk() or member.issym()) and _name(member).lower().endswith(image_suffixes()):
            skipped.add(LINK, f"{name}/{member.name}")


def _entries(
    file: tarfile.TarFile, name: str, sample: str, members: list[tarfile.TarInfo], size: int, skipped: Skipped
) -> list[Entry]:
    """One, of a sample with a picture; several, of one key, if a picture comes twice; none without a picture."""
    key, suffixes = f"{name}/{text_of(sample)}", image_suffixes()
    parts = [(member.name.removeprefix(sample).lower(), member) for member in members]
    images = [(part, member) for part, member in parts if part.endswith(suffixes)]
    # x.jpg is sample x's picture, and x.depth.png another part of it.
    own = [(part, member) for part, member in images if part in suffixes]
    pictures = own or images
    for part, member in parts:
        if is_unreadable_image(part):
            skipped.add(UNREAD, f"{name}/{member.name}")
        elif own and part.endswith(suffixes) and part not in suffixes:
            skipped.add(PART, f"{name}/{member.name}")
    if len({part for part, _ in pictures}) < len(pictures):
        return [Entry(key, name, member.offset_data, member.size) for _, member in pictures]
    if not pictures:
        return []
    if len(pictures) > 1:
        told = ", ".join(text_of(_name(member)) for _, member in pictures)
        return [Entry(key, None, error=f"{name}: expected one picture in this sample; got {told}")]
    if any(member.offset_data + member.size > size for member in members):
        return [Entry(key, None, error=f"{name}: the tar ends early, in this sample")]
    picture = pictures[0][1]
    return [Entry(key, name, picture.offset_data, picture.size, _text(file, parts))]


def _text(file: tarfile.TarFile, parts: list[tuple[str, tarfile.TarInfo]]) -> str | None:
    """The sample's caption; of two members of one name, the first one's."""
    for suffix in _TEXT:
        member = next((member for part, member in parts if part == suffix), None)
        if member is not None:
            content = file.extractfile(member)
            assert content is not None
            text = _caption(content.read().decode(errors="replace"), suffix)
            if text is not None:
                return text
    return None


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
