"""Counts of the files that the listing of a source skipped, and messages about them."""

from collections import Counter
from pathlib import PurePosixPath

__all__ = ["LINK", "PART", "UNREAD", "Skipped"]

UNREAD = "files in formats that attnx can't read"
PART = "additional images of their samples"
LINK = "images that are links within a tar"
_ADVICE = {UNREAD: "convert them", PART: "a sample has one picture", LINK: "pack the files themselves"}


class Skipped:
    """Counts of the files that a source's last listing skipped, by reason and suffix."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._examples: dict[str, str] = {}

    def clear(self) -> None:
        """Reset the counts before a new listing."""
        self._counts.clear()
        self._examples.clear()

    def add(self, why: str, name: str) -> None:
        """Count a file. why: UNREAD, PART or LINK."""
        self._counts.setdefault(why, Counter())[PurePosixPath(name).suffix.lower()] += 1
        self._examples.setdefault(why, name.encode(errors="backslashreplace").decode())

    def lines(self) -> list[str]:
        """One message per reason, with counts and an example."""
        return [f"skipped {self._message(why)}" for why in self._counts]

    def _message(self, why: str) -> str:
        from attnx.images import HEIF_SUFFIXES, image_suffixes

        counts = self._counts[why]
        suffixes = ", ".join(f"{suffix} {count}" for suffix, count in counts.most_common())
        advice = _ADVICE[why]
        if why == UNREAD and set(counts) & set(HEIF_SUFFIXES) - set(image_suffixes()):
            advice += ", or install pillow-heif"
        return f"{counts.total()} {why}: {suffixes}, such as {self._examples[why][:200]}; {advice}"
