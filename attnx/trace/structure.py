"""The names and classes of a model's modules, found once and kept while they stay the same."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import nn

Found = TypeVar("Found")


class Structure:
    """A model's modules by name, without keeping them alive.

    Attributes:
        names: clean names of all modules, outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(clean_name(name), module) for name, module in model.named_modules()]
        self.names = tuple(name for name, _ in named)
        self._modules = [ref(module) for _, module in named]
        self._chosen: dict[Callable[[nn.Module], bool], list[int]] = {}
        self._derived: dict[Any, Any] = {}
        # A module that contains itself has no end here: its structure is not kept.
        self._contents = _contents(model, 4 * len(named) + 64)

    def is_of(self, model: nn.Module) -> bool:
        """True if the model still has the same modules, of the same classes and names."""
        contents = self._contents
        return contents is not None and _contents(model, len(contents[0])) == contents

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """(clean name, module) of all modules, outermost first."""
        return [(name, self._module(i)) for i, name in enumerate(self.names)]

    def where(self, test: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
        """(clean name, module) of the modules that pass a test, outermost first.

        Args:
            test: a function that always gives the same for a module; its results are kept.
        """
        if test not in self._chosen:
            self._chosen[test] = [i for i in range(len(self.names)) if test(self._module(i))]
        return [(self.names[i], self._module(i)) for i in self._chosen[test]]

    def derived(self, find: Callable[..., Found], *args: Hashable) -> Found:
        """The result of find(structure, *args), which is kept. It must not keep modules alive."""
        key = (find, *args)
        if key not in self._derived:
            self._derived[key] = find(self, *args)
        result: Found = self._derived[key]
        return result

    def _module(self, index: int) -> nn.Module:
        module: nn.Module | None = self._modules[index]()
        assert module is not None, f"{self.names[index]} was deleted"
        return module


def structure_of(model: nn.Module) -> Structure:
    """The structure of a model, kept from call to call while its modules are the same."""
    kept = _KEPT.get(model)
    if kept is None or not kept.is_of(model):
        kept = _KEPT[model] = Structure(model)
    return kept


def clean_name(name: str) -> str:
    """A module's name without the wrapper that torch.compile puts around a module."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def _contents(model: nn.Module, most: int) -> tuple[list[int], list[type], list[str]] | None:
    """Identities, classes and names of all modules, level by level; None for more than `most`."""
    found: list[Any] = [model]
    names: list[str] = []
    for module in found:
        children = () if module is None else module._modules
        if children:
            found += children.values()
            names += children.keys()  # the modules of a scripted module can't be iterated over
            if len(found) > most:
                return None
    return list(map(id, found)), list(map(type, found)), names


_KEPT: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()
