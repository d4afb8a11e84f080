"""Compiles the CPU kernel when it is first wanted, for this processor, and keeps it, as Triton does its kernels.

Compiled at first use rather than at install: a wheel stays pure Python, `pip install` needs no compiler, every machine
of a cluster gets its own instruction set out of one cache, and nothing depends on torch's ABI, since the kernel knows
nothing of torch. It takes four seconds, once.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = ("attention.cpp", "simd.h")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast")
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}


@cache
def instructions() -> str:
    """The key of INSTRUCTIONS that this processor can run; torch's own choice, so ATEN_CPU_CAPABILITY lowers it."""
    known = torch.backends.cpu.get_cpu_capability()
    return known if known in INSTRUCTIONS and platform.machine().lower() in ("x86_64", "amd64") else "DEFAULT"


def cache_folder() -> Path:
    """Where compiled kernels are kept: $ATTNX_CACHE_DIR, else attnx in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("ATTNX_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnx"


def compiled(level: str, extra: tuple[str, ...] = ()) -> Path:
    """The path of the shared library; it appears whole or not at all, whoever else compiles it.

    Args:
        level: a key of INSTRUCTIONS.
        extra: further flags, such as a sanitizer's.

    Raises:
        ImportError: no compiler, or it failed; says what is missing.
    """
    compiler = _compiler()
    flags = (*FLAGS, *INSTRUCTIONS[level], *extra)
    folder = Path(__file__).parent
    text = "".join((folder / name).read_text() for name in SOURCES)
    identity = "\0".join((text, compiler, _version(compiler), platform.machine(), *flags))
    target = cache_folder() / f"cpu-{level.lower()}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as room:
            made = Path(room) / target.name
            run = subprocess.run(
                [compiler, *flags, str(folder / SOURCES[0]), "-o", str(made)], capture_output=True, text=True
            )
            if run.returncode:
                raise ImportError(f"{compiler} can't compile the CPU kernel: {run.stderr.strip()[-2000:]}")
            os.replace(made, target)
    except OSError as error:
        raise ImportError(f"the CPU kernel can't be compiled in {target.parent}: {error}") from error
    return target


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise ImportError(
        f"the native CPU kernel needs a C++ compiler: expected {chosen or ' or '.join(COMPILERS)} on PATH; found none "
        "(install g++ or clang, or set CXX)"
    )


@cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImportError(f"{compiler} --version failed: {error}") from error
