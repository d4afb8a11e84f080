"""Messages on stderr: one line each, starting with the program's name."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

__all__ = ["one_line", "printable", "say", "warnings_in_lines"]


def printable(value: object, most: int | None = 100, middle: bool = False) -> str:
    """A value as text in one line, for a message. Characters that can't be printed become escapes.

    Args:
        value: any object; `str` is applied.
        most: largest number of characters; None: no limit.
        middle: cut out the middle of a text that is too long, instead of its end.
    """
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value))
    if most is None or len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}" if middle else f"{text[: most - 3]}..."


def one_line(text: str, most: int = 290) -> str:
    """A message in one line of at most `most` characters. Runs of whitespace become a space; long texts are cut inside.

    Other characters that can't be printed become spaces, because they could move a terminal's cursor.
    """
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return printable(text, most, middle=True)


def say(text: str) -> None:
    """Write a message to stderr."""
    print(f"attnx: {one_line(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_in_lines(spell: Callable[[str], str] = str) -> Iterator[None]:
    """Show warnings inside the `with` as messages without their location. Warnings of Pillow are ignored.

    spell: changes the message of a warning.
    """

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        say(spell(str(message).removeprefix("attnx: ")))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        warnings.showwarning = show
        yield
