"""Members of a tar. Headers are checked first, because tarfile is slow or loops forever for some invalid ones."""

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from attnx.limits import HEADER_BYTES
from attnx.messages import printable

__all__ = ["BrokenHeaderError", "members_of"]


class BrokenHeaderError(tarfile.HeaderError):
    """An invalid header that tarfile would accept."""


class _Member(tarfile.TarInfo):
    """A member whose headers are checked before tarfile uses them."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        """The member of a header. BrokenHeaderError for a negative size: CPython before 3.11.14 would loop."""
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise BrokenHeaderError(f"expected a size; got {member.size:,}")
        return member

    def _proc_pax(self, file: Any) -> Any:
        # For invalid records, CPython before 3.11.10 takes quadratic time and memory.
        start = file.fileobj.tell()
        content = file.fileobj.read(self.size)
        place = 0
        while place < len(content) and content[place]:
            digits = content[place : place + 20].partition(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            record = content[place : place + length]
            if length < 1 or record[-1:] != b"\n" or b"=" not in record:
                raise BrokenHeaderError("expected pax records")
            place += length
        if re.search(rb"\d{256}", content):
            raise BrokenHeaderError("expected pax records without numbers of 256 digits")
        file.fileobj.seek(start)
        # A private method of tarfile, which typeshed does not list.
        return super()._proc_pax(file)  # type: ignore[misc]


class _Headers:
    """A file object for tarfile that limits the bytes of headers per member."""

    mode = "rb"

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def begin(self, offset: int) -> None:
        """Reset the limit: the headers of a member start at `offset`."""
        self._end = offset + HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Read `size` bytes. Raises `BrokenHeaderError` beyond the limit."""
        if self._file.tell() + size > self._end:
            raise BrokenHeaderError(f"expected headers of at most {HEADER_BYTES:,} bytes a member; got more")
        return self._file.read(size)


def members_of(content: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """All members, without keeping them in memory. Raises the exceptions of tarfile."""
    content.seek(0)
    headers = _Headers(content)
    # tarfile needs only the methods that _Headers has; typeshed asks for more.
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
                raise BrokenHeaderError(f"expected a size; got {printable(number or member.size)}")
            last = file.offset
            # tarfile copies global records to each member; only hdrcharset is needed.
            file.pax_headers = {key: value for key, value in file.pax_headers.items() if key == "hdrcharset"}
            member.pax_headers = {}
            file.members.clear()
            yield member
        # tarfile treats a truncated or broken header, except the first, as the end of the tar.
        content.seek(last)
        if any(content.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("expected a header")
