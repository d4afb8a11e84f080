"""Decoding in separate processes. A crash or a hang only affects one row, and decoding runs parallel to the model."""

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
from attnx.jobs.sources import Entry, Reader
from attnx.jobs.sources.reachable import is_unreachable
from attnx.messages import warnings_in_lines
from attnx.models.pixels import Crop, Pixels

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Decode", "Decoders", "Picture", "start_server"]

_MAIN = threading.Lock()
_READY_WITHIN = 120.0  # seconds for a process to start
_GRACE = 0.5  # seconds for processes to exit
_LONGEST = 300  # characters of an error message


@dataclass(frozen=True)
class Picture:
    """A decoded image, or an error.

    Attributes:
        pixels: the model's input [3, h, w] before normalisation; None if there is an error.
        width, height: size of the upright picture in pixels.
        crop: the part of the picture that the pixels show.
        error: the error message.
        seconds: wall time of decoding; computing: CPU time of it.
        unreachable: True if the source may be the cause of the error, see `attnx.jobs.sources.reachable`.
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
    """A function from an entry to a picture. It never raises.

    max_pixels: a larger JPEG is decoded at a smaller scale; another larger image is an error. A reduced picture has
    the width, the height and the crop of the full one.
    """

    read: Reader
    pixels: Pixels
    max_pixels: int | None = None

    def __call__(self, entry: Entry) -> Picture:
        """Read, decode and preprocess the image of an entry."""
        start, begin = time.perf_counter(), time.thread_time()
        picture = self._decode(entry)
        return replace(picture, seconds=time.perf_counter() - start, computing=time.thread_time() - begin)

    def _decode(self, entry: Entry) -> Picture:
        try:
            picture, (width, height) = read_scaled(*self.read(entry), max_pixels=self.max_pixels)
            pixels, (left, top, right, bottom) = self.pixels(picture, self.max_pixels)
        # Readers raise OSError and ValueError; broken Arrow files and image processors raise nearly anything.
        except Exception as error:
            return Picture(error=self._message(entry, error), unreachable=is_unreachable(error))
        across, down = width / picture.width, height / picture.height
        return Picture(pixels, width, height, (left * across, top * down, right * across, bottom * down))

    def _message(self, entry: Entry, error: Exception) -> str:
        if self.max_pixels is not None and (isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)):
            most = decoder_bytes(self.max_pixels) // 10**6
            return _cut(
                f"{entry.path}: MemoryError: needs more than {most:,} MB, which --max-pixels {self.max_pixels} allows"
            )
        return _cut(str(error) if isinstance(error, ImageError) else f"{entry.path}: {type(error).__name__}: {error}")


def _cut(error: str) -> str:
    """The message with its middle cut out if it is too long: it starts with the path and ends with the cause."""
    half = (_LONGEST - 1) // 2
    return error if len(error) <= _LONGEST else f"{error[:half]}…{error[-half:]}"


class Decoders:
    """A pool of decoder processes; a context manager.

    Args:
        decode: the function to run; it is pickled.
        workers: number of processes; by default the number of usable cores, at most 16. With 0, a thread of this
            process decodes, and hangs can't be stopped.
        timeout: seconds per image. After that the process is killed, and the row gets an error.

    If `decode` has a limit of pixels, Pillow's own limit is off in this process inside the `with`.
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
        """A future with the entry's picture. Entries start in the order of these calls."""
        return self._threads.submit(self._run, entry)

    def __enter__(self) -> Decoders:
        self._open.enter_context(large_images(self._decode.max_pixels))
        for _ in range(self.workers):
            self._idle.put(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        processes, end = list(self._all), time.monotonic() + _GRACE
        for process in processes:
            process.terminate()
        for process in processes:
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
                # The process died. The image or something else, such as a lack of memory, is the cause: try once more.
                except (EOFError, OSError) as cause:
                    if self._closed:
                        break
                    error = f"{entry.path}: decoding it killed the process ({cause})"
                self._drop(process)
                process = None
                if slow:
                    break
            # A timeout may come from an unreachable share, which never responds.
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
    """Start the fork server of the decoders in the background. If it is called early, its imports cost no time."""
    forkserver.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()
    # An interrupt from the terminal also reaches the server, and would print a traceback during its imports.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """A decoder process. It decodes one image at a time."""

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
        """The picture of an entry.

        Raises:
            TimeoutError: decoding takes too long; kill the process.
            EOFError, OSError: the process died.
        """
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
        """Ask the process to exit, so that libraries can release named semaphores."""
        self._process.terminate()

    def kill(self, after: float = 0.0) -> None:
        """Kill the process if it has not ended after `after` seconds."""
        if after > 0:
            self._process.join(after)
        self._process.kill()
        self._process.join()

    def _wait_until_ready(self) -> None:
        try:
            if not self._pipe.poll(_READY_WITHIN):
                raise RuntimeError(f"a decoder process was not ready within {_READY_WITHIN:g} s")
            self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            code = self._process.exitcode
            # A kill may happen to one process only; any other failure will happen to all.
            kind = EOFError if code is not None and code < 0 else RuntimeError
            raise kind(f"a decoder process did not start: {_died(code)}") from error
        self._ready = True


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Prevent processes that are started inside from importing the main script, which may have no `__main__` guard."""
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
    """The main function of a decoder process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with contextlib.suppress(EOFError, OSError), warnings_in_lines(), large_images(decode.max_pixels):
        pipe.send(None)
        while True:
            entry, timeout = pipe.recv()
            # The parent may be dead and unable to kill this process: the default action of SIGALRM ends it.
            signal.setitimer(signal.ITIMER_REAL, timeout + 10)
            if decode.max_pixels is not None:
                limit_memory(decode.max_pixels, decode.pixels.kind == "processor")
            picture = decode(entry)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(picture)
