"""Counts of the files that a listing left out of a source, and the line that tells of them."""

from collections import Counter
from pathlib import PurePosixPath

__all__ = ["LINK", "PART", "UNREAD", "Skipped"]

UNREAD = "files that are no images attnx can read"
PART = "images that are further parts of their samples"
LINK = "images that are links within a tar"
_ADVICE = {UNREAD: "convert them", PART: "a sample has one picture", LINK: "pack the files themselves"}


class Skipped:
    """Counts of the files that a source's last listing left out, by the reason and the suffix."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._examples: dict[str, str] = {}

    def clear(self) -> None:
        """Forgets all: a listing begins."""
        self._counts.clear()
        self._examples.clear()

    def add(self, why: str, name: str) -> None:
        """Counts a file. why: UNREAD, PART or LINK."""
        self._counts.setdefault(why, Counter())[PurePosixPath(name).suffix.lower()] += 1
        self._examples.setdefault(why, name.encode(errors="backslashreplace").decode())

    def lines(self) -> list[str]:
        """A line a reason, with counts and an example; none where nothing was left out."""
        return [f"skipped {self._told(why)}" for why in self._counts]

    def _told(self, why: str) -> str:
        from attnx.images import HEIF_SUFFIXES, image_suffixes

        counts = self._counts[why]
        told = ", ".join(f"{suffix} {count}" for suffix, count in counts.most_common())
        advice = _ADVICE[why]
        if why == UNREAD and set(counts) & set(HEIF_SUFFIXES) - set(image_suffixes()):
            advice += ", or install pillow-heif"
        return f"{counts.total()} {why}: {told}, such as {self._examples[why][:200]}; {advice}"
