"""The captures that are installed, in all threads, and those that run in this one."""

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from attnx.trace.interceptor import Interceptor


class _Active(threading.local):
    """Interceptors that capture a call in this thread."""

    def __init__(self) -> None:
        self.interceptors: list[Interceptor] = []


ACTIVE = _Active()
INSTALLED: "weakref.WeakSet[Interceptor]" = weakref.WeakSet()


def route_again() -> None:
    """Switch the blocks of the remaining captures to SDPA again after another capture of them ended."""
    for interceptor in list(INSTALLED):
        interceptor.installed.route_again()


def is_intercepted(modules: Iterable[nn.Module]) -> bool:
    """True if an installed capture, in any thread, intercepts one of the modules."""
    return bool(_intercepting(modules))


def unbind(model: nn.Module) -> bool:
    """Remove the clones of other captures of the model, so that each sees every call; True if there are others."""
    others = _intercepting(model.modules())
    for interceptor in others:
        interceptor.installed.unbind()
    return bool(others)


def _intercepting(modules: Iterable[nn.Module]) -> "list[Interceptor]":
    live = list(INSTALLED)
    ids = {id(module) for module in modules} if live else set()
    return [interceptor for interceptor in live if any(id(other) in ids for other in interceptor.model.modules())]
