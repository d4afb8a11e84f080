"""Start jobs as processes, and list the processes and files that they leave."""

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
    """An environment that marks the processes of a job and sets their folder for temporary files.

    site: a folder whose sitecustomize.py every process imports.
    """
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [site and str(site), root, os.environ.get("PYTHONPATH")]))
    own = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: temporary.name}
    return {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | own | more


def start(source: Path, out: Path, *options: str, env: dict[str, str]) -> subprocess.Popen:
    """Start `attnx extract` in its own session."""
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
    """The descendants of a process, read from /proc."""
    found = []
    # Processes start and end during the search.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *below(child)]
    return found


def left(patience: float, mark: str | None = None) -> list[str]:
    """The other processes with a mark that still run after `patience` seconds. The default is our own mark."""
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
    """The content of every file of a job, including hidden files but not locks."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".lock")}


def stray(out: Path) -> list[str]:
    """Names of files that do not belong to a finished job."""
    return [name for name in files(out) if name not in KEPT and not name.startswith("part-")]
