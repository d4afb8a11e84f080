"""Compile the CPU kernel for this processor at first use, and cache the shared library, as Triton does.

The kernel is compiled at first use instead of at installation. So the wheel is pure Python, `pip install` needs no
compiler, and the machines of a cluster share a cache with a library for each instruction set. The kernel does not use
torch, so it doesn't depend on its ABI. Compilation takes about five seconds.

Libraries are named cpu-LEVEL-IDENTITY-COMPILER-SHA256.so. IDENTITY is a digest of sources and flags, COMPILER of the
compiler's version, and SHA256 of the file's bytes, which is checked before loading.
"""

import errno
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SOURCES = ("attention.cpp", "statistics.h", "weights.h", "scores.h", "call.h", "simd.h")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast", "-fno-math-errno")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
INSTRUCTIONS = {
    "AVX512BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
FALLBACK = {"AVX512BF16": "AVX512"}  # used if the compiler is too old for a level
_TIMEOUT = 300  # seconds for a compilation
_VERSION_TIMEOUT = 10
_ABANDONED = 600  # seconds after which a temporary folder counts as abandoned
_MIN_FREE = 2**21  # bytes of free disk space; a library has a tenth of it


class CacheError(ImportError):
    """The cache, or a file in it, can't be used. A kernel compiled in another folder may work."""


@cache
def instructions() -> str:
    """The key of INSTRUCTIONS for this processor.

    It follows torch's choice, so the environment variable ATEN_CPU_CAPABILITY can lower it. AVX512BF16 is used only on
    processors without AMX: with AMX, bf16 products run in the matrix unit, and whether AVX512_BF16 is faster than fp32
    there has not been measured.
    """
    known = torch.backends.cpu.get_cpu_capability()
    if known not in INSTRUCTIONS or platform.machine().lower() not in ("x86_64", "amd64"):
        return "DEFAULT"
    return "AVX512BF16" if known == "AVX512" and has("avx512_bf16", False) and not has("amx_tile", True) else known


def has(feature: str, unknown: bool) -> bool:
    """True if torch reports the CPU feature; `unknown` if this version of torch can't tell."""
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: unknown)())


def cache_folder() -> Path:
    """Folder of compiled kernels: $ATTNX_CACHE_DIR, else attnx in $XDG_CACHE_HOME (if absolute) or ~/.cache."""
    chosen = os.environ.get("ATTNX_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = Path(chosen) if chosen else (home if home.is_absolute() else Path("~/.cache")) / "attnx"
    return folder.expanduser().absolute()


def compiled(level: str, extra: tuple[str, ...] = (), folder: Path | None = None) -> Path:
    """Path of the shared library, which is compiled if it is not in the cache. Its file is replaced atomically.

    Without a compiler on this machine, a library of any compiler is used, so a cache filled elsewhere works.

    Args:
        level: a key of INSTRUCTIONS.
        extra: further flags, such as a sanitizer's.
        folder: used instead of the cache folder.

    Raises:
        CacheError: the folder can't be written, or other users can write to it or to a library in it.
        ImportError: there is no compiler, or compilation failed.
    """
    flags = (*FLAGS, *INSTRUCTIONS[level], *extra)
    sources = Path(__file__).parent
    text = "".join((sources / name).read_text(encoding="utf-8") for name in SOURCES)
    identity = "\0".join((text, os.environ.get("CXX", ""), platform.system(), platform.machine(), *flags))
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]
    name = f"cpu-{level.lower()}-{digest}"
    try:
        folder = (folder or cache_folder()).resolve()
        return _found(folder, name) or _compile(flags, sources / SOURCES[0], folder, name)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        reason = f"the CPU kernel can't be compiled into its cache or taken from it: {_line(str(error), 200)}"
        raise CacheError(f"{reason}; set ATTNX_CACHE_DIR") from error


def _found(folder: Path, name: str) -> Path | None:
    """The first undamaged library with this name and compiler, or None. Damaged files are removed."""
    if not folder.exists():
        return None
    _check_private(folder.stat(), folder)
    if not any(folder.glob(f"{name}-*.so")):
        return None
    try:
        version = _version(_compiler())
    except ImportError:
        version = "*"
    for path in sorted(folder.glob(f"{name}-{version}-*.so")):
        if path.stem.endswith(f"-{_digest(path)}"):
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    """SHA-256 of a file that only this user or root can write; "" if the file doesn't exist.

    Raises:
        PermissionError: other users can write to the file, or it is not a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return ""
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_private(status, path)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"it is no regular file: {path}")
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_private(status: os.stat_result, path: Path) -> None:
    """Raise PermissionError if another user owns or can write to a path from which code is loaded."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"it belongs to another user: {path}")
    if status.st_mode & 0o022:
        raise PermissionError(f"other users can write to it (chmod go-w): {path}")


def _compile(flags: tuple[str, ...], source: Path, folder: Path, name: str) -> Path:
    compiler = _compiler()
    _make_private(folder)
    _check_private(folder.stat(), folder)
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < _MIN_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with _temporary_folder(folder) as temporary:
        library = temporary / f"{name}.so"
        run = _run(compiler, (*flags, str(source), "-o", str(library)), _TIMEOUT)
        if run.returncode or not library.exists():
            lines = run.stderr.strip().splitlines() or [f"it ended with status {run.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise ImportError(_line(f"{_named(compiler)} can't compile the CPU kernel: {reason}"))
        library.chmod(0o755)  # independent of the umask
        with library.open("rb") as written:
            os.fsync(written.fileno())
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        return library.replace(folder / f"{name}-{_version(compiler)}-{digest}.so")


def _make_private(folder: Path) -> None:
    """Create the folder and its missing parents with mode 0o700, independent of the umask."""
    if not folder.exists():
        _make_private(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder` for a compilation. Folders of killed compilations are removed first.

    Each compilation holds a shared lock on `folder`, so an exclusive lock shows that no other one is running.
    """
    with _locks(folder) as lock:
        alone = lock("LOCK_EX", "LOCK_NB")
        for leftover in folder.glob("tmp*"):
            with suppress(FileNotFoundError):
                # The age decides if there are no locks, or for folders of earlier versions.
                old = time.time() - leftover.stat().st_mtime > _ABANDONED
                if old or (alone and leftover.name.startswith("tmp-")):
                    shutil.rmtree(leftover, ignore_errors=True)
        lock("LOCK_SH")
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)


@contextmanager
def _locks(folder: Path) -> Iterator[Callable[..., bool]]:
    """A function that locks the folder with fcntl's constants of the given names.

    It returns False if that fails, because some file systems have no locks.
    """
    if fcntl is None:
        yield lambda *_: False
        return
    descriptor = os.open(folder, os.O_RDONLY)

    def lock(*how: str) -> bool:
        try:
            fcntl.flock(descriptor, sum(getattr(fcntl, name) for name in how))
        except OSError:
            return False
        return True

    try:
        yield lock
    finally:
        os.close(descriptor)


def _compiler() -> tuple[str, ...]:
    try:
        chosen = tuple(shlex.split(os.environ.get("CXX", "")))
    except ValueError as error:
        raise ImportError(_line(f"CXX={os.environ['CXX'][:150]} is no command: {error}")) from error
    for command in [chosen] if chosen else [(name,) for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    expected = _line(shlex.join(chosen), 150) or " or ".join(COMPILERS)
    raise ImportError(
        f"the native CPU kernel needs a C++ compiler: expected {expected} on PATH; found none "
        "(install g++ or clang, or set CXX)"
    )


@cache
def _version(compiler: tuple[str, ...]) -> str:
    """Eight hexadecimal digits of the digest of the first line of `COMPILER --version`."""
    version = _run(compiler, ("--version",), _VERSION_TIMEOUT).stdout.partition("\n")[0]
    return hashlib.sha256(version.encode()).hexdigest()[:8]


def _run(compiler: tuple[str, ...], arguments: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            (*compiler, *arguments),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise ImportError(f"{_named(compiler)} did not compile the CPU kernel in {timeout} s") from error
    except OSError as error:
        raise ImportError(_line(f"{_named(compiler)} can't be run: {error}")) from error


def _named(compiler: tuple[str, ...]) -> str:
    command = _line(shlex.join(compiler), 150)
    return f"CXX={command}" if os.environ.get("CXX", "").strip() else command


def _line(text: str, length: int = 300) -> str:
    return " ".join(text.split())[:length]
