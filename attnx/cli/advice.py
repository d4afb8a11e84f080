"""Advice in messages, in the spelling of the command line: `layers=[0, 1]` becomes `--layers 0 --layers 1`."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Parameter, signature
from typing import Any

# The options of the command that runs: {argument of the function in Python: option}.
_OPTIONS: ContextVar[dict[str, str] | None] = ContextVar("options", default=None)

# A value without quotes is a word in capitals, a flag or a number, so that parts of file names are left alone. There
# may be no value: "choose layers= of one kind".
_QUOTED = r"""\[[^\[\]]*\]|\([^()]*\)|'[^']*'|"[^"]*\""""
_BARE = r"(?:[A-Z]{2,}|True|False|None|-?\d+(?:\.\d+)?)(?![\w./\\])|(?=[\s;,)]|$)"
_ARGUMENT = re.compile(rf"(?<![\w./\\(='\"-])([a-z][a-z_]*)=({_QUOTED}|{_BARE})")


@contextmanager
def options_of(command: Callable[..., None]) -> Iterator[None]:
    """Inside the `with`, `in_options` knows the options of a command, from the signature of its function."""
    found = {name: _spelling(each) for name, each in signature(command).parameters.items()}
    token = _OPTIONS.set({name: option for name, option in found.items() if option})
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
    message = _ARGUMENT.sub(lambda found: _option(found, options), message)
    name, colon, rest = message.partition(": ")
    option = options.get(name.replace("-", "_"))
    return f"{option}{colon}{rest}" if option else message


def _option(found: re.Match[str], options: dict[str, str]) -> str:
    """An argument and its value as options; unchanged if the command has no such option."""
    name, text = found.groups()
    if name not in options:
        return found[0]
    option = options[name]
    try:
        value: Any = ast.literal_eval(text) if text else ""
    except (ValueError, SyntaxError):
        value = text
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    if value == "":
        return option
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return f"{option} {value[0]}x{value[1]}"
    several = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(f"{option} {shlex.quote(str(each))}" for each in several)


def _spelling(parameter: Parameter) -> str:
    """The option of a command's parameter; "" for an argument, and for a former name."""
    for each in getattr(parameter.annotation, "__metadata__", ()):
        if getattr(each, "hidden", False) or type(each).__name__ == "ArgumentInfo":
            return ""
        # In an annotation typer stores the first name of an option as its default.
        names = getattr(each, "default", None), *(getattr(each, "param_decls", None) or ())
        named = [name for name in names if isinstance(name, str) and name.startswith("--")]
        if named:
            return named[0]
    return "--" + parameter.name.replace("_", "-")
