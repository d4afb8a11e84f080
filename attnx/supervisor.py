"""Runs a command in a process of its own, so that something is left when it dies.

A picture that kills the process of a model would end every run at the same place. So a job's command is forked: the
parent imports nothing more, waits, and starts the job again where it stopped; what the job has noted about the shard
decides what is tried next. The parent also owns the folder of temporary files, and removes it however the job ends.
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

RESTART = 86  # the exit code of a process that wants to be started again
_TWICE = 1.0  # seconds, in which a second signal is the first one again
_MOST = 30  # restarts without a shard in between
_PREFIX = "attnx-run-"
_LONGEST = 60  # characters of a temporary folder, below which sockets stand
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_status: int | None = None
_restarted = False


def can_supervise() -> bool:
    """True on systems that have what it takes, such as Linux."""
    return hasattr(os, "fork") and hasattr(signal, "sigtimedwait")


def is_supervised() -> bool:
    """True in a process that will be started again."""
    return _status is not None


def is_restart() -> bool:
    """True in a process that goes on after another one of the same run, which died."""
    return _restarted


def progressed() -> None:
    """Tells the supervisor that the job goes on: called once before the first shard, and after each shard or piece."""
    if _status is not None:
        with contextlib.suppress(OSError):
            os.write(_status, b".")


def remembered() -> set[int]:
    """The shards that processes of this run have made, this one included: after a restart they are not made again."""
    try:
        return {int(line) for line in _memory().read_text().split()}
    except (OSError, ValueError):
        return set()


def remember(shard: int) -> None:
    """Notes a shard that was made, for a process that goes on after this one."""
    if _status is not None:
        with contextlib.suppress(OSError), _memory().open("a") as file:
            file.write(f"{shard}\n")


def _memory() -> Path:
    return Path(tempfile.gettempdir(), "made") if _status is not None else Path(os.devnull)


def restart() -> None:
    """Ends this process at once, to be started again."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(RESTART)


def supervise() -> None:
    """Returns in a new process, which is to do the work; the process that called waits for it, and exits as it does."""
    global _status, _restarted
    # Whoever ignores it has the system reap our child.
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
                # Libraries may ask a question; nobody is there to answer.
                with open(os.devnull) as nothing:
                    os.dup2(nothing.fileno(), 0)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ENDING, signal.SIGCHLD})
                return
            os.close(writing)
            status, ended_by_us = _wait(child)
            signs = _drain(reading)
            code = os.waitstatus_to_exitcode(status)
            if code >= 0 and code != RESTART:
                sys.exit(code)
            if ended_by_us is not None:
                sys.exit(128 + ended_by_us)
            how = "" if code == RESTART else f"the process ended with {signal.Signals(-code).name}"
            restarts, _restarted = (1 if len(signs) > 1 else restarts + 1), True
            if not signs:
                say(f"{how} before the first shard was begun; it may need more memory than there is")
                sys.exit(2)
            if restarts > _MOST:
                say(f"{how or 'the model hangs'}; {_MOST} processes wrote no shard. Run the command again")
                sys.exit(2)
            if how:
                say(f"{how}; it is started again")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Temporary files of this process and its children go into a folder of their own, which is removed at the end.

    Folders that killed runs left are removed first, and at the end again: their lock is free when all have died.
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
        # Another run may have taken it for abandoned, before the lock.
        if folder.is_dir():
            break
        os.close(lock)
    before, tempfile.tempdir = os.environ.get("TMPDIR"), None
    os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        # In a child this is not reached before its own end; the folder is the parent's to remove.
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
    # Processes that are about to end may still remove their own files.
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _wait(child: int) -> tuple[int, int | None]:
    """The status of the child when it has ended, and the signal that ended us, if one did.

    The first signal is the child's to obey; at the second it is killed.
    """
    told: int | None = None
    since = 0.0
    while True:
        info = signal.sigtimedwait({*ENDING, signal.SIGCHLD}, 1.0)
        if info is not None and info.si_signo in ENDING and signal.getsignal(info.si_signo) is not signal.SIG_IGN:
            # One signal may come twice: from a terminal, and from a wrapper that passes it on.
            if told is not None and time.monotonic() - since < _TWICE:
                continue
            number = signal.SIGKILL if told is not None else info.si_signo
            told, since = told or info.si_signo, time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, told


def _drain(reading: int) -> bytes:
    found = b""
    os.set_blocking(reading, False)
    with contextlib.suppress(BlockingIOError):
        while more := os.read(reading, 65536):
            found += more
    os.close(reading)
    return found


def die_with(parent: int) -> None:
    """Whatever ends the parent, of that number, ends this process, too."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
