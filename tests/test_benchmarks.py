import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """What `python -m benchmarks.run --quick` stored and printed. Always on the CPU."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(out)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = out.iterdir()
    return json.loads(path.read_text()), done.stdout


def test_every_contestant_has_a_row(results: tuple[dict, str]) -> None:
    contestants = {(row["suite"], row["shape"]): set() for row in results[0]["rows"]}
    for row in results[0]["rows"]:
        contestants[row["suite"], row["shape"]].add(row["contestant"])
    assert contestants == {
        ("op", "2x3x37x32"): {"sdpa", "attnx", "attnx_row", "hf_eager", "timm_eager"},
        ("models", "tiny b2"): {"plain", "attnx", "extractor", "hooks"},
        ("models", "hf_tiny b2"): {"plain", "attnx", "extractor", "output_attentions"},
    }
    assert results[0]["failed"] == []


def test_rows_carry_times_ratios_and_errors(results: tuple[dict, str]) -> None:
    for row in results[0]["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"], row
        assert row["rounds"] == 2, row
        assert row["ratio_to_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"], rel=1e-3), row
        if row["contestant"] == "plain":
            assert row["max_error"] is None, row
        else:
            assert 0 <= row["max_error"] < 1e-4, row
    measured = [(row["shape"], row["contestant"]) for row in results[0]["rows"] if row["peak_mb"] is not None]
    assert measured == [("tiny b2", "attnx")]


def test_result_says_where_it_comes_from_but_no_path(results: tuple[dict, str]) -> None:
    result = results[0]
    assert result["quick"] is True
    assert result["device"] == "cpu"
    assert result["versions"]["torch"]
    assert result["versions"]["python"].count(".") == 2
    assert {"hardware", "threads", "commit", "date"} <= set(result)
    assert str(ROOT) not in json.dumps(result)


def test_table_of_ratios_comes_last(results: tuple[dict, str]) -> None:
    lines = results[1].split("contestant  ")[-1].splitlines()
    assert any(line.startswith("attnx_row") for line in lines)
    assert lines[-1].endswith(".json: 13 rows")
