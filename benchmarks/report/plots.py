"""Plots of stored results as SVG. The same results and matplotlib version give the same bytes."""

from pathlib import Path
from typing import Any

from benchmarks.report.stored import Row, Run
from benchmarks.suites.growth import by_contestant, power

STYLE: dict[str, Any] = {
    "svg.hashsalt": "attnx", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
Lines = dict[str, list[tuple[int, float]]]


def op_plot(run: Run, path: Path) -> bool:
    """Plot the time over the floor's against tokens, one line per contestant. False if there are no rows."""
    lines = _ratios(run)
    if not lines:
        return False
    figure, axes = _figure(7.2, 4.2)
    axes.axhline(1, color="#333333", linewidth=1, label="SDPA")
    _draw(axes, lines)
    bottom, top = axes.get_ylim()
    steps = [step for step in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if bottom <= step <= top]
    axes.set_yticks(steps, [f"{step:g}x" for step in steps])
    axes.set_ylabel("time / SDPA without a map")
    axes.set_title(f"One attention call, {run.about['hardware']}", loc="left")
    _save(figure, path)
    return True


def growth_plot(run: Run, path: Path) -> bool:
    """Plot time and peak memory of whole rollouts against tokens, with fitted powers. False if there are no rows."""
    contestants = by_contestant(run.about.get("growth", ()))
    if not contestants:
        return False
    figure, pair = _figure(11.0, 4.0, columns=2)
    for axes, field, unit in zip(pair, ("ms", "mb"), ("milliseconds", "peak megabytes above the model"), strict=True):
        lines = {name: [(p.tokens, getattr(p, field)) for p in points] for name, points in contestants.items()}
        _draw(axes, lines, {name: f"{name}: N^{power(points):.1f}" for name, points in lines.items()})
        axes.set_ylabel(unit)
    pair[0].set_title(f"Rollout of a ViT-Ti/16, one image, {run.about['hardware']}", loc="left")
    figure.subplots_adjust(wspace=1.0)
    _save(figure, path)
    return True


def _ratios(run: Run) -> Lines:
    """{contestant: [(tokens, ratio)]} in the main dtype; of several batches, the one with most contestants."""
    best: dict[int, list[Row]] = {}
    for (_, dtype), rows in run.groups("op").items():
        tokens = rows[0].sizes[2]
        if dtype == ("bf16" if run.cuda else "fp32") and len(rows) >= len(best.get(tokens, [])):
            best[tokens] = rows
    lines: Lines = {}
    for tokens in sorted(best):
        for row in best[tokens]:
            if row.contestant != "sdpa":
                lines.setdefault(row.contestant, []).append((tokens, row.ratio_to_floor))
    return lines


def _draw(axes: Any, lines: Lines, labels: dict[str, str] | None = None) -> None:
    """Draw the lines on logarithmic axes. labels: {name: text of the legend}, by default the name."""
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=(labels or {}).get(name, name), marker="o", markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    # Beside the plot, in the order of the lines' last points.
    handles = sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1], reverse=True)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), facecolor="white")
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
