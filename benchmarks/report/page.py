"""Writes benchmarks/README.md and benchmarks/plots from the stored results, and from nothing else.

python -m benchmarks.report.page                 after a new result: the page in the repository
python -m benchmarks.report.page --out DIR       somewhere else
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, write_atomically
from benchmarks.report.jobs import jobs_section
from benchmarks.report.page import plots
from benchmarks.report.stored import Row, Run, Stored, load
from benchmarks.report.sweeps import estimate_section, sweep_section
from benchmarks.report.table import details, ms, number, origin, table
from benchmarks.report.targets import cpu_verdicts, verdicts
from benchmarks.report.words import words_section
from benchmarks.suites.growth import by_contestant, power

RESULTS = ROOT / "benchmarks" / "results"
_PLOTS = {
    "op": "One attention call, time over the floor's",
    "models": "Whole models, time over the floor's",
    "growth": "Time and memory against tokens",
}
INTRO = """\
# Benchmarks

This page is written by `python -m benchmarks.report.page` from the files in [`results/`](results). A number is here
because a file there has it, with the hardware, versions and commit that it belongs to. How the kernels came to be as
they are, and what is expected of them, is in [`NOTES.md`](NOTES.md).

```
make bench        every benchmark on this machine's CPU, some minutes: a file in benchmarks/results
make bench MKL=--mkl-as-on-intel    the same on an AMD processor, with the faster of torch's own products
make bench-gpu    the CUDA tests, every benchmark and a sweep of block sizes, in less than ten minutes
python -m benchmarks.suites.words --original ALBEF    word maps and Grad-CAM beside a checkout of the original code
python -m benchmarks.suites.jobs    the batch job beside its decoders and its model; --many 10000000: ten million rows
make report       this page
```

## What a number means

- **One attention call** (`test_op.py`): q, k, v are views of a packed projection as in a ViT, bf16 on a GPU and fp32
  on a CPU. The floor is `F.scaled_dot_product_attention` without a map. `attnx` is `attnx.attention` with the whole
  mean map, `attnx_eager` the same in plain torch, `attnx_row` with the class token's row of it; `vecmat` gives
  `r @ map` for a dense r and makes no map. `hf_eager` and `timm_eager` are what Hugging Face and timm compute when
  asked for weights, then the mean over heads; `compiled_eager` is the former by `torch.compile`. `flex_map` and
  `flex_vecmat` are the map and `r @ map` by torch's compiled `flex_attention`, `flag_attention` is FlagAttention's
  total attention (`r @ map` for r of ones), and `sdpa_cudnn` is the floor by cuDNN's kernel. Compiled ones are
  measured on a few shapes only.
- **Whole models** (`test_models.py`): images to an all-layer rollout. The floor is the model's plain forward pass.
  `attnx` is `capture` and `rollout`, `extractor` is `Extractor`, and `cls` its map of the class token in the last
  layer; `hooks` keeps timm's eager weights and `output_attentions` Hugging Face's, then both multiply whole matrices.
  Weights are random.
- **Times** are medians. Contestant and floor run in turn in one process, and **/ floor** is the median of the one over
  the median of the other. On a GPU an op's round is one replay of a CUDA graph of many calls over inputs that together
  are larger than the L2 cache, between two events; what can't be recorded is timed with its launches, as is its floor,
  and compared with nothing else. Models are timed by the wall clock. **spread** is the interquartile range over the
  median: smaller differences say nothing. The floor's own ratio, against itself, says the same.
- **MKL as on Intel**: on other makers' processors MKL, which torch multiplies with, reaches half of what they can do,
  and whatever multiplies without it looks fast. There a second file is of runs in which it takes the processor for an
  Intel ([`mkl.py`](mkl.py)): the harder comparison, and the one to go by.
- **hf_eager / it** and **compiled / it**: how many times its time the other takes, both relative to their floors.
- **least ms**: what the chip needs at least, by arithmetic (q kᵀ and P v once) or by bytes (inputs read, results
  written once), whichever is more.
- **peak MB** (10⁶ bytes) above the inputs or the loaded model; of models on CPUs the median of three processes or more.
  There it includes freed memory that malloc keeps, as much as is needed or more, and different in every process:
  **needed MB** is the peak where malloc gives back at once what is freed ([`memory.py`](memory.py)), the same in all.
  **error**: the largest difference from float64, of the output and of the map, row or `r @ map`; of models from the
  rollout of float64 weights, as a share of its largest entry. From 67 million weights on, 64 rows are compared. What is
  wrong is not timed.
"""


def page(stored: Stored, plot_files: dict[str, list[str]]) -> str:
    """The whole page; plot_files: the names of the plots of a run's file."""
    parts = [INTRO, "\n".join(target_section(stored.runs)), "\n".join(cpu_target_section(stored.runs))]
    for run in stored.runs:
        parts.append("\n".join(run_section(run, plot_files.get(run.file, []))))
    for file, content in stored.words.items():
        parts.append("\n".join(words_section(file, content)))
    for file, content in stored.jobs.items():
        parts.append("\n".join(jobs_section(file, content)))
    if stored.sweeps:
        parts.append("\n".join(sweep_section(stored.sweeps)))
    if stored.estimates:
        parts.append("\n".join(estimate_section(stored.estimates)))
    return "\n".join(parts).rstrip()


def target_section(runs: list[Run]) -> Iterator[str]:
    """The targets, held against every run on a GPU; without one, all are not measured."""
    yield "## Targets on a GPU\n"
    on_gpus: list[Run | None] = [run for run in runs if run.cuda] or [None]
    if on_gpus == [None]:
        yield "No stored result comes from a GPU yet: nothing here is measured.\n"
    for run in on_gpus:
        if run is not None:
            yield f"{run.about['hardware']} ([`{run.file}`](results/{run.file})); b: batch.\n"
        yield from table(("", "tokens", "goal", "measured", ""), verdicts(run), "lrrll")
        yield ""


def cpu_target_section(runs: list[Run]) -> Iterator[str]:
    """The targets for CPUs, held against every run that has whole models of them."""
    for run in runs:
        lines = [] if run.cuda else list(cpu_verdicts(run))
        if any(line.measured != "-" for line in lines):
            yield f"## Targets on a CPU: {run.about['hardware']}, {run.about['threads']} threads\n"
            yield f"[`{run.file}`](results/{run.file})\n"
            yield from table(("", "", "goal", "measured", ""), lines, "llrrl")
            yield ""


def run_section(run: Run, files: list[str]) -> Iterator[str]:
    """One result file: where it comes from, plots, tables, and what is not in them."""
    about = run.about
    yield f"## {about['hardware']}{'' if run.cuda else ', ' + str(about['threads']) + ' threads'}\n"
    yield f"[`{run.file}`](results/{run.file}): " + "; ".join(_origin(run)) + ".\n"
    for file in files:
        kind = file.removesuffix(".svg").rpartition("-")[2]
        yield f"![{_PLOTS[kind]}](plots/{file})\n"
    groups = run.groups("op")
    if groups:
        yield "### One attention call\n"
        yield from _overview(run, groups)
        yield from details("every number of the op", _op_tables(run, groups))
    groups = run.groups("models")
    if groups:
        yield "### Whole models: a rollout through all layers\n"
        yield from _model_table(run, groups)
    if run.about.get("growth"):
        yield "### How it grows with the tokens\n"
        yield from _growth_table(run)
    yield from _left_out(about)


def _origin(run: Run) -> Iterator[str]:
    about = run.about
    yield from origin(about)
    gpu = about.get("gpu")
    if gpu:
        smi = gpu["nvidia_smi"]
        memory, cache = gpu["memory_bytes"] / 1e9, gpu["l2_bytes"] / 1e6
        yield f"{gpu['multiprocessors']} multiprocessors, {memory:.0f} GB, L2 {cache:.0f} MB"
        if "error" not in smi:
            yield f"driver {smi['driver_version']}, at most {smi['clocks.max.sm']}, {smi['power.limit']}"
    if run.ceilings is not None:
        c = run.ceilings
        yield f"ceilings {c.flops / 1e12:.0f} TFLOP/s and {c.bandwidth / 1e12:.2f} TB/s ({c.source})"
    if not about.get("done", True):
        yield "**the run did not come to its end**"


def _overview(run: Run, groups: dict[tuple[str, str], list[Row]]) -> Iterator[str]:
    names = list(dict.fromkeys(row.contestant for rows in groups.values() for row in rows if row.contestant != "sdpa"))
    kernels = sorted({row.kernel for row in run.rows if row.kernel})
    yield f"Time over SDPA's{' (' + ', '.join(kernels) + ')' if kernels else ''} without a map; B, H, N, D.\n"
    lines = []
    for (shape, dtype), rows in groups.items():
        found = {row.contestant: row for row in rows}
        floor = found.get("sdpa", rows[0])
        cells = [number(found[name].ratio_to_floor, "x") if name in found else "" for name in names]
        title = f"{shape.replace('x', ', ')} {dtype}"
        lines.append((title, ms(floor.median_ms if floor.contestant == "sdpa" else floor.floor_ms), *cells))
    yield from table(("shape", "SDPA ms", *names), lines)
    yield ""


def _op_tables(run: Run, groups: dict[tuple[str, str], list[Row]]) -> Iterator[str]:
    for (shape, dtype), rows in groups.items():
        yield f"\n**{shape.replace('x', ', ')} {dtype}**\n"
        head = ("", "ms", "spread", "/ floor", "hf_eager / it", "compiled / it", "least ms", "peak MB", "error")
        yield from table(head, (_op_line(run, row) for row in rows))


def _op_line(run: Run, row: Row) -> tuple[str, ...]:
    least = row.least_ms(run.ceilings)
    return (
        row.contestant + (" (with launches)" if row.timing == "stream" else ""),
        ms(row.median_ms),
        _spread(row),
        number(row.ratio_to_floor, "x"),
        number(run.faster_than(row, "hf_eager"), "x"),
        number(run.faster_than(row, "compiled_eager"), "x"),
        "" if least is None else ms(least),
        _mb(row.peak_mb),
        _error(row),
    )


def _model_table(run: Run, groups: dict[tuple[str, str], list[Row]]) -> Iterator[str]:
    lines = []
    for (shape, dtype), rows in groups.items():
        for i, row in enumerate(rows):
            title = f"{shape} {dtype}" if i == 0 else ""
            memory = (_mb(row.needed_mb), _mb(row.peak_mb))
            cells = (ms(row.median_ms), _spread(row), number(row.ratio_to_floor, "x"), *memory, _error(row))
            lines.append((title, row.contestant, *cells))
    yield from table(("model", "", "ms", "spread", "/ floor", "needed MB", "peak MB", "error"), lines, "ll")
    yield ""


def _growth_table(run: Run) -> Iterator[str]:
    lines = by_contestant(run.about["growth"])
    tokens = sorted({point.tokens for points in lines.values() for point in points})
    yield "A ViT-Ti/16, one image, each in a process of its own: ms, and peak MB above the loaded model. The power is"
    yield "that of N in a fit of the three longest.\n"
    cells = []
    for name, points in lines.items():
        found = {point.tokens: f"{ms(point.ms)} ms, {point.mb:,.0f} MB" for point in points}
        powers = [
            power([(point.tokens, value(point)) for point in points]) for value in (lambda p: p.ms, lambda p: p.mb)
        ]
        cells.append((name, *(found.get(n, "") for n in tokens), f"{powers[0]:.2f}, {powers[1]:.2f}"))
    yield from table(("", *(f"{n:,} tokens" for n in tokens), "powers"), cells)
    yield ""


def _left_out(about: dict[str, Any]) -> Iterator[str]:
    """What was not measured, and why; what failed; what the time was too short for."""
    failed = about.get("failed") or {}
    found = {
        "Not run": about.get("not_run", {}),
        "Failed": failed if isinstance(failed, dict) else dict.fromkeys(failed, ""),
        "Cut, for want of time": dict.fromkeys(about.get("cut", []), ""),
    }
    for what, names in found.items():
        if names:
            yield f"{what}:\n"
            yield (
                "\n".join(f"- {name}{': ' if reason else ''}{_plain(reason)}" for name, reason in names.items()) + "\n"
            )


def _plain(text: str) -> str:
    """Without what Markdown would take for its own."""
    return text.replace("|", "/").replace("<", "&lt;").replace(">", "&gt;")


def _spread(row: Row) -> str:
    return f"{100 * row.iqr_ms / row.median_ms:.0f} %"


def _mb(mb: float | None) -> str:
    return "" if mb is None else f"{mb:,.0f}" if mb >= 10 else f"{mb:.1f}"


def _error(row: Row) -> str:
    """Of the output, then of what else there is; of older files and of models the larger one."""
    errors = row.errors.values() if row.errors else () if row.max_error is None else (row.max_error,)
    return ", ".join(f"{error:.0e}" for error in errors)


def write(results: Path, out: Path) -> Path:
    """README.md and plots/ in `out`; plots of results that are gone are removed. Gives the page's path."""
    stored = load(results)
    files: dict[str, list[str]] = {}
    for run in stored.runs:
        for kind, draw in (("op", plots.op_plot), ("models", plots.models_plot), ("growth", plots.growth_plot)):
            name = f"{run.file.removesuffix('.json')}-{kind}.svg"
            if draw(run, out / "plots" / name):
                files.setdefault(run.file, []).append(name)
    _remove_others(out / "plots", [name for names in files.values() for name in names])
    write_atomically(out / "README.md", page(stored, files))
    return out / "README.md"


def _remove_others(folder: Path, names: Iterable[str]) -> None:
    keep = set(names)
    for path in folder.glob("*.svg"):
        if path.name not in keep:
            path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Writes the page and prints its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.report.page", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    options = parser.parse_args(argv)
    print(write(options.results, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
