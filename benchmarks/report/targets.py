"""The performance targets, and verdicts on stored rows: met, missed, or not measured."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.report.stored import Row, Run
from benchmarks.report.table import verdict

NOT_MEASURED = "not measured"
LONG = "vit_base_patch16_2048"  # 16,385 tokens
EAGER = ("hooks", "output_attentions")
LAYERS = 12


class Verdict(NamedTuple):
    """One line of the table. tokens: number of tokens, or the shape; measured: the value for every batch size."""

    target: str
    tokens: str
    goal: str
    measured: str
    verdict: str


class Target(NamedTuple):
    """A target of the op: `value` must be at most (or at least) the bound for its number of tokens."""

    name: str
    at_most: bool
    short: float  # bound up to 257 tokens
    long: float  # bound above
    value: Callable[[Run, Row], float | None]


TOKENS = (197, 257, 577, 1370, 4097, 16385)
TARGETS = (
    Target("`attention` with its map / SDPA", True, 1.15, 1.5, lambda run, row: row.ratio_to_floor),
    Target("HF-style eager / `attention`", False, 4, 6, lambda run, row: run.faster_than(row, "hf_eager")),
    Target("compiled eager / `attention`", False, 2, 3, lambda run, row: run.faster_than(row, "compiled_eager")),
)
GPU_MODELS = {
    ("vit_base_patch16_224 b64", "extractor"): 1.0,
    ("vit_base_patch16_224 b256", "extractor"): 1.0,
    ("vit_base_patch16_384 b64", "extractor"): 1.1,
    ("vit_base_patch14_518 b64", "extractor"): 1.1,
    ("vit_base_patch16_224 b1", "extractor_graph"): 1.0,
}
# {model and batch: batch size}
CPU_MODELS = {"vit_base_patch16_224 b8": 8, "vit_base_patch16_384 b2": 2, "vit_small_patch8_480 b1": 1}


def verdicts(run: Run | None) -> Iterator[Verdict]:
    """A line for every GPU target and number of tokens. Without a run, all are not measured."""
    for target in TARGETS:
        for tokens in TOKENS:
            yield _of_op(run, target, tokens)
    for (model, contestant), bound in GPU_MODELS.items():
        row = run.find("models", model, contestant) if run else None
        yield _at_most(f"{contestant} / plain forward, {model}", "", bound, row.ratio_to_floor if row else None)
    yield from _of_long_rollout(run)


def cpu_verdicts(run: Run) -> Iterator[Verdict]:
    """A line for every CPU target: fp32, two threads."""
    for row in run.rows:
        if row.suite == "op" and row.contestant == "attnx" and row.dtype == "fp32":
            yield _at_most("`attention` with its map / SDPA", row.shape.replace("x", ", "), 1.10, row.ratio_to_floor)
    for name, contestant, bound in (("rollout", "extractor", 1.0), ("CLS map", "cls", 0.97)):
        for model in CPU_MODELS:
            found = run.find("models", model, contestant)
            yield _at_most(f"{name} / plain forward", model, bound, found.ratio_to_floor if found else None)
    for name, field in (("needed memory", "needed_mb"), ("peak memory", "peak_mb")):
        for model, batch in CPU_MODELS.items():
            ours, plain = (run.find("models", model, contestant) for contestant in ("extractor", "plain"))
            mb, floor_mb = getattr(ours, field, None), getattr(plain, field, None)
            bound = ratio = None
            if ours is not None and ours.tokens is not None and mb is not None and floor_mb is not None:
                # The plain forward's memory, one fp32 map per layer, and 5 %.
                bound = 1.05 * (floor_mb + LAYERS * batch * 4 * ours.tokens**2 / 1e6) / floor_mb
                ratio = mb / floor_mb
            yield _at_most(f"{name} of the rollout / of the plain forward", model, bound, ratio)


def _at_most(target: str, shape: str, bound: float | None, value: float | None) -> Verdict:
    goal, measured = ("-" if x is None else f"{x:.2f}" for x in (bound, value))
    held = [] if value is None or bound is None else [value <= bound]
    return Verdict(target, shape, goal if bound is None else f"≤ {goal}", measured, _verdict(held))


def _of_op(run: Run | None, target: Target, tokens: int) -> Verdict:
    bound = target.short if tokens <= 257 else target.long
    found = []
    for row in run.rows if run else ():
        if row.suite == "op" and row.contestant == "attnx" and row.sizes[2] == tokens and row.dtype != "fp32":
            value = target.value(run, row) if run else None
            if value is not None:
                found.append((value, f"b{row.sizes[0]}{'' if row.dtype == 'bf16' else ' ' + row.dtype}"))
    held = [value <= bound if target.at_most else value >= bound for value, _ in found]
    measured = ", ".join(f"{value:.2f} ({batch})" for value, batch in found)
    goal = f"{'≤' if target.at_most else '≥'} {bound:g}"
    return Verdict(target.name, f"{tokens:,}", goal, measured or "-", _verdict(held))


def _of_long_rollout(run: Run | None) -> Iterator[Verdict]:
    """Two lines for the model with 16,385 tokens: its time, and a batch that attnx runs and eager attention can't."""
    rows = [row for row in run.rows if row.suite == "models" and row.shape.startswith(LONG)] if run else []
    ours = {row.shape.removeprefix(LONG + " "): row.ratio_to_floor for row in rows if row.contestant == "extractor"}
    measured = ", ".join(f"{ratio:.2f} ({batch})" for batch, ratio in ours.items())
    held = [ratio <= 1.6 for ratio in ours.values()]
    name = "rollout of ViT-B/16 at 2048 px / its SDPA forward"
    yield Verdict(name, "16,385", "≤ 1.6", measured or "-", _verdict(held))

    eager = [(row.shape.removeprefix(LONG + " "), "runs") for row in rows if row.contestant in EAGER]
    for entry, reason in run.about.get("not_run", {}).items() if run else ():
        contestant, _, shape = entry.partition(f", {LONG} ")
        if contestant in EAGER and shape and reason.startswith(("out of memory", "not tried")):
            eager.append((shape, _reason(reason)))
    result = _verdict([any(how == "out of memory" and batch in ours for batch, how in eager)] if eager else [])
    if "met" not in result and any(how.startswith("not tried") for _, how in eager):
        result = "not tried"
    measured = ", ".join(f"{how} ({batch})" for batch, how in eager)
    yield Verdict("that rollout where eager attention runs out of memory", "16,385", "runs", measured or "-", result)


def _reason(reason: str) -> str:
    """ "out of memory", or "not tried: N GB needed" if eager attention was not run at all."""
    if "not tried" not in reason:
        return "out of memory"
    needed = re.search(r"[\d.]+ GB", reason)
    return f"not tried: {needed[0]} needed" if needed else "not tried"


def _verdict(held: list[bool]) -> str:
    if not held:
        return NOT_MEASURED
    return verdict(all(held)) + (f" in {held.count(False)} of {len(held)}" if len(held) > 1 and not all(held) else "")
