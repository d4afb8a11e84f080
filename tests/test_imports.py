"""Imports between packages follow `ORDER`: a module imports only from its own line or earlier ones."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    ("attnx.version", "attnx.limits", "attnx.messages", "attnx.remote", "attnx.trace.structure"),
    ("attnx.files",),
    ("attnx.images", "attnx.supervisor"),
    ("attnx.kernels",),
    ("attnx.ops.reducers", "attnx.ops.scores", "attnx.ops.statistics"),
    ("attnx.ops.backends",),
    ("attnx.ops",),
    ("attnx.testing", "attnx.trace.adapters"),
    ("attnx.trace",),
    ("attnx.huggingface", "attnx.methods", "attnx.models"),
    ("attnx.page",),
    ("attnx.extract",),
    ("attnx.jobs",),
    ("attnx.page.browse",),
    ("attnx.figures",),
    ("attnx.picture",),
    ("attnx.demo",),
    ("attnx.cli",),
    ("attnx", "attnx.__main__"),
)
"""A module may import its own package, and packages of lower lines. Imports inside functions count, too."""


def modules() -> dict[str, Path]:
    folders = {"attnx": ROOT / "attnx", "attnx.kernels": ROOT / "kernels"}
    found = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Names of attnx's modules that the file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "attnx")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").partition(".")[0] == "attnx":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else str(node.module)


def floor(module: str) -> int:
    """The line of ORDER with the module or its innermost listed package."""
    named = {name: i for i, line in enumerate(ORDER) for name in line}
    while module not in named:
        module = module.rpartition(".")[0]
    return named[module]


def package(module: str) -> str:
    names = [name for line in ORDER for name in line if name != "attnx"]
    return max((n for n in names if module == n or module.startswith(f"{n}.")), key=len, default=module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_runs_upward(module: str) -> None:
    for other in imports(MODULES[module]):
        same = package(module) == package(other)
        assert same or floor(other) < floor(module), f"{module} imports {other}"


def test_no_circles() -> None:
    graph = {module: set(imports(path, top_level_only=True)) - {module} for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 200
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_backends_and_adapters_do_not_import_one_another() -> None:
    for name in ("eager", "native", "triton"):
        path = MODULES[f"attnx.ops.backends.{name}"]
        others = {f"attnx.ops.backends.{other}" for other in ("eager", "native", "triton")}
        assert not others & set(imports(path)), name


def test_every_line_of_the_plan_is_there() -> None:
    for name in (name for line in ORDER for name in line):
        assert name in MODULES or name == "attnx.kernels", name
