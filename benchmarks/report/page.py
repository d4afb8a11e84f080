"""Write benchmarks/README.md and benchmarks/plots from the stored results.

python -m benchmarks.report.page                 the page in the repository
python -m benchmarks.report.page --out DIR       the page in another folder
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, write
from benchmarks.report import plots
from benchmarks.report.host import host_section
from benchmarks.report.jobs import jobs_section
from benchmarks.report.probes import probes_section
from benchmarks.report.stored import Row, Run, Stored, load
from benchmarks.report.sweeps import sweep_section
from benchmarks.report.table import ms, number, origin, table
from benchmarks.report.targets import verdicts
from benchmarks.report.windows import windows_section
from benchmarks.report.words import words_section

INTRO = Path(__file__).with_name("intro.md")
_PLOTS = {"op": "One attention call, time over the floor's", "growth": "Rollout: time and memory against tokens"}
Groups = dict[tuple[str, str], list[Row]]


def page(stored: Stored, plot_files: dict[str, list[str]]) -> str:
    """The whole page.

    Args:
        stored: the results.
        plot_files: {result file: names of its plots}.
    """
    sections = [target_section(run) for run in stored.runs]
    sections += [run_section(run, plot_files.get(run.file, [])) for run in stored.runs]
    sections += [words_section(*item) for item in stored.words.items()]
    sections += [windows_section(*item) for item in stored.windows.items()]
    sections += [probes_section(*item) for item in stored.probes.items()]
    sections += [jobs_section(*item) for item in stored.jobs.items()]
    sections += [host_section(*item) for item in stored.host.items()]
    if stored.sweeps:
        sections.append(sweep_section(stored.sweeps))
    return "\n".join([INTRO.read_text(), *("\n".join(lines) for lines in sections)]).rstrip()


def target_section(run: Run) -> Iterator[str]:
    """The targets, and what a run says of each."""
    if lines := list(verdicts(run)):
        yield f"## Targets: {run.name}\n"
        yield f"[`{run.file}`](results/{run.file}); b: batch.\n"
        yield from table(("", "", "goal", "measured", ""), lines, "llrll")
        yield ""


def run_section(run: Run, files: list[str]) -> Iterator[str]:
    """One result file: origin, plots, tables, and what was not measured."""
    yield f"## {run.name}\n"
    yield f"[`{run.file}`](results/{run.file}): " + "; ".join(_origin(run)) + ".\n"
    for file in files:
        yield f"![{_PLOTS[file.removesuffix('.svg').rpartition('-')[2]]}](plots/{file})\n"
    if groups := run.groups("op"):
        yield "### One attention call\n"
        yield from _overview(groups)
        yield "<details><summary>all rows of the op</summary>\n"
        yield from all_rows(groups)
        yield "\n</details>\n"
    if groups := run.groups("models"):
        yield "### Whole models: a rollout over all layers\n"
        yield from all_rows(groups)
        yield ""
    yield from left_out(run.about)


def _origin(run: Run) -> Iterator[str]:
    yield from origin(run.about)
    if gpu := run.about.get("gpu"):
        smi = gpu["nvidia_smi"]
        memory, cache = gpu["memory_bytes"] / 1e9, gpu["l2_bytes"] / 1e6
        yield f"{gpu['multiprocessors']} multiprocessors, {memory:.0f} GB, L2 {cache:.0f} MB"
        if "error" not in smi:
            yield f"driver {smi['driver_version']}, at most {smi['clocks.max.sm']}, {smi['power.limit']}"
    if not run.about.get("done", True):
        yield "**the run was interrupted**"


def _overview(groups: Groups) -> Iterator[str]:
    names = list(dict.fromkeys(row.contestant for rows in groups.values() for row in rows if row.contestant != "sdpa"))
    kernels = sorted({row.kernel for rows in groups.values() for row in rows if row.kernel})
    yield f"Time over SDPA's ({', '.join(kernels) or 'kernel unknown'}) without a map. Shapes are B, H, N, D.\n"
    lines = []
    for (shape, dtype), rows in groups.items():
        found = {row.contestant: row for row in rows}
        floor = found["sdpa"].median_ms if "sdpa" in found else rows[0].floor_ms
        cells = [number(found[name].ratio_to_floor, "x") if name in found else "" for name in names]
        lines.append((_shape(shape, dtype), ms(floor), *cells))
    yield from table(("shape", "SDPA ms", *names), lines)
    yield ""


def all_rows(groups: Groups) -> Iterator[str]:
    """Lines of a table with every row of the groups."""
    lines = []
    for key, rows in groups.items():
        for i, row in enumerate(rows):
            times = ms(row.median_ms), f"{100 * row.iqr_ms / row.median_ms:.0f} %", number(row.ratio_to_floor, "x")
            memory = _mb(row.needed_mb), _mb(row.peak_mb)
            lines.append((_shape(*key) if i == 0 else "", row.contestant, *times, *memory, _error(row)))
    yield from table(("", "", "ms", "spread", "/ floor", "needed MB", "peak MB", "error"), lines, "ll")


def _shape(shape: str, dtype: str) -> str:
    sizes = shape.split("x")
    return f"{', '.join(sizes) if all(size.isdigit() for size in sizes) else shape} {dtype}"


def left_out(about: dict[str, Any]) -> Iterator[str]:
    """Lists of what was not run, failed, or was cut at the time limit."""
    for title, kind in (("Not run", "not_run"), ("Failed", "failed"), ("Cut at the time limit", "cut")):
        names = about.get(kind)
        if names:
            yield f"{title}:\n"
            reasons = names if isinstance(names, dict) else dict.fromkeys(names, "")
            yield from (f"- {name}{': ' if reason else ''}{_escaped(reason)}" for name, reason in reasons.items())
            yield ""


def _escaped(text: str) -> str:
    """The text without characters that have a meaning in Markdown tables or HTML."""
    return text.replace("|", "/").replace("<", "&lt;").replace(">", "&gt;")


def _mb(mb: float | None) -> str:
    return "" if mb is None else f"{mb:,.0f}" if mb >= 10 else f"{mb:.1f}"


def _error(row: Row) -> str:
    """Error of the output, then of the map; older files and models have only the larger one."""
    errors = row.errors.values() if row.errors else () if row.max_error is None else (row.max_error,)
    return ", ".join(f"{error:.0e}" for error in errors)


def write_report(results: Path, out: Path) -> Path:
    """Write README.md and plots/ into `out` and return the page's path."""
    stored = load(results)
    files: dict[str, list[str]] = {}
    for run in stored.runs:
        for kind, draw in (("op", plots.op_plot), ("growth", plots.growth_plot)):
            name = f"{run.file.removesuffix('.json')}-{kind}.svg"
            if draw(run, out / "plots" / name):
                files.setdefault(run.file, []).append(name)
    write(out / "README.md", page(stored, files))
    return out / "README.md"


def main(argv: list[str] | None = None) -> int:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.report.page", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    options = parser.parse_args(argv)
    print(write_report(ROOT / "benchmarks" / "results", options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
