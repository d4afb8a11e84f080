"""A Griffe extension: `Example:` sections of docstrings are shown as code, as `Examples:` sections are."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section, before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^([ \t]*)Example:[ \t]*$", r"\1Examples:", obj.docstring.value, flags=re.M)
