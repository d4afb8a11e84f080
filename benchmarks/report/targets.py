"""The performance targets, and verdicts on stored rows: met, missed, or not measured."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.report.stored import Row, Run
from benchmarks.report.table import verdict

LAYERS = 12
TOKENS = (197, 257, 577, 1370, 4097, 16385)
NOT_MEASURED = "not measured"


class Verdict(NamedTuple):
    """One line of the table. shape: tokens, shape or model; measured: the value, for every batch size."""

    target: str
    shape: str
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
    ("vit_base_patch16_2048 b1", "extractor"): 1.6,
    ("vit_base_patch16_2048 b2", "extractor"): 1.6,
}
# {model and batch: batch size}
CPU_MODELS = {"vit_base_patch16_224 b8": 8, "vit_base_patch16_384 b2": 2, "vit_small_patch8_480 b1": 1}


def verdicts(run: Run) -> Iterator[Verdict]:
    """A line for every target, also for those that the run did not measure."""
    yield from _on_gpu(run) if run.cuda else _on_cpu(run)


def _on_gpu(run: Run) -> Iterator[Verdict]:
    """Half precision."""
    rows = [row for row in run.rows if row.suite == "op" and row.contestant == "attnx" and row.dtype != "fp32"]
    for target in TARGETS:
        for tokens in TOKENS:
            found = [(target.value(run, row), row) for row in rows if row.sizes[2] == tokens]
            yield _of_op(target, tokens, [(value, row) for value, row in found if value is not None])
    for (model, contestant), bound in GPU_MODELS.items():
        row = run.find("models", model, contestant)
        yield _at_most(f"{contestant} / plain forward", model, bound, row.ratio_to_floor if row else None)


def _on_cpu(run: Run) -> Iterator[Verdict]:
    """fp32."""
    for row in run.rows:
        if row.suite == "op" and row.contestant == "attnx" and row.dtype == "fp32":
            yield _at_most("`attention` with its map / SDPA", row.shape.replace("x", ", "), 1.10, row.ratio_to_floor)
    for name, contestant, bound in (("rollout", "extractor", 1.0), ("CLS map", "cls", 0.97)):
        for model in CPU_MODELS:
            found = run.find("models", model, contestant)
            yield _at_most(f"{name} / plain forward", model, bound, found.ratio_to_floor if found else None)
    for model, batch in CPU_MODELS.items():
        ours, plain = (run.find("models", model, contestant) for contestant in ("extractor", "plain"))
        if ours and plain and ours.tokens and ours.needed_mb and plain.needed_mb:
            # The plain forward's memory, one fp32 map per layer, and 5 %.
            bound = 1.05 * (plain.needed_mb + LAYERS * batch * 4 * ours.tokens**2 / 1e6) / plain.needed_mb
            ratio = ours.needed_mb / plain.needed_mb
            yield _at_most("needed memory of the rollout / of the plain forward", model, bound, ratio)


def _at_most(target: str, shape: str, bound: float, value: float | None) -> Verdict:
    if value is None:
        return Verdict(target, shape, f"≤ {bound:.2f}", "-", NOT_MEASURED)
    return Verdict(target, shape, f"≤ {bound:.2f}", f"{value:.2f}", verdict(value <= bound))


def _of_op(target: Target, tokens: int, found: list[tuple[float, Row]]) -> Verdict:
    bound = target.short if tokens <= 257 else target.long
    goal = f"{'≤' if target.at_most else '≥'} {bound:g}"
    if not found:
        return Verdict(target.name, f"{tokens:,} tokens", goal, "-", NOT_MEASURED)
    held = [value <= bound if target.at_most else value >= bound for value, _ in found]
    measured = (f"{x:.2f} (b{r.sizes[0]}{'' if r.dtype == 'bf16' else ' ' + r.dtype})" for x, r in found)
    missed = f" in {held.count(False)} of {len(held)}" if len(held) > 1 and not all(held) else ""
    return Verdict(target.name, f"{tokens:,} tokens", goal, ", ".join(measured), verdict(all(held)) + missed)
