"""Tar shards of webdataset. Members with the same stem are one sample: a picture and a caption in .txt or .json."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO

from attnx.files import open_regular
from attnx.images import image_suffixes, is_unreadable_image
from attnx.jobs.sources import Entry, text_of, wrong_caption
from attnx.jobs.sources.reachable import is_unreachable
from attnx.jobs.sources.skipped import LINK, PART, UNREAD, Skipped
from attnx.jobs.sources.tar_headers import members_of
from attnx.limits import CAPTION_BYTES, JSON_BYTES, PICTURE_BYTES
from attnx.messages import printable
from attnx.remote import RemotePath

_TEXT = (".txt", ".json", ".caption")
_SHORT = tarfile.LENGTH_NAME - 20


@dataclass(frozen=True)
class Tars:
    """A tar or a folder of tars. Keys are the tar's name, `/` and the sample's path up to the first dot of its name.

    Planning reads headers and captions, but no pictures. A job reads each picture at its offset. A truncated tar gives
    its complete samples and one row with an error. If a suffix is repeated in a sample (ignoring case), both pictures
    become entries with the same key, which the manifest rejects. Skipped pictures are counted in `skipped`.
    """

    path: Path
    skipped: Skipped = field(default_factory=Skipped, compare=False, repr=False)
    kind = "tar"

    def entries(self) -> Iterator[Entry]:
        """The samples, sorted by the tars' names, in the order of each tar."""
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
        """A reader of members of the tars."""
        return Members(self.root)

    @property
    def fingerprint(self) -> None:
        """Tars have none; every member is checked when it is read."""

    @property
    def root(self) -> Path:
        """The folder that the tars' paths are relative to."""
        return self.path.parent if self.path.is_file() else self.path


@dataclass(frozen=True)
class Members:
    """Reads one member by its offset."""

    root: Path

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        """The image's path, and its content if that is not the file at the path."""
        assert entry.path is not None
        assert entry.offset is not None
        assert entry.size is not None
        if not 0 <= entry.size <= PICTURE_BYTES:
            raise ValueError(f"expected a picture of at most {PICTURE_BYTES:,} bytes; got one of {entry.size:,}")
        path, start = self.root / entry.path, entry.offset - tarfile.BLOCKSIZE
        if isinstance(path, RemotePath):
            content = path.read(start, tarfile.BLOCKSIZE + entry.size)
        else:
            with open_regular(path) as file:
                file.seek(start)
                content = file.read(tarfile.BLOCKSIZE + entry.size)
        _check_header(content[: tarfile.BLOCKSIZE], entry)
        return path / entry.key.rpartition("/")[2], io.BytesIO(content[tarfile.BLOCKSIZE :])


def _check_header(block: bytes, entry: Entry) -> None:
    """Raise ValueError if the header does not match the entry's picture, because the tar was replaced."""
    sample = entry.key.removeprefix(f"{text_of(entry.path)}/")
    try:
        member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        actual = f"{text_of(_sample(member))} of {member.size:,} bytes"
    except tarfile.HeaderError:
        member, actual = None, "something else"
    # Writers shorten names differently if they are not ASCII or too long for a header.
    is_full_name = sample.isascii() and len(sample) <= _SHORT
    if member is None or member.size != entry.size or (is_full_name and text_of(_sample(member)) != sample):
        expected = f"{printable(sample)} of {entry.size:,} bytes"
        raise ValueError(
            f"the tar has changed since the job was planned: expected {expected}; got {printable(actual, 200)}"
        )


def tars_in(folder: Path, alone: bool = False) -> list[Path]:
    """The tars in a folder, sorted by name. With `alone`, an empty list if the folder also has images."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    if alone and any(path.suffix.lower() in image_suffixes() for path in files):
        return []
    return sorted(path for path in files if path.suffix.lower() == ".tar")


def _samples(tar: Path, name: str, skipped: Skipped) -> Iterator[Entry]:
    name, path = text_of(name), printable(tar, 200)
    read, broken = 0, list[Exception]()
    try:
        with open_regular(tar) as content:
            if content.read(2) == b"\x1f\x8b":
                yield Entry(name, None, error=f"{path}: expected a tar without compression; got gzip")
                return
            size = content.seek(0, io.SEEK_END)
            for sample, members in groupby(_files(content, name, skipped, broken), _sample):
                entries = _entries(content, name, sample, list(members), size, skipped)
                read += 1
                yield from entries
    except OSError as error:
        broken.append(error)
    if broken and is_unreachable(broken[0]):
        # The tar itself may be fine, so the error must not become a part of the plan.
        raise broken[0]
    if broken:
        why = printable(str(broken[0]) or type(broken[0]).__name__)
        yield Entry(f"{name}/", None, error=f"{path}: the tar ends early or is broken, after {read} samples: {why}")


def _files(content: IO[bytes], name: str, skipped: Skipped, broken: list[Exception]) -> Iterator[tarfile.TarInfo]:
    """The members that are regular files and not hidden. Links to pictures are counted in `skipped`.

    An error ends the iteration and is appended to `broken`, so that the last complete sample is still used.
    """
    members = members_of(content)
    while True:
        try:
            member = next(members, None)
        # For broken headers tarfile raises ValueError, OverflowError, RecursionError, IndexError and others.
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
    """The entry of a sample; none without a picture; several with the same key if a picture is repeated."""
    key, suffixes = f"{name}/{text_of(sample)}", image_suffixes()
    parts = [(member.name.removeprefix(sample).lower(), member) for member in members]
    images = [(part, member) for part, member in parts if part.endswith(suffixes)]
    # x.jpg is the picture of sample x; x.depth.png is an additional image.
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
        names = printable(", ".join(_name(member) for _, member in pictures[:10]), 200)
        return [Entry(key, None, error=f"{name}: expected one picture in this sample; got {names}")]
    picture = pictures[0][1]
    read = [picture, *(member for part, member in parts if part in _TEXT)]
    if any(member.issparse() for member in read):
        return [Entry(key, None, error=f"{name}: expected whole files in this sample; got a sparse one")]
    if any(member.offset_data + member.size > size for member in members if not member.issparse()):
        return [Entry(key, None, error=f"{name}: the tar ends early, in this sample")]
    if picture.size > PICTURE_BYTES:
        message = f"expected a picture of at most {PICTURE_BYTES:,} bytes; got one of {picture.size:,}"
        return [Entry(key, None, error=f"{name}: {message}")]
    try:
        text = _text(content, parts)
    except ValueError as error:
        return [Entry(key, None, error=f"{name}: {error}")]
    return [Entry(key, name, picture.offset_data, picture.size, text)]


def _text(content: IO[bytes], parts: list[tuple[str, tarfile.TarInfo]]) -> str | None:
    """The sample's caption. If a name is repeated, the first member is used.

    Raises:
        ValueError: the caption is too long, or not UTF-8.
    """
    for suffix in _TEXT:
        member = next((member for part, member in parts if part == suffix), None)
        if member is not None:
            most = JSON_BYTES if suffix == ".json" else CAPTION_BYTES
            if member.size > most:
                raise ValueError(f"expected a {suffix} of at most {most:,} bytes; got one of {member.size:,}")
            content.seek(member.offset_data)
            # Invalid UTF-8 is kept as surrogates, which `wrong_caption` rejects.
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
    values = [fields.get(name) for name in ("caption", "text")] if isinstance(fields, dict) else []
    return next((value for value in values if isinstance(value, str)), None)


def _name(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2]


def _sample(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]
