"""Compiles the CPU kernel when it is first wanted, for this processor, and keeps it, as Triton does its kernels.

Compiled at first use rather than at install: a wheel stays pure Python, `pip install` needs no compiler, every machine
of a cluster gets its own instruction set out of one cache, and nothing depends on torch's ABI, since the kernel knows
nothing of torch. It takes five seconds, once.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = ("attention.cpp", "weights.h", "scores.h", "call.h", "simd.h")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
INSTRUCTIONS = {
    "AVX512BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
FALLBACK = {"AVX512BF16": "AVX512"}  # what serves where the compiler is too old for a level
_TIMEOUT = 300  # seconds


@cache
def instructions() -> str:
    """The key of INSTRUCTIONS that this processor can run; torch's own choice, so ATEN_CPU_CAPABILITY lowers it.

    AVX512BF16 only where there is no AMX: what has both multiplies bf16 in its matrix unit, and nobody has measured
    there whether its vectors of them are faster than floats.
    """
    known = torch.backends.cpu.get_cpu_capability()
    if known not in INSTRUCTIONS or platform.machine().lower() not in ("x86_64", "amd64"):
        return "DEFAULT"
    return "AVX512BF16" if known == "AVX512" and has("avx512_bf16", False) and not has("amx_tile", True) else known


def has(feature: str, unknown: bool) -> bool:
    """Whether the processor has it, as torch says; `unknown` where this torch can't tell."""
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: unknown)())


def cache_folder() -> Path:
    """Where compiled kernels are kept: $ATTNX_CACHE_DIR, else attnx in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("ATTNX_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(chosen) if chosen else Path(home) / "attnx").expanduser().absolute()


def compiled(level: str, extra: tuple[str, ...] = ()) -> Path:
    """The path of the shared library; it appears whole or not at all, whoever else compiles it.

    One that is there is taken without asking for a compiler: a cache that was filled on one machine serves others.

    Args:
        level: a key of INSTRUCTIONS.
        extra: further flags, such as a sanitizer's.

    Raises:
        ImportError: no compiler, or it failed; says what is missing.
    """
    flags = (*FLAGS, *INSTRUCTIONS[level], *extra)
    folder = Path(__file__).parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)
    identity = "\0".join((text, os.environ.get("CXX", ""), platform.system(), platform.machine(), *flags))
    try:
        target = cache_folder() / f"cpu-{level.lower()}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not target.exists():
            _compile(_compiler(), flags, folder / SOURCES[0], target)
        _check_owner(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise ImportError(f"the CPU kernel can't be compiled into its cache: {error}; set ATTNX_CACHE_DIR") from error
    return target


def _compile(compiler: list[str], flags: tuple[str, ...], source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as room:
        made = Path(room) / target.name
        command = [*compiler, *flags, str(source), "-o", str(made)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise ImportError(f"{shlex.join(compiler)} did not compile the CPU kernel in {_TIMEOUT} s") from error
        if run.returncode:
            raise ImportError(f"{shlex.join(compiler)} can't compile the CPU kernel: {run.stderr.strip()[-2000:]}")
        with made.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(made, target)


def _check_owner(target: Path) -> None:
    """Code is loaded from there: nobody else may have put it."""
    if hasattr(os, "getuid") and target.stat().st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{target} belongs to another user")


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    expected = shlex.join(chosen) or " or ".join(COMPILERS)
    raise ImportError(
        f"the native CPU kernel needs a C++ compiler: expected {expected} on PATH; found none "
        "(install g++ or clang, or set CXX)"
    )
