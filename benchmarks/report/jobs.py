"""The report's section on batch jobs."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.table import number, origin, table, verdict

_STAGES = {
    "images": "waiting for images",
    "device": "copies to the device",
    "model": "model",
    "file": "waiting for files",
}


def jobs_section(file: str, content: dict[str, Any]) -> Iterator[str]:
    """Lines for one file of `benchmarks.suites.jobs`."""
    kind = _many if "marks" in content else _engines if "engines" in content else _pipeline
    yield from kind(file, content)
    yield ""


def _pipeline(file: str, content: dict[str, Any]) -> Iterator[str]:
    threads = "" if content["device"] == "cuda" else f", {content['threads']} threads"
    yield f"## Batch job: {content['hardware']}{threads}\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    about = f"{content['images']:,} JPEGs of {content['bytes_per_image'] / 1000:.0f} KB, {content['model']}"
    found, share = content["pipeline"], content["of_slower"]
    yield (
        f"{about} with random weights,\n{content['dtype']}, batch {content['batch']}: rollout maps. "
        f"The values are those\nof the median of {len(content['rounds_of_slower'])} rounds.\n"
    )
    head = ("images/s", "decoding alone", "model alone", "the job", "of the slower", "goal")
    rates = (number(rate) for rate in (content["decode_per_s"], content["model_per_s"], found["images_per_s"], share))
    yield from table(head, [("-", *rates, f"≥ 0.9: {verdict(share >= 0.9)}")])
    shares = ", ".join(f"{name} {found['stages'][key] / found['seconds']:.0%}" for key, name in _STAGES.items())
    yield f"\nOf the job's {found['seconds']:.0f} s: {shares}.\n"


def _engines(file: str, content: dict[str, Any]) -> Iterator[str]:
    yield f"## Engines of the batch job: {content['hardware']}, {content['processes']} processes\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    yield (
        f"{content['images']:,} JPEGs, {content['model']} with random weights. Seconds include the start of the\n"
        "processes and the loading of the model. `here` is one process with all threads.\n"
    )
    same = content["same_as_local"]
    lines = [
        (name, f"{of['seconds']:.1f}", number(of["images_per_s"]), "yes" if same[name] else "no")
        for name, of in content["engines"].items()
    ]
    yield from table(("engine", "seconds", "images/s", "same bytes as local"), lines)


def _many(file: str, content: dict[str, Any]) -> Iterator[str]:
    yield f"## A job of {content['rows']:,} rows without a model: {content['hardware']}\n"
    yield f"[`{file}`](results/{file}): {'; '.join(origin(content))}.\n"
    of = content
    yield (
        f"{of['shards']:,} shards. Planning took {of['plan_s']:.0f} s, writing {of['make_s']:.0f} s, a resume that\n"
        f"finds nothing to do {of['resume_s']:.1f} s. `attnx.open` takes {of['open_s']:.2f} s, the first row by its\n"
        f"key {of['first_key_s']:.0f} s (it builds the index), a random row {of['random_row_ms']:.1f} ms. A row of\n"
        f"14 x 14 takes {of['bytes_per_row']:.0f} bytes, and {of['manifest_bytes_per_row']:.1f} in the manifest. "
        "Progress:\n"
    )
    head = ("rows", "µs per row", "resident MB")
    lines = [(f"{m['rows']:,}", f"{m['us_per_row']:.1f}", f"{m['resident_mb']:,.0f}") for m in content["marks"]]
    yield from table(head, [("0", "", f"{content['resident_after_plan_mb']:,.0f}"), *lines], "r")
