"""run.json: the settings of a job. It has its own checksum, which is verified when it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from attnx.files import open_regular, replacing
from attnx.jobs.shards import DamagedError
from attnx.limits import RUN_BYTES

__all__ = ["FORMAT", "RUN", "read_run", "write_run"]

RUN = "run.json"
FORMAT = 2  # version of a job's files; newer versions are rejected
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "rows": int, "shard_size": int, "batch_size": (int, type(None)), "manifest_sha256": str, "source": dict,
    "settings": dict, "recipe": (dict, type(None)),
}  # fmt: skip


def write_run(out: Path, run: dict[str, Any]) -> None:
    """Write run.json atomically, with the format version and the checksum."""
    run = {"format": FORMAT, **{name: value for name, value in run.items() if name not in ("format", "sha256")}}
    with replacing(out / RUN) as path:
        path.write_text(json.dumps({**run, "sha256": _digest(run)}, indent=1), encoding="utf-8")


def read_run(out: Path) -> dict[str, Any]:
    """The checked content of a folder's run.json.

    Raises:
        FileNotFoundError: there is no run.json.
        DamagedError: run.json is damaged.
        ValueError: a newer attnx wrote it.
    """
    path = out / RUN
    try:
        with open_regular(path) as file:
            content = file.read(RUN_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(path, str(error)) from error
    if len(content) > RUN_BYTES:
        raise DamagedError(path, f"expected at most {RUN_BYTES:,} bytes")
    try:
        run = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"expected JSON; {error}") from error
    if not isinstance(run, dict):
        raise DamagedError(path, f"expected an object; got {type(run).__name__}")
    version = run.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, of a newer attnx; this one reads format {FORMAT}. Update attnx, or choose "
            "another folder"
        )
    if version != FORMAT:
        older = "; an older attnx wrote it, or it was changed" if version is None else ""
        raise DamagedError(path, f"expected format {FORMAT}; got {version!r:.80}{older}")
    digest = run.pop("sha256", None)
    if digest != _digest(run):
        raise DamagedError(path, "its checksum is wrong: it was changed after it was written")
    for name, kind in _FIELDS.items():
        value = run.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DamagedError(path, f"{name} is {value!r:.80}")
    if run["rows"] < 1 or run["shard_size"] < 1:
        raise DamagedError(path, f"expected at least one row; got {run['rows']} in shards of {run['shard_size']}")
    batch_size, most = run.get("batch_size"), run["settings"].get("max_pixels")
    for name, value in (("batch_size", batch_size), ("max_pixels", most)):
        if value is not None and not (type(value) is int and 1 <= value < 2**63):
            raise DamagedError(path, f"{name} is {value!r:.80}")
    return run


def _refuse(constant: str) -> None:
    raise ValueError(f"got {constant}")


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
