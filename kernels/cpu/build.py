"""Compiles the CPU kernel when it is first wanted, for this processor, and keeps it, as Triton does its kernels.

Compiled at first use rather than at install: a wheel stays pure Python, `pip install` needs no compiler, every machine
of a cluster gets its own instruction set out of one cache, and nothing depends on torch's ABI, since the kernel knows
nothing of torch. It takes five seconds, once.

A file of the cache is named cpu-LEVEL-IDENTITY-COMPILER-SHA256.so: what it was made of, the compiler's version, and the
digest of its bytes, which is checked before it is loaded.
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
_TIMEOUT = 300  # seconds that a compilation may take
_VERSION_TIMEOUT = 10
_ABANDONED = 600  # seconds after which nobody compiles in a folder any more
_ROOM = 2**21  # bytes; a kernel takes a tenth of it


class CacheError(ImportError):
    """The cache can't be used, or not what is in it; a kernel compiled elsewhere may work."""


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
    """Where compiled kernels are kept: $ATTNX_CACHE_DIR, else attnx in $XDG_CACHE_HOME (if absolute) or ~/.cache."""
    chosen = os.environ.get("ATTNX_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = Path(chosen) if chosen else (home if home.is_absolute() else Path("~/.cache")) / "attnx"
    return folder.expanduser().absolute()


def compiled(level: str, extra: tuple[str, ...] = (), folder: Path | None = None) -> Path:
    """The path of the shared library; it appears whole or not at all, whoever else compiles it.

    Where there is no compiler, one of any compiler is taken: a cache that was filled on one machine serves others.

    Args:
        level: a key of INSTRUCTIONS.
        extra: further flags, such as a sanitizer's.
        folder: where it is looked for and put, in place of the cache.

    Raises:
        CacheError: the folder can't be written, or another user could have put or changed what is in it.
        ImportError: no compiler, or it failed; says what is missing.
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
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = f"the CPU kernel can't be compiled into its cache or taken from it: {_line(str(error), 200)}"
        raise CacheError(f"{reason}; set ATTNX_CACHE_DIR") from error


def _found(folder: Path, name: str) -> Path | None:
    """The first whole file of that name and this compiler; damaged ones are removed."""
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
    """The SHA-256 of a file that nobody else can have put there; empty if it has just been removed."""
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
    """Code is loaded from there: nobody else may have put it, or be able to change it."""
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
    if usage.total and usage.free < _ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with _room(folder) as room:
        made = room / f"{name}.so"
        run = _run(compiler, (*flags, str(source), "-o", str(made)), _TIMEOUT)
        if run.returncode or not made.exists():
            lines = run.stderr.strip().splitlines() or [f"it ended with status {run.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise ImportError(_line(f"{_named(compiler)} can't compile the CPU kernel: {reason}"))
        made.chmod(0o755)  # whatever the umask is
        with made.open("rb") as written:
            os.fsync(written.fileno())
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        return made.replace(folder / f"{name}-{_version(compiler)}-{digest}.so")


def _make_private(folder: Path) -> None:
    """Makes the folder and the parents that are missing, for this user alone, whatever the umask is."""
    if not folder.exists():
        _make_private(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)


@contextmanager
def _room(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to compile in. Those that killed compilations left are removed first.

    Every compilation holds a shared lock on `folder`: who gets it exclusively knows that no other is under way.
    """
    with _locks(folder) as lock:
        alone = lock("LOCK_EX", "LOCK_NB")
        for left in folder.glob("tmp*"):
            with suppress(FileNotFoundError):
                old = time.time() - left.stat().st_mtime > _ABANDONED  # without a lock, or of an earlier version
                if old or (alone and left.name.startswith("tmp-")):
                    shutil.rmtree(left, ignore_errors=True)
        lock("LOCK_SH")
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder, ignore_cleanup_errors=True) as room:
            yield Path(room)


@contextmanager
def _locks(folder: Path) -> Iterator[Callable[..., bool]]:
    """Locks the folder, by names of fcntl's constants, and says whether it could: some file systems have no locks."""
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
    """Eight digits that stand for the first line of what the compiler says of its version."""
    said = _run(compiler, ("--version",), _VERSION_TIMEOUT).stdout.partition("\n")[0]
    return hashlib.sha256(said.encode()).hexdigest()[:8]


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
