"""Advice in messages, in the spelling of the command line: `layers=[0, 1]` becomes `--layers 0 --layers 1`."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Parameter, signature
from typing import Any, NamedTuple


class _Option(NamedTuple):
    """An option: its name, and that of its opposite, such as --no-pretrained; "" if there is none."""

    name: str
    opposite: str


# The options of the command that runs: {argument of the function in Python: option}.
_OPTIONS: ContextVar[dict[str, _Option] | None] = ContextVar("options", default=None)

# A value without quotes is a word in capitals, a flag or a number, so that parts of file names are left alone. There
# may be no value: "choose layers= of one kind".
_QUOTED = r"""\[[^\[\]]*\]|\([^()]*\)|'[^']*'|"[^"]*\""""
_BARE = r"(?:[A-Z]{2,}|True|False|None|-?\d+(?:\.\d+)?)(?![\w./\\])|(?=[\s;,)]|$)"
_ARGUMENT = re.compile(rf"(?<![\w./\\(='\"-])([a-z][a-z_]*)=({_QUOTED}|{_BARE})")


@contextmanager
def options_of(command: Callable[..., None]) -> Iterator[None]:
    """Inside the `with`, `in_options` knows the options of a command, from the signature of its function."""
    found = {name: _option_of(each) for name, each in signature(command).parameters.items()}
    token = _OPTIONS.set({name: option for name, option in found.items() if option is not None})
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def in_options(message: str) -> str:
    """The message with the arguments that are options of the running command in their spelling there.

    Example:
        >>> def command(pretrained: bool, layers: list[str]) -> None: ...
        >>> with options_of(command):
        ...     in_options("pass pretrained=False, or choose layers=['a', 'b'] of one kind; got rows=0")
        'pass --no-pretrained, or choose --layers a --layers b of one kind; got rows=0'
        >>> with options_of(command):
        ...     in_options("layers: expected a name; got 'x'")
        "--layers: expected a name; got 'x'"
    """
    options = _OPTIONS.get() or {}
    if "TokenLayout(" in message:
        # No option has a layout.
        message = message.replace("pass layout=", "in Python, pass layout=")
    message = _ARGUMENT.sub(lambda found: _spelling(found, options), message)
    name, colon, rest = message.partition(": ")
    option = options.get(name.replace("-", "_"))
    return f"{option.name}{colon}{rest}" if option else message


def _spelling(found: re.Match[str], options: dict[str, _Option]) -> str:
    """An argument and its value as options; unchanged if the command has no such option, or it can't have the value."""
    name, text = found.groups()
    if name not in options:
        return found[0]
    option, opposite = options[name]
    try:
        value: Any = ast.literal_eval(text) if text else ""
    except (ValueError, SyntaxError):
        value = text
    if isinstance(value, bool):
        return option if value else opposite or found[0]
    if value == "":
        return option
    several = value if isinstance(value, (list, tuple)) else [value]
    if name == "image_size" and len(several) == 2:
        return f"{option} {several[0]}x{several[1]}"
    return " ".join(f"{option} {shlex.quote(str(each))}" for each in several) or found[0]


def _option_of(parameter: Parameter) -> _Option | None:
    """The option of a command's parameter; None for an argument, and for a former name."""
    for each in getattr(parameter.annotation, "__metadata__", ()):
        if getattr(each, "hidden", False) or type(each).__name__ == "ArgumentInfo":
            return None
        # In an annotation typer stores the first name of an option as its default.
        names = getattr(each, "default", None), *(getattr(each, "param_decls", None) or ())
        named = [name for name in names if isinstance(name, str) and name.startswith("--")]
        if named:
            # "--colorbar" has no opposite, unlike "--colorbar/--plain".
            name, _, opposite = named[0].partition("/")
            return _Option(name, opposite)
    spelt = parameter.name.replace("_", "-")
    return _Option(f"--{spelt}", f"--no-{spelt}")
