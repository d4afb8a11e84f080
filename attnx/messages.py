"""Messages of a command on stderr: each is a line, which begins with the program's name."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

__all__ = ["one_line", "say", "warnings_in_lines"]


def one_line(text: str, most: int = 290) -> str:
    """A text in one line of at most so many characters; of a longer one the middle is left out.

    Newlines and what could move a terminal's cursor are left out, too.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"


def say(text: str) -> None:
    """Writes a line to stderr."""
    print(f"attnx: {one_line(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Inside, a warning is a line without the place in the code. Pillow's are not shown: a row's error says more."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        say(str(message).removeprefix("attnx: "))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        warnings.showwarning = show
        yield
