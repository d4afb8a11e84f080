"""Runs a job in a child process, and restarts it when it dies.

A picture that kills the model's process would end every run at the same place. So the command is forked: the parent
waits and restarts the job, which continues where it stopped. The job's attempt notes decide what is tried next. The
parent also owns the folder of temporary files, and removes it at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from attnx.messages import say

__all__ = [
    "ENDING",
    "RESTART",
    "can_supervise",
    "die_with",
    "is_restart",
    "is_supervised",
    "progressed",
    "remember",
    "remembered",
    "restart",
    "supervise",
]

RESTART = 86  # exit code that requests a restart
_TWICE = 1.0  # seconds in which a second signal counts as a duplicate
_MOST = 30  # restarts in a row without a shard
_PREFIX = "attnx-run-"
_LONGEST = 60  # characters of the temporary folder's path, because paths of sockets are limited
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_status: int | None = None
_restarted = False


def can_supervise() -> bool:
    """True if the system has fork and sigtimedwait, as Linux does."""
    return hasattr(os, "fork") and hasattr(signal, "sigtimedwait")


def is_supervised() -> bool:
    """True in a process that is restarted when it dies."""
    return _status is not None


def is_restart() -> bool:
    """True in a process that was started because an earlier process of the same run died."""
    return _restarted


def progressed() -> None:
    """Report progress to the supervisor. Called once before the first shard, and after each shard or piece."""
    if _status is not None:
        with contextlib.suppress(OSError):
            os.write(_status, b".")


def remembered() -> set[int]:
    """The shards that all processes of this run have made, so that a restart does not repeat them."""
    try:
        return {int(line) for line in _memory().read_text().split()}
    except (OSError, ValueError):
        return set()


def remember(shard: int) -> None:
    """Record a shard that was made, for the process after a restart."""
    if _status is not None:
        with contextlib.suppress(OSError), _memory().open("a") as file:
            file.write(f"{shard}\n")


def _memory() -> Path:
    return Path(tempfile.gettempdir(), "made") if _status is not None else Path(os.devnull)


def restart() -> None:
    """End this process at once and request a restart."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(RESTART)


def supervise() -> None:
    """Fork. Returns in the child process; the calling process waits for it and exits with its exit code."""
    global _status, _restarted
    # If SIGCHLD is ignored, the system discards the child's exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with temporary_folder():
        restarts = 0
        while True:
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            parent = os.getpid()
            signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, signal.SIGCHLD})
            child = os.fork()
            if child == 0:
                os.close(reading)
                _status = writing
                die_with(parent)
                # Libraries must not wait for input.
                with open(os.devnull) as nothing:
                    os.dup2(nothing.fileno(), 0)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ENDING, signal.SIGCHLD})
                return
            os.close(writing)
            status, ended_by_us = _wait(child)
            received = _drain(reading)
            code = os.waitstatus_to_exitcode(status)
            if code >= 0 and code != RESTART:
                sys.exit(code)
            if ended_by_us is not None:
                sys.exit(128 + ended_by_us)
            how = "" if code == RESTART else f"the process ended with {signal.Signals(-code).name}"
            restarts, _restarted = (1 if len(received) > 1 else restarts + 1), True
            if not received:
                say(f"{how} before the first shard was started; it may need more memory than available")
                sys.exit(2)
            if restarts > _MOST:
                say(f"{how or 'the model hangs'}; {_MOST} processes wrote no shard. Run the command again")
                sys.exit(2)
            if how:
                say(f"{how}; it is started again")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for temporary files of this process and its children. It is removed at the end.

    Folders of killed runs are removed at the start and at the end. Their lock is free when all their processes ended.
    """
    import fcntl

    above = tempfile.gettempdir()
    above = above if len(above) <= _LONGEST or not os.access("/tmp", os.W_OK) else "/tmp"
    _remove_abandoned(Path(above))
    owner = os.getpid()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=above))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        # Another run may have removed it before it was locked.
        if folder.is_dir():
            break
        os.close(lock)
    before, tempfile.tempdir = os.environ.get("TMPDIR"), None
    os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        # A child also gets here when it exits, but only the parent removes the folder.
        if os.getpid() == owner:
            tempfile.tempdir = None
            os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
            _remove(folder)
            os.close(lock)
            _remove_abandoned(Path(above))


def _remove_abandoned(above: Path) -> None:
    import fcntl

    for folder in above.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    # Processes that are ending may remove files at the same time.
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _wait(child: int) -> tuple[int, int | None]:
    """The exit status of the child, and the signal that this process received, if any.

    The first signal is forwarded to the child; the second one kills it.
    """
    received: int | None = None
    since = 0.0
    while True:
        info = signal.sigtimedwait({*ENDING, signal.SIGCHLD}, 1.0)
        if info is not None and info.si_signo in ENDING and signal.getsignal(info.si_signo) is not signal.SIG_IGN:
            # A signal may arrive twice: from the terminal, and from a wrapper that forwards it.
            if received is not None and time.monotonic() - since < _TWICE:
                continue
            number = signal.SIGKILL if received is not None else info.si_signo
            received, since = received or info.si_signo, time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, received


def _drain(reading: int) -> bytes:
    content = b""
    os.set_blocking(reading, False)
    with contextlib.suppress(BlockingIOError):
        while block := os.read(reading, 65536):
            content += block
    os.close(reading)
    return content


def die_with(parent: int) -> None:
    """Kill this process when its parent process (with this id) ends. Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
