"""Plots of stored results as SVG. The same results and matplotlib version give the same bytes."""

from pathlib import Path
from typing import Any

from benchmarks.report.stored import Row, Run
from benchmarks.suites.growth import by_contestant, power

COLORS = {
    "attnx": "#0b6e4f", "attnx_eager": "#95d5b2", "attnx_row": "#74c69d", "vecmat": "#3a86ff",
    "extractor": "#3a86ff", "extractor_qk": "#8338ec", "plain": "#333333",
    "hf_eager": "#d1495b", "hooks": "#d1495b", "timm_eager": "#edae49", "compiled_eager": "#8d5a97",
    "flex_map": "#8c6d46", "flex_vecmat": "#8c8c8c", "sdpa_cudnn": "#999999",
}  # fmt: skip
STYLE: dict[str, Any] = {
    "svg.hashsalt": "attnx", "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555",
}  # fmt: skip
Lines = dict[str, list[tuple[int, float]]]


def op_plot(run: Run, path: Path) -> bool:
    """Plot the time over the floor's against tokens, one line per contestant. False if there are no rows."""
    lines = _ratios(run)
    if not lines:
        return False
    figure, axes = _figure(7.2, 4.2)
    axes.axhline(1, color="#333333", linewidth=1, label="SDPA")
    ratios = [ratio for points in lines.values() for _, ratio in points]
    bottom, top = 0.87 * min(1.0, *ratios), 1.15 * max(ratios)
    _draw(axes, lines)
    axes.set_ylim(bottom, top)
    steps = [step for step in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if bottom <= step <= top]
    axes.set_yticks(steps, [f"{step:g}x" for step in steps])
    axes.set_ylabel("time / SDPA without a map")
    axes.set_title(f"One attention call, {run.about['hardware']}", loc="left", color="#222222")
    _legend(axes)
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
        _legend(axes)
    pair[0].set_title(f"Rollout of a ViT-Ti/16, one image, {run.about['hardware']}", loc="left", color="#222222")
    figure.subplots_adjust(wspace=1.0)
    _save(figure, path)
    return True


def _ratios(run: Run) -> Lines:
    """{contestant: [(tokens, ratio)]}, of the batch size with most contestants; if several, of the largest."""
    best: dict[int, list[Row]] = {}
    for (_, dtype), rows in run.groups("op").items():
        if dtype == "fp16" or (dtype == "bf16" and not run.cuda):
            continue
        tokens = rows[0].sizes[2]
        if len(rows) >= len(best.get(tokens, [])):
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
        style = dict(color=COLORS.get(name, "#666666"), marker="o", markersize=4, linewidth=1.8)
        axes.plot(*zip(*points, strict=True), label=(labels or {}).get(name, name), **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _legend(axes: Any) -> None:
    """A legend beside the plot, in the order of the lines' last points."""
    lines = sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1], reverse=True)
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcdefaults()
    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), facecolor="white")
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
