"""What a number depends on: hardware, versions, commit, date. No path and no host name."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import mkl

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "timm", "transformers", "pytest-benchmark", "numpy")
_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "persistence_mode")


def environment(device: str) -> dict[str, Any]:
    """What is stored with every result."""
    result: dict[str, Any] = {
        "hardware": hardware(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return {**result, "gpu": gpu()} if device == "cuda" else result


def gpu() -> dict[str, Any]:
    """Multiprocessors, L2 and memory in bytes, capability, and what nvidia-smi says of driver, clocks and power."""
    about = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": about.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "memory_bytes": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(),
    }


def l2_bytes() -> int:
    """The L2 cache of the GPU at hand; 64 MB where torch doesn't say."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks (at this moment, and at most) and power limit of the first GPU; else why they aren't known."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(_SMI, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        return {"error": f"nvidia-smi: {type(error).__name__}"}


def file_stem(device: str) -> str:
    """Such as "nvidia-h200-torch2.11.0-triton3.6.0" or "amd-epyc-7543-8-threads-torch2.11.0-triton3.6.0"."""
    name = re.sub(r"[^a-z0-9]+", "-", hardware(device).lower()).strip("-")
    threads = f"-{torch.get_num_threads()}-threads" if device == "cpu" else ""
    have = {package: (found or "none").partition("+")[0] for package, found in _versions().items()}
    return f"{name}{threads}-torch{have['torch']}-triton{have['triton']}"


def hardware(device: str) -> str:
    """The name of the GPU, or of the CPU and what MKL takes it for, if it was told."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    name = named.group(1) if named else platform.processor() or platform.machine()
    return f"{name} ({os.environ[mkl.VARIABLE]})" if mkl.VARIABLE in os.environ else name


def commit() -> str | None:
    """The commit, "-dirty" added where tracked files differ; ATTNX_COMMIT where there is no git; else None."""
    if "ATTNX_COMMIT" in os.environ:
        return os.environ["ATTNX_COMMIT"]
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "-dirty" * bool(changes)


def write_atomically(path: Path, text: str) -> None:
    """The whole text under the name, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text + "\n")
    os.replace(part, path)


def part_of(path: Path) -> Path:
    """NAME-part.json for NAME.json while it is not whole; -part-2 and so on where an earlier one lies: it may be all
    there is."""
    first = path.with_name(f"{path.stem}-part{path.suffix}")
    names = [first, *(path.with_name(f"{first.stem}-{i}{path.suffix}") for i in range(2, 100))]
    return next(name for name in names if not name.exists())


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
