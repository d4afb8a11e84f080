"""Models of a torch.hub folder on this machine: "torchhub:FOLDER:ENTRY". It runs the code in that folder."""

import difflib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torch import nn

from attnx.messages import printable
from attnx.models.checkpoint import first_line
from attnx.models.loaded import Loaded, no_download
from attnx.trace.layout import declared_input


def absolute_name(model: str) -> str:
    """The name of a model with an absolute folder, so that it is valid in any process."""
    kind, _, rest = model.partition(":")
    folder, colon, entry = rest.rpartition(":")
    return f"{kind}:{Path(folder).absolute()}:{entry}" if kind == "torchhub" and colon and folder else model


def load_torchhub(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    """The model that ENTRY of FOLDER/hubconf.py returns. This runs the code in FOLDER.

    Images get ImageNet's mean and std and bicubic interpolation, because an entry declares no preprocessing.

    Args:
        name: FOLDER:ENTRY. FOLDER has a hubconf.py; nothing is fetched from a repository.
        pretrained: the entry's argument `pretrained`. An entry without it chooses its weights itself, with a warning.
        image_size: (height, width) in pixels; None: the size that the model declares, or 224.

    Raises:
        ValueError: no such folder, hubconf.py or entry; the entry fails or gives no model.
        ConnectionError: the entry could not download its weights.
    """
    path, entry_name = _parts(name)
    try:
        with _imports_from(path):
            entry = _entry(path, entry_name)
            options = {"pretrained": pretrained} if "pretrained" in inspect.signature(entry).parameters else {}
            if not options:
                text = f"torchhub:{printable(name, 150)} has no argument pretrained; it chooses its weights itself"
                warnings.warn(text, stacklevel=2)
            model = entry(**options)
    except _NoEntryError:
        raise
    except (Exception, SystemExit) as error:
        if pretrained and isinstance(error, (URLError, ConnectionError, TimeoutError)):
            raise no_download(f"torchhub:{name}", error) from error
        raise _failed(name, error) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: torchhub:{printable(name, 150)}: expected an nn.Module; got {type(model).__name__}")
    declared = declared_input(model)
    return Loaded(f"torchhub:{name}", model, image_size or (declared[1:] if declared else (224, 224)))


def _parts(name: str) -> tuple[Path, str]:
    """The folder and the entry of FOLDER:ENTRY."""
    folder, _, entry = name.rpartition(":")
    if not folder or not entry:
        raise ValueError(f"model: expected torchhub:FOLDER:ENTRY; got torchhub:{printable(name, 150)}")
    path = Path(folder)
    if not (path / "hubconf.py").is_file():
        raise ValueError(
            f"model: torchhub: expected a folder on this machine with a hubconf.py; got {printable(folder, 150)!r}"
        )
    return path.absolute(), entry


def _failed(name: str, error: BaseException) -> ValueError:
    message = first_line(error) if isinstance(error, Exception) else "it exits"
    return ValueError(f"model: torchhub:{printable(name, 150)} fails: {type(error).__name__}: {message}")


def _entry(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` of the folder's hubconf.py, which is run.

    Raises:
        ValueError: no such function; the message lists those that exist.
    """
    spec = importlib.util.spec_from_file_location("hubconf", path / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in entries:
        close = difflib.get_close_matches(name, entries, 3)
        hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(entries) or 'none'}"
        raise _NoEntryError(f"model: {printable(path, 150)}/hubconf.py has no entry {printable(name, 80)!r}; {hint}")
    entry: Callable[..., Any] = getattr(module, name)
    return entry


@contextmanager
def _imports_from(path: Path) -> Iterator[None]:
    """A context manager in which modules are imported from the folder, and not from a folder that was loaded before."""
    for name in [name for name, folder in _IMPORTED.items() if folder != path]:
        sys.modules.pop(name, None)
        del _IMPORTED[name]
    before = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        new = {name: sys.modules[name] for name in set(sys.modules) - before}
        _IMPORTED.update({name: path for name, module in new.items() if _lies_in(path, module)})


def _lies_in(path: Path, module: Any) -> bool:
    """True if a module, or one of the folders of a package, lies in the folder."""
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or [])]
    return any(path in Path(place).parents for place in places if place)


_IMPORTED: dict[str, Path] = {}  # {module: the folder that it was imported from}


class _NoEntryError(ValueError):
    """hubconf.py has no such function."""
