"""The import loads few modules, and the package does not claim the name `kernels`."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from attnx.kernels.cpu.build import SOURCES

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path = ROOT) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_is_light() -> None:
    loaded = python(
        "import torch, sys; before = set(sys.modules); import attnx\n"
        "heavy = {'triton', 'timm', 'transformers', 'matplotlib', 'pyarrow', 'typer', 'rich', 'torchvision'}\n"
        "print(sorted(heavy & {m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    assert loaded == "[]"


def test_kernels_import_and_the_bare_name_is_not_ours(tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import attnx.kernels as k; print(k.__path__[0])"
        where = python(code, folder)
        assert Path(where) == ROOT / "kernels"
    # `kernels` may be Hugging Face's package, or a folder without code, never a module of ours.
    origin = python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import attnx.kernels.configs, importlib.util as u\n"
        "spec = u.find_spec('kernels'); print(spec and spec.origin)",
        tmp_path,
    )
    assert not origin.startswith(str(ROOT))


def test_transformers_takes_no_notice_of_the_folder() -> None:
    answer = python(
        "import attnx, importlib.metadata as m, transformers.utils as u\n"
        "installed = any(d.name == 'kernels' for d in m.distributions())\n"
        "print(bool(u.is_kernels_available()) == installed)"
    )
    assert answer == "True"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy of the sources."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("attnx", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    return folder / python(code, source).splitlines()[-1]


def test_the_wheel_has_every_module_and_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"attnx": ROOT / "attnx", "attnx/kernels": ROOT / "kernels"}
    modules = [f"{name}/{path.relative_to(f)}" for name, f in folders.items() for path in f.rglob("*.py")]
    assert len(modules) > 120
    weights = [f"attnx/demo/{name}.safetensors" for name in ("weights", "pair")]
    sources = [f"attnx/kernels/cpu/{source}" for source in SOURCES]
    assert {*modules, *weights, *sources} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]


def test_an_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '').lower()"
        " and 'editable' not in str(f).lower()]\n"
        "import torch, attnx, attnx.kernels.configs, attnx.kernels.inspect.machine_code\n"
        "from attnx.models.loading import load_model\n"
        "q = torch.randn(1, 2, 5, 8); out, amap = attnx.attention(q, q, q)\n"
        "maps = attnx.Extractor(load_model('demo').model)(torch.randn(1, 3, 96, 96))\n"
        "print(attnx.__file__, attnx.kernels.__path__[0], tuple(amap.shape), tuple(maps.shape), attnx.__version__)"
    )
    version = re.search(r'VERSION = "(.*)"', (ROOT / "attnx" / "version.py").read_text())
    assert version is not None
    expected = f"{site}/attnx/__init__.py {site}/attnx/kernels (1, 5, 5) (1, 12, 12) {version[1]}"
    assert python(code, tmp_path) == expected
    assert version[1] in wheel.name


def test_python_m_attnx_is_the_command(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "attnx", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "extract" in run.stdout
