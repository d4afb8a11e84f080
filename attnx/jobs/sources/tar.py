"""webdataset's tar shards: members of one name are one sample; its picture, and its caption in .txt or .json."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from attnx.files import open_regular
from attnx.images import image_suffixes, is_unreadable_image
from attnx.jobs.sources import Entry, shown, text_of, wrong_caption
from attnx.jobs.sources.reachable import is_unreachable
from attnx.jobs.sources.skipped import LINK, PART, UNREAD, Skipped
from attnx.limits import CAPTION_BYTES, HEADER_BYTES, JSON_BYTES, PICTURE_BYTES

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
        assert entry.size is not None
        if not 0 <= entry.size <= PICTURE_BYTES:
            raise ValueError(f"expected a picture of at most {PICTURE_BYTES:,} bytes; got one of {entry.size:,}")
        with open_regular(self.root / entry.path) as file:
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
        expected = f"{shown(sample)} of {entry.size:,} bytes"
        raise ValueError(f"the tar has changed since the job was planned: expected {expected}; got {shown(found, 200)}")


def tars_in(folder: Path, alone: bool = False) -> list[Path]:
    """The tars of a folder, by name; alone: none where images lie beside them."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    if alone and any(path.suffix.lower() in image_suffixes() for path in files):
        return []
    return sorted(path for path in files if path.suffix.lower() == ".tar")


def _samples(tar: Path, name: str, skipped: Skipped) -> Iterator[Entry]:
    name, told = text_of(name), shown(tar, 200)
    read, broken = 0, list[Exception]()
    try:
        with open_regular(tar) as content:
            if content.read(2) == b"\x1f\x8b":
                yield Entry(name, None, error=f"{told}: expected a tar without compression; got one of gzip")
                return
            size = content.seek(0, io.SEEK_END)
            for sample, members in groupby(_files(content, name, skipped, broken), _sample):
                found = _entries(content, name, sample, list(members), size, skipped)
                read += 1
                yield from found
    except OSError as error:
        broken.append(error)
    if broken and is_unreachable(broken[0]):
        # No fault of the tar's, and so none that may stand in the plan.
        raise broken[0]
    if broken:
        why = shown(str(broken[0]) or type(broken[0]).__name__)
        yield Entry(f"{name}/", None, error=f"{told}: the tar ends early or is broken, after {read} samples: {why}")


class _Broken(tarfile.HeaderError):
    """A header that tarfile would believe."""


class _Member(tarfile.TarInfo):
    """A member whose headers are checked before tarfile uses them."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        """Of a header; raises `_Broken` for a negative size, with which CPython before 3.11.14 never ends."""
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise _Broken(f"expected a size; got {member.size:,}")
        return member

    def _proc_pax(self, file: Any) -> Any:
        # For records that are none, CPython before 3.11.10 takes time and memory that grow with their square.
        start = file.fileobj.tell()
        content = file.fileobj.read(self.size)
        place = 0
        while place < len(content) and content[place]:
            digits = content[place : place + 20].partition(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            record = content[place : place + length]
            if length < 1 or record[-1:] != b"\n" or b"=" not in record:
                raise _Broken("expected pax records")
            place += length
        if re.search(rb"\d{256}", content):
            raise _Broken("expected pax records without numbers of 256 digits")
        file.fileobj.seek(start)
        return super()._proc_pax(file)  # type: ignore[misc]


class _Headers:
    """What tarfile reads of a tar: headers of one member after the other, up to the limit."""

    mode = "rb"

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def begin(self, offset: int) -> None:
        """A member's headers begin here."""
        self._end = offset + HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Raises `_Broken` for what lies beyond the limit."""
        if self._file.tell() + size > self._end:
            raise _Broken(f"expected headers of at most {HEADER_BYTES:,} bytes a member; got more")
        return self._file.read(size)


def _members(content: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """All members; none is kept in memory. Raises what tarfile does."""
    content.seek(0)
    headers = _Headers(content)
    with tarfile.open(fileobj=headers, mode="r:", tarinfo=_Member) as file:  # type: ignore[call-overload]
        last = 0
        while True:
            headers.begin(last)
            member = file.next()
            if member is None:
                break
            number = member.pax_headers.get("size")
            if (
                member.size < 0
                or file.offset <= last
                or (number is not None and not re.fullmatch("[0-9]{1,20}", number))
            ):
                raise _Broken(f"expected a size; got {shown(number or member.size)}")
            last = file.offset
            # Global records, which tarfile copies to each member, say nothing of use here but this one.
            file.pax_headers = {key: value for key, value in file.pax_headers.items() if key == "hdrcharset"}
            member.pax_headers = {}
            file.members.clear()
            yield member
        # tarfile takes a header that is cut or broken, but for the first, for the end.
        content.seek(last)
        if any(content.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("expected a header")


def _files(content: IO[bytes], name: str, skipped: Skipped, broken: list[Exception]) -> Iterator[tarfile.TarInfo]:
    """The members that are files and not hidden; counts the links to pictures. An error ends them, and is put in
    `broken`: the sample before it is given.
    """
    members = _members(content)
    while True:
        try:
            member = next(members, None)
        # Of broken headers tarfile raises nearly anything: ValueError, OverflowError, RecursionError, IndexError.
        except Exception as error:
            broken.append(error)
            return
        if member is None:
            return
        if _name(member).startswith("."):
            continue
        if member.isfile():
            yield member
        elif (member.islnk() or member.issym()) and _name(member).lower().endswith(image_suffixes()):
            skipped.add(LINK, f"{name}/{member.name}")


def _entries(
    content: IO[bytes], name: str, sample: str, members: list[tarfile.TarInfo], size: int, skipped: Skipped
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
        told = shown(", ".join(_name(member) for _, member in pictures[:10]), 200)
        return [Entry(key, None, error=f"{name}: expected one picture in this sample; got {told}")]
    picture = pictures[0][1]
    read = [picture, *(member for part, member in parts if part in _TEXT)]
    if any(member.issparse() for member in read):
        return [Entry(key, None, error=f"{name}: expected whole files in this sample; got a sparse one")]
    if any(member.offset_data + member.size > size for member in members if not member.issparse()):
        return [Entry(key, None, error=f"{name}: the tar ends early, in this sample")]
    if picture.size > PICTURE_BYTES:
        told = f"expected a picture of at most {PICTURE_BYTES:,} bytes; got one of {picture.size:,}"
        return [Entry(key, None, error=f"{name}: {told}")]
    try:
        text = _text(content, parts)
    except ValueError as error:
        return [Entry(key, None, error=f"{name}: {error}")]
    return [Entry(key, name, picture.offset_data, picture.size, text)]


def _text(content: IO[bytes], parts: list[tuple[str, tarfile.TarInfo]]) -> str | None:
    """The sample's caption; of two members of one name, the first one's.

    Raises:
        ValueError: it is too long, or no UTF-8.
    """
    for suffix in _TEXT:
        member = next((member for part, member in parts if part == suffix), None)
        if member is not None:
            most = JSON_BYTES if suffix == ".json" else CAPTION_BYTES
            if member.size > most:
                raise ValueError(f"expected a {suffix} of at most {most:,} bytes; got one of {member.size:,}")
            content.seek(member.offset_data)
            # What is no UTF-8 is refused with the caption that has it.
            text = _caption(content.read(member.size).decode(errors="surrogateescape"), suffix)
            if text is not None:
                if wrong := wrong_caption(text):
                    raise ValueError(wrong)
                return text
    return None


def _caption(content: str, suffix: str) -> str | None:
    if suffix != ".json":
        return content
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    found = [fields.get(name) for name in ("caption", "text")] if isinstance(fields, dict) else []
    return next((value for value in found if isinstance(value, str)), None)


def _name(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2]


def _sample(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]
