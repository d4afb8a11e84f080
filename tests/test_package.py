"""What an import costs, and whose the name `kernels` is."""

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


def test_wheel_contains_kernels_and_weights(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("attnx", "kernels"):
        shutil.copytree(ROOT / name, source / name)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    names = zipfile.ZipFile(tmp_path / python(code, source).splitlines()[-1]).namelist()
    for name in (
        "kernels/map.py",
        "kernels/cpu/build.py",
        *(f"kernels/cpu/{source}" for source in SOURCES),
        "kernels.py",
        "demo/weights.safetensors",
        "backends/eager.py",
    ):
        assert f"attnx/{name}" in names
    assert not [name for name in names if name.startswith("kernels/")]
