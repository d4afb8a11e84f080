"""The report, on stored and on synthetic results."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Only for these imports: the root on the path would make a bare `kernels` ours.
sys.path.insert(0, str(ROOT))
from benchmarks.report import page as report  # noqa: E402
from benchmarks.report import stored, targets  # noqa: E402
from benchmarks.report.table import configuration, ms, number, table  # noqa: E402
from benchmarks.suites import growth  # noqa: E402

sys.path.remove(str(ROOT))

GPU_FILE = "nvidia-h200-torch0-triton0.json"


def op_row(batch: int, tokens: int, contestant: str, ratio: float, dtype: str = "bf16", **more: Any) -> dict[str, Any]:
    times = dict(median_ms=ratio * 0.5, min_ms=ratio * 0.4, max_ms=ratio, iqr_ms=ratio * 0.01, rounds=30, floor_ms=0.5)
    shape = f"{batch}x12x{tokens}x64"
    row = dict(suite="op", shape=shape, dtype=dtype, contestant=contestant, timing="graph", **times)
    return row | dict(ratio_to_floor=ratio, peak_mb=12.5, max_error=1e-3) | more


def model_row(shape: str, contestant: str, ratio: float) -> dict[str, Any]:
    row = op_row(1, 1, contestant, ratio)
    return row | dict(suite="models", shape=shape, timing="wall", max_error=None if contestant == "plain" else 1e-2)


@pytest.fixture
def synthetic() -> dict[str, Any]:
    """A synthetic benchmark result of a GPU."""
    ratios = {"sdpa": 1.0, "attnx": 1.1, "attnx_row": 1.05, "vecmat": 1.3, "hf_eager": 7.0, "compiled_eager": 2.4}
    rows = [op_row(batch, n, *item) for batch, n in ((64, 197), (16, 577), (1, 16385)) for item in ratios.items()]
    rows[1]["errors"] = {"output": 2e-3, "map": 3e-7}
    rows += [op_row(1, 197, "sdpa", 1.0), op_row(1, 197, "attnx", 1.4)]
    rows += [op_row(64, 197, "sdpa", 1.0, "fp16"), op_row(64, 197, "attnx", 1.12, "fp16")]
    rows += [
        model_row("vit_base_patch16_2048 b1", name, x) for name, x in (("plain", 1), ("extractor", 1.5), ("hooks", 40))
    ]
    rows += [model_row("vit_base_patch16_2048 b2", name, x) for name, x in (("plain", 1), ("extractor", 1.55))]
    smi = {"driver_version": "0", "clocks.max.sm": "1 MHz", "power.limit": "1 W"}
    gpu = {"multiprocessors": 132, "l2_bytes": 60 << 20, "memory_bytes": 150 * 10**9, "nvidia_smi": smi}
    return dict(
        hardware="NVIDIA H200 (synthetic)",
        device="cuda",
        threads=16,
        versions={"python": "3", "torch": "0", "triton": None},
        commit="synthetic",
        date="2026-01-01T00:00:00+00:00",
        gpu=gpu,
        quick=False,
        done=True,
        rows=rows,
        not_run={
            "flag_attention": "not <installed>",
            "hooks, vit_base_patch16_2048 b2": "out of memory: CUDA out of memory.",
        },
        failed={"op: a test": "AssertionError: off | by"},
        cut=["op: the last"],
    )


@pytest.fixture
def folder(tmp_path: Path, synthetic: dict[str, Any]) -> Path:
    results = tmp_path / "results"
    results.mkdir()
    (results / GPU_FILE).write_text(json.dumps(synthetic))
    cpu = {**synthetic, "device": "cpu", "hardware": "A processor", "date": "2026-02-01", "failed": ["old"]}
    cpu["rows"] = [op_row(2, 197, name, x, "fp32", peak_mb=None) for name, x in (("sdpa", 1), ("attnx", 1.2))]
    for name in ("gpu", "not_run", "cut", "done"):
        del cpu[name]
    (results / "a-processor.json").write_text(json.dumps(cpu))
    (results / "quick.json").write_text(json.dumps({**cpu, "quick": True, "hardware": "Unseen"}))
    return results


def test_stored_numbers_and_missed_goals_are_on_the_page(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results"
    page = report.write_report(results, tmp_path).read_text()
    for run in stored.load(results).runs:
        assert f"(results/{run.file})" in page
        row = next(row for row in run.rows if row.contestant == "attnx")
        assert f"| {ms(row.median_ms)} | {100 * row.iqr_ms / row.median_ms:.0f} % | {row.ratio_to_floor:.2f}x |" in page
        for line in targets.verdicts(run):
            if "missed" in line.verdict:
                assert " | ".join(line) in page
    drawn = [path.name for path in (tmp_path / "plots").glob("*.svg")]
    assert drawn
    assert all(f"(plots/{name})" in page for name in drawn)


def test_page_lists_what_was_measured_and_what_was_not(folder: Path, tmp_path: Path) -> None:
    page = report.write_report(folder, tmp_path / "out").read_text()
    assert page.index("## NVIDIA H200 (synthetic)") < page.index("## A processor, 16 threads")
    assert "Unseen" not in page
    assert "132 multiprocessors, 150 GB, L2 63 MB; driver 0, at most 1 MHz, 1 W" in page
    assert "| 64, 12, 197, 64 bf16 | 0.500 | 1.10x | 1.05x | 1.30x | 7.00x | 2.40x |" in page
    assert "|  | attnx | 0.550 | 2 % | 1.10x | 12 | 1e-03 |" in page
    assert "| 2e-03, 3e-07 |" in page
    assert "- flag_attention: not &lt;installed&gt;" in page
    assert "- op: a test: AssertionError: off / by" in page
    assert "- op: the last" in page
    assert "- old\n" in page


def test_page_and_plots_are_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    def written(name: str) -> dict[str, bytes]:
        report.write_report(folder, tmp_path / name)
        return {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.is_file()}

    first = written("one")
    assert first == written("two")
    assert len(first) == 3  # the page and a plot of the op for each run
    assert all(len(content) < 60_000 for content in first.values())
    assert b"<dc:date>" not in first[GPU_FILE.replace(".json", "-op.svg")]


def test_verdicts_come_from_rows_alone(folder: Path) -> None:
    run = stored.load(folder).runs[0]
    lines = {(v.target, v.shape): v for v in targets.verdicts(run)}
    short = lines["`attention` with its map / SDPA", "197 tokens"]
    assert short.measured == "1.10 (b64), 1.40 (b1), 1.12 (b64 fp16)"
    assert short.verdict == "**missed** in 1 of 3"
    assert lines["`attention` with its map / SDPA", "577 tokens"].verdict == "**met**"
    assert lines["`attention` with its map / SDPA", "1,370 tokens"].verdict == "not measured"
    assert lines["HF-style eager / `attention`", "197 tokens"].verdict == "**met**"
    assert lines["compiled eager / `attention`", "16,385 tokens"].verdict == "**missed**"
    assert lines["extractor / plain forward", "vit_base_patch16_2048 b2"].measured == "1.55"


def test_quick_runs_are_not_published(folder: Path) -> None:
    about = dict(target="sm_90", commit="synthetic", compiled_only=True, rows=[])
    (folder / "sweep-a-quick-part.json").write_text(json.dumps(about))
    (folder / "sweep-b.json").write_text(json.dumps({**about, "quick": True}))
    (folder / "sweep-c.json").write_text(json.dumps({**about, "quick": False}))
    assert list(stored.load(folder).sweeps) == ["sweep-c.json"]


def test_sweeps_show_the_default_beside_the_best(folder: Path) -> None:
    row = dict(kernel="map", N=1370, D=64, B=0, registers=168, spills=0, shared=100)
    rows = [row | dict(config=[128, 128, 8, 3], default=True), row | dict(config=[64, 128, 4, 3], default=False)]
    about = dict(target="sm_90", commit="synthetic")
    (folder / "sweep-a.json").write_text(json.dumps({**about, "compiled_only": True, "rows": rows}))
    timed = [rows[0] | dict(ms=0.2), rows[1] | dict(ms=0.1)]
    (folder / "sweep-b.json").write_text(json.dumps({**about, "compiled_only": False, "rows": timed}))
    page = report.page(stored.load(folder), {})
    assert "| map, N 1370, D 64 | 128x128 8 3 | 0 | 168 | 100 | 0 of 2 |" in page
    assert "| map, N 1370, D 64 | 128x128 8 3 | 0 | 168 | 100 | 0.200 | 64x128 4 3 | 0.100 | 2.00x | 2 of 2 |" in page


def test_configurations() -> None:
    assert configuration([128, 64, 4, 3]) == "128x64 4 3"
    assert configuration([128, 64, 4, 3, 1, 0, 1]) == "128x64 4 3, lag"
    assert configuration([128, 64, 4, 3, 1, 0, 0, 1]) == "128x64 4 3"
    assert configuration([128, 64, 4, 3, 1, 0, 0, 3]) == "128x64 4 3, heads / 3"
    assert configuration([64, 128, 8, 2, 2, 16, 1, 1]) == "64x128 8 2, 2 tiles + 16, lag"


def test_an_invalid_result_file_is_an_error(folder: Path) -> None:
    (folder / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: expected a result"):
        stored.load(folder)


def test_numbers_and_tables() -> None:
    assert [ms(x) for x in (0.001234, 0.01234, 0.1234, 1.234, 12.34, 1234.5)] == [
        *("0.00123", "0.0123", "0.123", "1.23", "12.3", "1,234"),
    ]
    assert [number(x, "x") for x in (None, 1.005, 12.34, 123.4)] == ["", "1.00x", "12.3x", "123x"]
    assert list(table(("", "full", "empty"), [("a", "1", ""), ("b", "", "")])) == [
        "|  | full |",
        "|---|---:|",
        "| a | 1 |",
        "| b |  |",
    ]


def test_growth_is_fitted_and_plotted(tmp_path: Path, folder: Path) -> None:
    rows = [
        dict(contestant=name, tokens=n, ms=c * n**p, peak_mb=n**q)
        for name, c, p, q in (("plain", 0.1, 1.0, 1.0), ("hooks", 0.01, 2.5, 2.0))
        for n in (197, 577, 1025, 4097)
    ]
    path = folder / "a-processor.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "growth": rows}))
    page = report.write_report(folder, tmp_path / "out").read_text()
    assert "N^2.5" in (tmp_path / "out" / "plots" / "a-processor-growth.svg").read_text()
    assert "a-processor-growth.svg" in page


def test_a_power_is_fitted_to_the_largest_sizes() -> None:
    assert growth.power([(1, 100.0), (10, 10.0), (100, 100.0), (1000, 1000.0)]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least two points"):
        growth.power([(1, 1.0)])


def test_targets_on_a_cpu(tmp_path: Path, folder: Path) -> None:
    path = folder / "a-processor.json"
    content = json.loads(path.read_text())
    shape = "vit_base_patch16_224 b8"
    content["rows"] += [
        model_row(shape, name, x) | dict(peak_mb=peak, needed_mb=needed, tokens=197)
        for name, x, peak, needed in (("plain", 1, 100, 60), ("extractor", 0.95, 125, 78), ("cls", 0.99, 101, 60))
    ]
    path.write_text(json.dumps(content))
    page = report.write_report(folder, tmp_path / "out").read_text()
    assert "## Targets: A processor, 16 threads" in page
    assert f"| rollout / plain forward | {shape} | ≤ 1.00 | 0.95 | **met** |" in page
    assert f"| CLS map / plain forward | {shape} | ≤ 0.97 | 0.99 | **missed** |" in page
    # The forward's 60 MB, 12 maps of 8 images of 197 tokens, and 5 %.
    needed = "needed memory of the rollout / of the plain forward"
    assert f"| {needed} | {shape} | ≤ 1.31 | 1.30 | **met** |" in page
    assert "| `attention` with its map / SDPA | 2, 12, 197, 64 | ≤ 1.10 | 1.20 | **missed** |" in page


def test_verdicts_on_word_maps(tmp_path):
    def row(contestant, ratio, needed, error=None):
        return dict(
            contestant=contestant, batch=1, pixels=256, rounds=3, median_ms=100 * ratio, floor_ms=100.0, error=error,
            ratio_to_floor=ratio, iqr_ms=1.0, pairs_per_s=10 / ratio, peak_mb=needed + 1, needed_mb=needed,
        )  # fmt: skip

    rows = [row("word_maps", 0.98, 50, 2e-6), row("gradcam", 1.5, 60, 1e-6), row("original_gradcam", 2.7, 1500)]
    about = dict(
        hardware="Chip", device="cpu", threads=2, versions={"torch": "3"}, commit="abc", date="2026-01-01", layer=8
    )
    (tmp_path / "words-chip.json").write_text(json.dumps({**about, "quick": False, "rows": rows}))
    text = report.write_report(tmp_path, tmp_path / "out").read_text()
    assert "## Words to patches: Chip, 2 threads" in text
    line = next(line for line in text.splitlines() if line.startswith("| 256 px, batch 1 | 0.98"))
    assert line.split(" | ")[1:] == ["0.98", "≤ 1: **met**", "1.80x", "≥ 2: **missed**", "0.04", "< 0.5: **met** |"]
