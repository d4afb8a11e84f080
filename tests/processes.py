"""Jobs as processes: how they are started, and what is left of them."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

MARK = "ATTNX_TEST_MARK"
COMMON = ["--method", "cls", "--shard-size", "4", "--batch-size", "4", "--workers", "1"]
KEPT = ("run.json", "manifest.parquet")


def marked(temporary: Path, site: Path | None = None, **more: str) -> dict[str, str]:
    """An environment by which the processes of a job are found; its temporary files go into a folder.

    site: a folder whose sitecustomize.py is imported by each of them.
    """
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [site and str(site), root, os.environ.get("PYTHONPATH")]))
    own = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: temporary.name}
    return {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | own | more


def start(source: Path, out: Path, *options: str, env: dict[str, str]) -> subprocess.Popen:
    """`attnx extract`, in a session of its own."""
    command = [
        sys.executable,
        "-m",
        "attnx",
        "extract",
        str(source),
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [*command, *COMMON, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def below(parent: int) -> list[int]:
    """The processes below one, by /proc."""
    found = []
    # They come and go meanwhile.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *below(child)]
    return found


def left(patience: float, mark: str | None = None) -> list[str]:
    """The processes with a mark, our own unless given, that are there after so many seconds, but for this one."""
    until = time.monotonic() + patience
    while (found := _with_mark(mark or os.environ[MARK])) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def _with_mark(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            # A zombie has no environment.
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name} {(process / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
    return found


def files(out: Path) -> dict[str, bytes]:
    """The content of every file of a job, hidden ones too, but locks."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".lock")}


def stray(out: Path) -> list[str]:
    """What is no file of a finished job."""
    return [name for name in files(out) if name not in KEPT and not name.startswith("part-")]
