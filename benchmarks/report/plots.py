"""Plots of stored results as SVG; the same results give the same bytes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.stored import Row, Run
from benchmarks.suites.growth import by_contestant, power

COLORS = {
    "attnx": "#0b6e4f",
    "attnx_eager": "#95d5b2",
    "attnx_row": "#74c69d",
    "vecmat": "#3a86ff",
    "extractor": "#3a86ff",
    "extractor_qk": "#8338ec",
    "extractor_graph": "#5e60ce",
    "cls": "#74c69d",
    "plain": "#333333",
    "hf_eager": "#d1495b",
    "hooks": "#d1495b",
    "output_attentions": "#d1495b",
    "timm_eager": "#edae49",
    "compiled_eager": "#8d5a97",
    "flex_map": "#8c6d46",
    "flex_vecmat": "#8c8c8c",
    "flag_attention": "#444444",
    "sdpa_cudnn": "#999999",
}
LINE = 0.052  # of an axis: the height of a line of text
STYLE: dict[str, Any] = {
    "svg.hashsalt": "attnx",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def op_plot(run: Run, path: Path) -> bool:
    """Time over the floor's against tokens, a line for each contestant; of several batch sizes see `_lines`."""
    lines = _lines(run)
    if not lines:
        return False
    figure, axes = _figure(7.2, 4.2)
    axes.axhline(1, color="#333333", linewidth=1)
    ends = []
    for name, points in lines.items():
        color = COLORS.get(name, "#666666")
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.8)
        ends.append((name, points[-1], color))
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    top = 1.15 * max(ratio for points in lines.values() for _, ratio in points)
    bottom = 0.87 * min(1.0, *(ratio for points in lines.values() for _, ratio in points))
    axes.set_ylim(bottom, top)
    steps = [step for step in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if bottom <= step <= top]
    axes.set_yticks(steps, [f"{step:g}x" for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("time / SDPA without a map")
    axes.set_title(f"One attention call, {run.about['hardware']}", loc="left", color="#222222")
    _label_ends(axes, [*ends, ("SDPA", (ticks[-1], 1.0), "#333333")])
    _save(figure, path)
    return True


def models_plot(run: Run, path: Path) -> bool:
    """Time over the plain forward's, a group of bars for each model."""
    groups = run.groups("models")
    bars = [(shape, row) for (shape, _), rows in groups.items() for row in rows if row.contestant != "plain"]
    if not bars:
        return False
    figure, axes = _figure(7.2, 0.9 + 0.27 * (len(bars) + len(groups)))
    longest = max(row.ratio_to_floor for _, row in bars)
    y, last = 0.0, ""
    for shape, row in bars:
        if shape != last:
            box = dict(facecolor="white", edgecolor="none", pad=1)
            axes.text(0, y, shape, va="center", color="#222222", fontweight="bold", bbox=box)
            y, last = y + 1, shape
        axes.barh(y, row.ratio_to_floor, height=0.8, color=COLORS.get(row.contestant, "#666666"))
        text = f"{row.contestant}  {row.ratio_to_floor:.2f}x"
        axes.text(row.ratio_to_floor + 0.01 * longest, y, text, va="center", color="#333333")
        y += 1
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xlim(0, 1.35 * longest)
    axes.set_ylim(y - 0.4, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time / plain forward pass (the line)")
    axes.set_title(f"All-layer rollout of whole models, {run.about['hardware']}", loc="left", color="#222222")
    _save(figure, path)
    return True


def growth_plot(run: Run, path: Path) -> bool:
    """Time and peak memory of whole rollouts against tokens, both axes logarithmic, with the fitted powers."""
    lines = by_contestant(run.about.get("growth", ()))
    if not lines:
        return False
    figure, pair = _figure(9.6, 4.0, columns=2)
    for axes, field, unit in zip(pair, ("ms", "mb"), ("milliseconds", "peak megabytes above the model"), strict=True):
        ends = []
        for name, points in lines.items():
            values = [(point.tokens, getattr(point, field)) for point in points]
            color = COLORS.get(name, "#666666")
            axes.plot(*zip(*values, strict=True), color=color, marker="o", markersize=4, linewidth=1.8)
            ends.append((f"{name}: N^{power(values):.1f}", values[-1], color))
        ticks = sorted({point.tokens for points in lines.values() for point in points})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        _label_ends(axes, ends)
    pair[0].set_title(f"Rollout of a ViT-Ti/16, one image, {run.about['hardware']}", loc="left", color="#222222")
    figure.subplots_adjust(wspace=0.75)
    _save(figure, path)
    return True


def _lines(run: Run) -> dict[str, list[tuple[int, float]]]:
    """contestant -> (tokens, ratio); of several batch sizes the one with most contestants, then the largest."""
    best: dict[int, Sequence[Row]] = {}
    for (_, dtype), rows in run.groups("op").items():
        if dtype == "fp16" or (dtype == "bf16" and not run.cuda):
            continue
        tokens = rows[0].sizes[2]
        if tokens not in best or len(rows) >= len(best[tokens]):
            best[tokens] = rows
    lines: dict[str, list[tuple[int, float]]] = {}
    for tokens in sorted(best):
        for row in best[tokens]:
            if row.contestant != "sdpa":
                lines.setdefault(row.contestant, []).append((tokens, row.ratio_to_floor))
    return lines


def _label_ends(axes: Any, ends: list[tuple[str, tuple[int, float], str]]) -> None:
    """Names right of the lines' last points; those at the right edge moved apart where they would lie on each other."""
    right = max(tokens for _, (tokens, _), _ in ends)
    low, high = axes.get_ylim()
    taken = -1.0
    for name, (tokens, ratio), color in sorted(ends, key=lambda end: end[1][1]):
        if tokens < right:
            axes.annotate(name, (tokens, ratio), (6, 0), textcoords="offset points", va="center", color=color)
            continue
        taken = max(math.log(ratio / low) / math.log(high / low), taken + LINE)
        axes.annotate(name, (1.02, taken), xycoords="axes fraction", va="center", color=color, annotation_clip=False)


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
