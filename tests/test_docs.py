"""The snippets of README.md and of docs/, the examples of the docstrings, and the site itself.

Python blocks of a page run in order, in one namespace, in a folder of their own. In bash blocks the lines that start
with `attnx` or `python -m attnx` run. The first line of a block may exclude it:

    # needs a download     python: compiled only
    # needs a GPU          python: compiled only
    # not run: <reason>    bash: only the options are compared with the command's
"""

import doctest
import importlib.util
import inspect
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import attnx
from attnx.cli.main import app
from attnx.demo.scenes import CLASSES, draw_scene
from attnx.images import read_image
from attnx.jobs.columns import MapRow
from attnx.models.albef_checkpoint import load_albef
from attnx.models.loading import load_model

sybil = pytest.importorskip("sybil")
from sybil.evaluators.python import PythonEvaluator, pad  # noqa: E402
from sybil.parsers.markdown import CodeBlockParser  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMPILED_ONLY = ("# needs a download", "# needs a GPU")
NOT_RUN = "# not run: "
PHOTOS = ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "sub/e.jpg", "sub/f.jpg")
# Pages whose commands run in processes of their own, and the seconds that one command may take.
LONGEST = 120
OWN_PROCESS = ("README.md",)
MORE_NAMES = {
    "attnx.images.read_image": read_image,
    "attnx.models.loading.load_model": load_model,
    "attnx.models.albef_checkpoint.load_albef": load_albef,
    "attnx.jobs.columns.MapRow": MapRow,
    **{
        f"attnx.picture.{name}": getattr(attnx.picture, name)
        for name in ("Sheet", "heads_grid", "layers_figure", "overlay")
    },
}
MODULES = {"attnx.huggingface", "attnx.picture"}


def name_of(page: Path) -> str:
    """The path relative to the checkout, used as the name of a test."""
    return str(page.relative_to(ROOT))


def run_python(example: Any) -> None:
    """Run a block in the namespace of its page, or only compile it."""
    if example.parsed.lstrip().startswith(COMPILED_ONLY):
        compile(pad(example.parsed, example.line + example.parsed.line_offset), example.path, "exec")
    else:
        PythonEvaluator()(example)


def commands(block: str) -> Iterator[list[str]]:
    """The words of every line, continuation lines joined, comments removed."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def arguments(words: list[str]) -> list[str] | None:
    """The words after `attnx`, also behind torchrun or ray job submit; None if the line has no `attnx`."""
    return words[words.index("attnx") + 1 :] if "attnx" in words else None


def check_options(words: list[str]) -> None:
    """Fail unless the command exists and has every option of the line."""
    given = arguments(words)
    if given is None:
        return
    group: Any = typer.main.get_command(app)
    name = next((word for word in given if not word.startswith("-")), None)
    command = group.commands.get(name, group) if name else group
    assert name is None or command is not group, f"attnx has no command {name!r}: {' '.join(words)}"
    known = {"--help", *(option for p in command.params for option in (*p.opts, *p.secondary_opts))}
    unknown = [word for word in given if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown, f"attnx {name} has no option {', '.join(unknown)}: {' '.join(words)}"


def run_bash(example: Any) -> None:
    """Check the options of a block, and run its attnx commands unless the block is marked.

    Commands of README.md run in processes of their own, as a user runs them. The others run here, because imports would
    take most of their time.
    """
    skipped = example.parsed.lstrip().startswith(NOT_RUN)
    for words in commands(example.parsed):
        check_options(words)
        module = words[:2] == ["python", "-m"] and words[2].partition(".")[0] == "attnx"
        if skipped or not (words[0] == "attnx" or module):
            continue
        where = f"{example.path}:{example.line}: {' '.join(words)}"
        if words[0] == "attnx" and Path(example.path).name not in OWN_PROCESS:
            here = CliRunner().invoke(app, words[1:])
            assert here.exit_code == 0, f"{where}: exit code {here.exit_code}\n{here.output}\n{here.exception!r}"
            continue
        command = [sys.executable, *(words[1:] if module else ("-m", *words))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=environment())
        assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def environment() -> dict[str, str]:
    """The environment of a command: this checkout, no network, no GPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a page, with photos/ and captions.csv. The network is disabled."""
    lines = ["path,caption"]
    for i, name in enumerate(PHOTOS):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scene = draw_scene(i)
        Image.fromarray(scene.image).resize((160, 120)).save(path, quality=90)
        lines.append(f"{name},a {CLASSES[scene.label]}")
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionError(f"a snippet connects to {address}; its first line must be {COMPILED_ONLY[0]!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    return tmp_path


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_snippets_of_a_page_run(page: Path, folder: Path) -> None:
    parsers = [CodeBlockParser("python", run_python), CodeBlockParser("bash", run_bash)]
    torch.manual_seed(0)
    for example in sybil.Sybil(parsers=parsers, path=str(ROOT)).parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_snippet_escapes_the_test(page: Path) -> None:
    """Blocks start with exactly ```python or ```bash, because blocks with other spellings would not run."""
    marks = re.findall(r"^[ \t]*```+[ \t]*(\S.*)$", page.read_text(), re.MULTILINE)
    assert [mark for mark in marks if re.match(r"py|bash|sh|console", mark) and mark not in ("python", "bash")] == []


def documented() -> dict[str, Any]:
    """{full name: object} of every public name."""
    return {f"attnx.{name}": getattr(attnx, name) for name in attnx.__all__} | MORE_NAMES


@pytest.mark.parametrize("name", documented())
def test_the_examples_of_a_docstring(name: str, folder: Path) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in doctest.DocTestFinder().find(documented()[name], name, globs={"attnx": attnx, "torch": torch}):
        torch.manual_seed(0)
        said: list[str] = []
        runner.run(test, out=said.append)
        assert not said, "".join(said)


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    functions = {f"attnx.huggingface.{name}" for name in ("use", "register")}
    names = (set(documented()) | functions) - MODULES
    assert names <= set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), name


@pytest.mark.parametrize("script", sorted((ROOT / "docs").glob("make_*.py")), ids=name_of)
def test_the_scripts_of_the_docs_find_what_they_import(script: Path) -> None:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_pictures_are_small() -> None:
    sizes = {name_of(path): path.stat().st_size for path in (ROOT / "docs" / "gallery").iterdir()}
    assert not {name: size for name, size in sizes.items() if size > 200_000}


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))), reason="needs attnx[docs]"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stdout + done.stderr
    outside = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//')
    assert [page.name for page in tmp_path.rglob("*.html") if outside.search(page.read_text())] == []
