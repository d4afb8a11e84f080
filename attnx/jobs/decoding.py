"""Entries to pixels, in processes of their own: what hangs or crashes costs one row, and the model no time."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING

import numpy as np

from attnx.images import ImageError, large_images, read_scaled
from attnx.jobs.memory import decoder_bytes, default_workers, limit_memory
from attnx.jobs.pixels import Crop, Pixels
from attnx.jobs.sources import Entry, Reader
from attnx.jobs.sources.reachable import is_unreachable
from attnx.messages import warnings_in_lines

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Decode", "Decoders", "Picture", "start_server"]

_MAIN = threading.Lock()
_READY_WITHIN = 120.0  # seconds, for a process to start
_GRACE = 0.5  # seconds, for processes to end
_LONGEST = 300  # characters of an error


@dataclass(frozen=True)
class Picture:
    """What an entry's image is to a model, [3, h, w], or why there is none.

    seconds: what decoding took; computing: those of them in which it did not wait for a disk, a network or a core.
    unreachable: the error may be the source's and not the image's, see `attnx.jobs.sources.reachable`.
    """

    pixels: np.ndarray | None = None
    width: int | None = None
    height: int | None = None
    crop: Crop | None = None
    error: str | None = None
    seconds: float = 0.0
    computing: float = 0.0
    unreachable: bool = False


@dataclass(frozen=True)
class Decode:
    """Entry -> Picture; never raises. max_pixels: a larger JPEG is reduced, another larger image is its row's error.

    A reduced picture has the width, the height and the crop of the full one.
    """

    read: Reader
    pixels: Pixels
    max_pixels: int | None = None

    def __call__(self, entry: Entry) -> Picture:
        """Reads, decodes and prepares an entry."""
        start, begin = time.perf_counter(), time.thread_time()
        picture = self._decode(entry)
        return replace(picture, seconds=time.perf_counter() - start, computing=time.thread_time() - begin)

    def _decode(self, entry: Entry) -> Picture:
        try:
            picture, (width, height) = read_scaled(*self.read(entry), max_pixels=self.max_pixels)
            pixels, (left, top, right, bottom) = self.pixels(picture, self.max_pixels)
        # Long and thin: too large to be resized. A reader of a tar or a data set fails as files do; a broken Arrow file
        # or a processor in its own ways.
        except Exception as error:
            return Picture(error=self._told(entry, error), unreachable=is_unreachable(error))
        across, down = width / picture.width, height / picture.height
        return Picture(pixels, width, height, (left * across, top * down, right * across, bottom * down))

    def _told(self, entry: Entry, error: Exception) -> str:
        if self.max_pixels is not None and (isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)):
            most = decoder_bytes(self.max_pixels) // 10**6
            return _cut(
                f"{entry.path}: MemoryError: needs more than {most:,} MB, which --max-pixels {self.max_pixels} allows"
            )
        return _cut(str(error) if isinstance(error, ImageError) else f"{entry.path}: {type(error).__name__}: {error}")


def _cut(error: str) -> str:
    """At most so many characters; where they are more, the middle is left out: a path begins it, the cause ends it."""
    half = (_LONGEST - 1) // 2
    return error if len(error) <= _LONGEST else f"{error[:half]}…{error[-half:]}"


class Decoders:
    """Processes that decode; a context manager.

    Args:
        decode: what they do; it is pickled.
        workers: how many; the usable cores unless given, at most 16. 0: none, but a thread of this process, which
            can't be stopped where it hangs.
        timeout: seconds that one image may take; then its process is killed, and the row has that as its error.

    While they are open, Pillow's own limit of pixels is off in this process where `decode` has one.
    """

    def __init__(self, decode: Decode, workers: int | None = None, timeout: float = 120.0) -> None:
        self.workers = default_workers() if workers is None else workers
        self.timeout = timeout
        self._decode = decode
        self._closed = False
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="attnx-decode")
        self._all: set[_Process] = set()
        self._open = contextlib.ExitStack()

    def submit(self, entry: Entry) -> Future[Picture]:
        """The entry's picture, some time; entries begin in the order of these calls."""
        return self._threads.submit(self._run, entry)

    def __enter__(self) -> Decoders:
        self._open.enter_context(large_images(self._decode.max_pixels))
        for _ in range(self.workers):
            self._idle.put(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        everyone, end = list(self._all), time.monotonic() + _GRACE
        for process in everyone:
            process.terminate()
        for process in everyone:
            process.kill(max(0.0, end - time.monotonic()))
        self._threads.shutdown(cancel_futures=True)
        self._open.close()

    def _run(self, entry: Entry) -> Picture:
        if entry.error is not None:
            return Picture(error=entry.error)
        if not self.workers:
            return self._decode(entry)
        process = self._idle.get()
        try:
            for _ in range(2):
                process = process or self._start()
                slow = False
                try:
                    return process.decode(entry, self.timeout)
                except TimeoutError:
                    error, slow = f"{entry.path}: decoding took longer than {self.timeout:g} s", True
                # It died: by this image, or by something else, such as a lack of memory; so the image has a second try.
                except (EOFError, OSError) as cause:
                    if self._closed:
                        break
                    error = f"{entry.path}: decoding it killed the process ({cause})"
                self._drop(process)
                process = None
                if slow:
                    break
            # A share whose server is gone answers nothing at all.
            return Picture(error="stopped" if self._closed else error, unreachable=slow)
        finally:
            self._idle.put(process)

    def _start(self) -> _Process:
        process = _Process(self._decode)
        self._all.add(process)
        if self._closed:
            process.kill()
        return process

    def _drop(self, process: _Process) -> None:
        process.kill()
        self._all.discard(process)


def start_server() -> None:
    """Starts what processes are forked from, in the background; called early, nobody has to wait for its imports."""
    forkserver.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()
    # A terminal's interrupt reaches it, too, and would end its imports with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """A process that decodes, one image at a time."""

    def __init__(self, decode: Decode) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, decode), daemon=True)
        with _without_main():
            self._process.start()
        theirs.close()
        self._ready = False

    def decode(self, entry: Entry, timeout: float) -> Picture:
        """Raises TimeoutError, or EOFError or OSError if the process is no more; kill it then."""
        if not self._ready:
            self._wait_until_ready()
        try:
            self._pipe.send((entry, timeout))
            if not self._pipe.poll(timeout):
                raise TimeoutError
            answer: Picture = self._pipe.recv()
        except EOFError as error:
            self._process.join(1)
            raise EOFError(_died(self._process.exitcode)) from error
        return answer

    def terminate(self) -> None:
        """Lets it end by itself, and release what is held by name: libraries that read have semaphores."""
        self._process.terminate()

    def kill(self, after: float = 0.0) -> None:
        """Ends it, whatever it is doing; after so many seconds, if it is still there."""
        if after > 0:
            self._process.join(after)
        self._process.kill()
        self._process.join()

    def _wait_until_ready(self) -> None:
        try:
            if not self._pipe.poll(_READY_WITHIN):
                raise RuntimeError(f"a process that decodes was not ready within {_READY_WITHIN:g} s")
            self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            code = self._process.exitcode
            # Killed, as any other may be, or by a mistake that all of them will make.
            kind = EOFError if code is not None and code < 0 else RuntimeError
            raise kind(f"a process that decodes did not start: {_died(code)}") from error
        self._ready = True


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A process that is started inside does not run this one's script, which may import much, or have no guard."""
    with _MAIN:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _died(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: Connection, decode: Decode) -> None:
    """A process's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with contextlib.suppress(EOFError, OSError), warnings_in_lines(), large_images(decode.max_pixels):
        pipe.send(None)
        while True:
            entry, timeout = pipe.recv()
            # Whoever would kill it may be dead by then: the default of this signal ends the process.
            signal.setitimer(signal.ITIMER_REAL, timeout + 10)
            if decode.max_pixels is not None:
                limit_memory(decode.max_pixels, decode.pixels.kind == "processor")
            picture = decode(entry)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(picture)
