"""What attnx is held to, and whether stored rows say that it is so: met, missed, or not measured."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.report.stored import Row, Run

LONG = "vit_base_patch16_2048"  # 16,385 tokens
EAGER = ("hooks", "output_attentions")


class Verdict(NamedTuple):
    """One line of the table; `measured` lists every batch size."""

    target: str
    tokens: str
    goal: str
    measured: str
    verdict: str


class Target(NamedTuple):
    """`value` of a row of attnx is to be at most (or at least) the bound that holds for its number of tokens."""

    name: str
    at_most: bool
    bounds: dict[int, float]
    value: Callable[[Run, Row], float | None]


def _from(short: dict[int, float], long: float) -> dict[int, float]:
    return {**short, **dict.fromkeys((577, 1370, 4097, 16385), long)}


TARGETS = (
    Target(
        "`attention` with its map / SDPA", True, _from({197: 1.15, 257: 1.15}, 1.5), lambda run, r: r.ratio_to_floor
    ),
    Target("HF-style eager / `attention`", False, _from({197: 4}, 6), lambda run, r: run.faster_than(r, "hf_eager")),
    Target(
        "compiled eager / `attention`", False, _from({197: 2}, 3), lambda run, r: run.faster_than(r, "compiled_eager")
    ),
)


def verdicts(run: Run | None) -> Iterator[Verdict]:
    """A line for every target and number of tokens; None: nothing is measured."""
    for target in TARGETS:
        for tokens, bound in target.bounds.items():
            yield _of_op(run, target, tokens, bound)
    for (model, contestant), bound in GPU_MODELS.items():
        found = [row for row in run.rows if row.shape == model and row.contestant == contestant] if run else []
        yield _held(f"{contestant} / plain forward, {model}", "", bound, found[0].ratio_to_floor if found else None)
    yield from _of_long_rollout(run)


GPU_MODELS = {
    ("vit_base_patch16_224 b64", "extractor"): 1.0,
    ("vit_base_patch16_224 b256", "extractor"): 1.0,
    ("vit_base_patch16_384 b64", "extractor"): 1.1,
    ("vit_base_patch14_518 b64", "extractor"): 1.1,
    ("vit_base_patch16_224 b1", "extractor_graph"): 1.0,
}
# Names of models and batches.
CPU_MODELS = {"vit_base_patch16_224 b8": 8, "vit_base_patch16_384 b2": 2, "vit_small_patch8_480 b1": 1}
LAYERS = 12


def cpu_verdicts(run: Run) -> Iterator[Verdict]:
    """The same for a CPU: fp32, two threads."""
    for row in run.rows:
        if row.suite == "op" and row.contestant == "attnx" and row.dtype == "fp32":
            yield _held("`attention` with its map / SDPA", row.shape.replace("x", ", "), 1.10, row.ratio_to_floor)
    for name, bound in (("extractor", 1.0), ("cls", 0.97)):
        for model in CPU_MODELS:
            found = [row for row in run.rows if row.shape == model and row.contestant == name]
            what = "rollout" if name == "extractor" else "CLS map"
            yield _held(f"{what} / plain forward", model, bound, found[0].ratio_to_floor if found else None)
    for what, field in (("memory needed by the rollout", "needed_mb"), ("the same, and what malloc keeps", "peak_mb")):
        for model, batch in CPU_MODELS.items():
            rows = {row.contestant: row for row in run.rows if row.shape == model}
            ours, plain = (getattr(rows.get(name), field, None) for name in ("extractor", "plain"))
            if ours is None or plain is None or (tokens := rows["extractor"].tokens) is None:
                yield _held(f"{what} / the plain forward's", model, None, None)
            else:
                maps = LAYERS * batch * 4 * tokens**2 / 1e6
                yield _held(f"{what} / the plain forward's", model, 1.05 * (plain + maps) / plain, ours / plain)


def _held(target: str, shape: str, bound: float | None, value: float | None) -> Verdict:
    held = [] if value is None or bound is None else [value <= bound]
    goal = "-" if bound is None else f"≤ {bound:.2f}"
    return Verdict(target, shape, goal, "-" if value is None else f"{value:.2f}", _verdict(held))


def _of_op(run: Run | None, target: Target, tokens: int, bound: float) -> Verdict:
    def wanted(row: Row) -> bool:
        return row.suite == "op" and row.contestant == "attnx" and row.sizes[2] == tokens and row.dtype != "fp32"

    values = [] if run is None else [(row, target.value(run, row)) for row in run.rows if wanted(row)]
    found = [(row.sizes[0], row.dtype, value) for row, value in values if value is not None]
    goal = f"{'≤' if target.at_most else '≥'} {bound:g}"
    held = [value <= bound if target.at_most else value >= bound for _, _, value in found]
    measured = ", ".join(
        f"{value:.2f} (b{batch}{'' if dtype == 'bf16' else ' ' + dtype})" for batch, dtype, value in found
    )
    return Verdict(target.name, f"{tokens:,}", goal, measured or "-", _verdict(held))


def _of_long_rollout(run: Run | None) -> Iterator[Verdict]:
    rows = [row for row in run.rows if row.suite == "models" and row.shape.startswith(LONG)] if run else []
    ours = {row.shape.removeprefix(LONG + " "): row.ratio_to_floor for row in rows if row.contestant == "extractor"}
    measured = ", ".join(f"{ratio:.2f} ({batch})" for batch, ratio in ours.items())
    held = [ratio <= 1.6 for ratio in ours.values()]
    name = "rollout of ViT-B/16 at 2048 px / its SDPA forward"
    yield Verdict(name, "16,385", "≤ 1.6", measured or "-", _verdict(held))
    yield _where_eager_cannot(run, rows, set(ours))


def _where_eager_cannot(run: Run | None, rows: list[Row], ours: set[str]) -> Verdict:
    """One batch that attnx holds and eager, tried, does not is what is claimed; the others stand beside it."""
    ran = [(row.shape.removeprefix(LONG + " "), "runs") for row in rows if row.contestant in EAGER]
    not_run = (run.about.get("not_run", {}) if run else {}).items()
    ran += [
        (name.removeprefix(f"{eager}, {LONG} "), _why_not(reason))
        for name, reason in not_run
        for eager in EAGER
        if name.startswith(f"{eager}, {LONG} ") and reason.startswith(("out of memory", "not tried"))
    ]
    measured = ", ".join(f"{how} ({batch})" for batch, how in ran)
    held = any(how == "out of memory" and batch in ours for batch, how in ran)
    untried = any(how.startswith("not tried") for _, how in ran)
    verdict = "not tried" if untried and not held else _verdict([held] if ran else [])
    return Verdict("that rollout where eager can't hold it", "16,385", "runs", measured or "-", verdict)


def _why_not(reason: str) -> str:
    """The words "out of memory", or of what was never tried "not tried: N GB needed"."""
    if "not tried" not in reason:
        return "out of memory"
    needed = re.search(r"[\d.]+ GB", reason)
    return f"not tried: {needed[0]} needed" if needed else "not tried"


def _verdict(held: list[bool]) -> str:
    if not held:
        return "not measured"
    return (
        "**met**"
        if all(held)
        else "**missed**"
        if len(held) == 1
        else f"**missed** in {held.count(False)} of {len(held)}"
    )
