"""The environment of a result: hardware, versions, commit and date, without paths and host names."""

import datetime
import json
import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attnx.files import replacing
from benchmarks import mkl

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "timm", "transformers", "pytest-benchmark", "numpy")
_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "persistence_mode")


def environment(device: str) -> dict[str, Any]:
    """The environment stored with every result."""
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
    """Multiprocessors, L2 and memory in bytes, capability; driver, clocks and power from nvidia-smi."""
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
    """Bytes of the current GPU's L2 cache; 64 MB if torch does not report it."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks (current and maximum) and power limit of the first GPU, or {"error": message}."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(_SMI, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        return {"error": f"nvidia-smi: {type(error).__name__}"}


def file_stem(device: str) -> str:
    """File name of results, such as "nvidia-h200-torch2.11.0-triton3.6.0" or "amd-epyc-8-threads-torch2.11.0-..."."""
    name = re.sub(r"[^a-z0-9]+", "-", hardware(device).lower()).strip("-")
    threads = f"-{torch.get_num_threads()}-threads" if device == "cpu" else ""
    have = {package: (found or "none").partition("+")[0] for package, found in _versions().items()}
    return f"{name}{threads}-torch{have['torch']}-triton{have['triton']}"


def hardware(device: str) -> str:
    """The name of the GPU or CPU, with "(MKL as on Intel)" if that is active."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    name = named.group(1) if named else platform.processor() or platform.machine()
    return f"{name} ({os.environ[mkl.VARIABLE]})" if mkl.VARIABLE in os.environ else name


def commit() -> str | None:
    """ATTNX_COMMIT if it is set, else git's commit, with "-dirty" if tracked files differ; None without git."""
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


class ResultFile:
    """NAME.json, stored as NAME-part.json (-part-2 and so on if that exists) until it is complete."""

    def __init__(self, folder: Path, name: str, quick: bool) -> None:
        self.path = folder / f"{name}{'-quick' if quick else ''}.json"
        parts = [self.path.with_name(f"{self.path.stem}-part{end}.json") for end in ("", *range(-2, -100, -1))]
        self.part = next(part for part in parts if not part.exists())

    def save(self, content: dict[str, Any]) -> None:
        """Store an incomplete result."""
        write(self.part, json.dumps(content, indent=1))

    def finish(self) -> Path:
        """Rename the file to NAME.json."""
        return self.part.replace(self.path)


def write(path: Path, text: str) -> None:
    """Write the text so that an interrupted write leaves the earlier file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
