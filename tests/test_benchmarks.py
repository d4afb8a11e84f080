import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Only for these imports: the root on the path would make a bare `kernels` ours.
sys.path.insert(0, str(ROOT))
from benchmarks import exact, machine, mkl, record, run, timing  # noqa: E402
from benchmarks.peers import op as peers  # noqa: E402
from benchmarks.suites import memory  # noqa: E402

sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The stored result and the output of `python -m benchmarks.run --quick` on the CPU."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(out)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = out.iterdir()
    assert path.name.endswith("-quick.json")
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_every_contestant_has_a_row_or_a_reason(results: tuple[dict, str]) -> None:
    contestants: dict[tuple[str, str], set[str]] = {}
    for row in results[0]["rows"]:
        contestants.setdefault((row["suite"], row["shape"]), set()).add(row["contestant"])
    assert results[0]["not_run"] == {}
    assert contestants == {
        ("op", "2x3x37x32"): set(peers.NAMES),
        ("models", "tiny b2"): {"plain", "attnx", "extractor", "cls", "hooks"},
        ("models", "hf_tiny b2"): {"plain", "attnx", "extractor", "cls", "output_attentions"},
    }
    assert results[0]["failed"] == {}
    assert results[0]["cut"] == []
    assert results[0]["done"] is True


@pytest.mark.slow
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
    needed = [row["needed_mb"] for row in results[0]["rows"] if row.get("needed_mb") is not None]
    assert len(needed) == bool(memory.GIVES_BACK)
    assert all(0 < mb < 100 for mb in needed)


@pytest.mark.slow
def test_result_has_its_environment_but_no_path(results: tuple[dict, str]) -> None:
    result = results[0]
    assert result["quick"] is True
    assert result["device"] == "cpu"
    assert result["versions"]["torch"]
    assert result["versions"]["python"].count(".") == 2
    assert {"hardware", "threads", "commit", "date"} <= set(result)
    assert str(ROOT) not in json.dumps(result)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_mkl_runs_as_on_intel_and_the_hardware_name_says_so() -> None:
    code = (
        "import ctypes, torch; from benchmarks import machine\n"
        "print(ctypes.CDLL(None).mkl_serv_intel_cpu_true(), machine.hardware('cpu'))"
    )
    with mkl.as_on_intel():
        printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert printed == f"1 {machine.hardware('cpu')} (MKL as on Intel)\n"
    assert mkl.VARIABLE not in os.environ


@pytest.mark.slow
def test_rows_are_printed(results: tuple[dict, str]) -> None:
    lines = results[1].splitlines()
    assert any(line.startswith("|  | vecmat |") for line in lines)
    assert lines[-1].endswith(f".json: {len(results[0]['rows'])} rows")


# The following tests replace the suites.


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> dict[str, record.Found]:
    found = {suite: record.Found([_row(suite)], {}, {}, []) for suite in run.SUITES}
    monkeypatch.setattr(run, "run_suite", lambda suite, *args: args[-1].add(found[suite], suite))
    monkeypatch.setattr(run, "add_memory", lambda found, quick: None)
    monkeypatch.setattr(run.growth, "measure", lambda: iter(()))
    return found


def _row(suite: str) -> dict[str, Any]:
    row = dict(
        suite=suite, shape="1x1x1x1", dtype="fp32", contestant="sdpa", timing="wall", peak_mb=None, max_error=0.0
    )
    return row | dict(median_ms=1.0, iqr_ms=0.1, floor_ms=1.0, ratio_to_floor=1.0)


def test_only_a_complete_run_has_the_final_name(tmp_path: Path, suites: dict[str, record.Found]) -> None:
    stem = machine.file_stem("cpu")
    assert run.run(tmp_path, "cpu")
    (whole,) = tmp_path.iterdir()
    assert whole.name == f"{stem}.json"
    before = whole.read_text()
    suites["models"].cut.append("test_rollout[the last]")
    assert not run.run(tmp_path, "cpu")
    suites["models"].cut.clear()
    suites["op"].failed["test_attention[one]"] = "AssertionError"
    assert not run.run(tmp_path, "cpu")
    assert whole.read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}{end}.json" for end in ("", "-part", "-part-2")}
    part = json.loads((tmp_path / f"{stem}-part.json").read_text())
    assert part["cut"] == ["models: test_rollout[the last]"]
    part = json.loads((tmp_path / f"{stem}-part-2.json").read_text())
    assert part["failed"] == {"op: test_attention[one]": "AssertionError"}


def test_an_interrupted_run_keeps_its_rows(
    tmp_path: Path, suites: dict[str, record.Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_suite(suite: str, *args: Any) -> None:
        if suite == "models":
            raise KeyboardInterrupt
        args[-1].add(suites[suite], suite)

    monkeypatch.setattr(run, "run_suite", run_suite)
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path, "cpu")
    (part,) = tmp_path.iterdir()
    assert part.name.endswith("-part.json")
    kept = json.loads(part.read_text())
    assert kept["done"] is False
    assert [row["suite"] for row in kept["rows"]] == ["op"]


def test_an_interrupted_suite_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two signals are sent to the parent only, as `timeout` does."""
    child = """
import json, os, signal, sys, time
path = next(a for a in sys.argv if a.startswith("--record=")).removeprefix("--record=")
row = json.loads(os.environ["ROW"])
with open(path, "a") as file:
    file.write(json.dumps({"planned": ["a", "b"]}) + "\\n" + json.dumps({"row": row, "test": "a"}) + "\\n")
for _ in range(2):
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    monkeypatch.setenv("ROW", json.dumps(_row("op")))
    run_until = run._run_until
    monkeypatch.setattr(
        run, "_run_until", lambda command, limit: run_until([sys.executable, "-c", child, *command], limit)
    )
    assert run.main(["--out", str(tmp_path), "--device", "cpu"]) == 130
    (part,) = tmp_path.iterdir()
    kept = json.loads(part.read_text())
    assert part.name.endswith("-part.json")
    assert (kept["done"], kept["rows"], kept["cut"]) == (False, [_row("op")], ["op: b"])


def test_a_suite_at_its_limit_lists_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    lines = record.Record(path)
    lines.add(planned=["a", "b", "c", "d"])
    lines.add(row={"x": 1}, test="a")
    lines.add(not_run="b", reason="no memory", test="b")
    lines.add(failed="c", reason="wrong")
    with path.open("a") as file:
        file.write('{"row": {"x"')
    assert record.read(path) == ([{"x": 1}], {"b": "no memory"}, {"c": "wrong"}, ["d"])
    assert record.read(tmp_path / "none") == ([], {}, {}, [])


def test_a_suite_without_time_is_cut() -> None:
    found = record.Found([], {}, {}, [])
    run.run_suite("op", "cpu", True, 0.0, found)
    assert found == ([], {}, {}, ["op: all tests: stopped after 0 s"])


def test_processes_end_at_their_limit() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert run._run_until(sleep, 0.5) is None
    assert run._run_until([sys.executable, "-c", ""], 30) == 0


def test_errors_that_become_reasons() -> None:
    def fails(error: Exception) -> Any:
        def measure() -> dict[str, Any]:
            raise error

        return measure

    assert timing.try_to(lambda: {"ms": 1}) == {"ms": 1}
    assert timing.try_to(fails(torch.OutOfMemoryError("12 GB\nmore"))) == "out of memory: 12 GB"
    assert timing.try_to(fails(peers.NotRun("no"))) == "no"
    with pytest.raises(KeyError):
        timing.try_to(fails(KeyError("x")))


@pytest.mark.parametrize(
    ("sets", "seconds", "turns"), [(2, 1.0, 2), (2, 1e-4, 20), (3, 1e-7, 102), (160, 1e-5, 160), (4, 6e-4, 4)]
)
def test_rounds_of_graph_replays(sets: int, seconds: float, turns: int) -> None:
    assert timing.whole_turns(sets, seconds) == turns


class FakeEvent:
    """A CUDA event on a fake clock. The clock advances with each call."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, stop: "FakeEvent") -> float:
        return stop.at - self.at


class FakeGraph:
    def replay(self) -> None:
        FakeEvent.now += 6.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Fakes of torch.cuda. A capture raises the error under "capture"."""
    fails: dict[str, Exception] = {}

    @contextmanager
    def graph(_: FakeGraph) -> Iterator[None]:
        yield
        if "capture" in fails:
            raise fails["capture"]

    fakes = dict(Event=FakeEvent, CUDAGraph=FakeGraph, graph=graph, stream=lambda s: nullcontext())
    fakes |= dict(synchronize=lambda: None, current_stream=lambda: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return fails


def test_a_round_is_a_replay(device: dict[str, Exception]) -> None:
    seen: list[int] = []

    def call(i: torch.Tensor) -> None:
        seen.append(int(i))
        FakeEvent.now += 0.5  # milliseconds

    once = timing.graph_timer(call, [(torch.tensor(i),) for i in range(3)])
    # One call to compile and one between events. A round takes at least 2 ms: three calls are the nearest whole turn.
    # They run once before the capture and once in it.
    assert seen == [0, 0, 0, 1, 2, 0, 1, 2]
    assert once() == pytest.approx(2e-3)
    assert len(seen) == 8


def test_a_call_that_is_not_recorded_is_not_run(device: dict[str, Exception]) -> None:
    device["capture"] = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(peers.NotRun, match="CUDA graph: operation not permitted"):
        timing.graph_timer(lambda _: setattr(FakeEvent, "now", FakeEvent.now + 1), [(torch.tensor(0),)])


def test_a_capture_without_memory_is_out_of_memory(device: dict[str, Exception]) -> None:
    device["capture"] = torch.OutOfMemoryError("12 GB")
    with pytest.raises(torch.OutOfMemoryError):
        timing.graph_timer(lambda _: setattr(FakeEvent, "now", FakeEvent.now + 1), [(torch.tensor(0),)])


def test_a_sweep_without_time_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = pytest.importorskip("benchmarks.suites.sweep")
    monkeypatch.setattr(sweep.offline, "in_processes", lambda function, tasks, jobs: [{"registers": 1} for _ in tasks])
    monkeypatch.setattr(sweep, "environment", lambda device: {"commit": "none"})
    monkeypatch.setattr(sweep, "file_stem", lambda device: "gpu")
    options = Namespace(out=tmp_path, limit=-1.0, jobs=1, compile_only=False, head_dim=64, quick=True)
    target = sweep.Target("cuda", 90)
    rows = sweep.sweep(options, target)["rows"]
    assert {row["error"] for row in rows} == {sweep.NO_TIME}
    assert [row["default"] for row in rows].count(True) == 1
    assert all(len(row["config"]) == len(sweep.Candidate._fields) for row in rows)
    options.compile_only = True
    sweep.sweep(options, target)
    whole, part = sorted(tmp_path.iterdir(), key=lambda path: "part" in path.stem)
    assert part.name == "sweep-d64-gpu-quick-part.json"
    assert len(json.loads(whole.read_text())["rows"]) == len(rows)


def test_nvidia_smi_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi() == {"error": "nvidia-smi: FileNotFoundError"}
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '1.2, 345 MHz, 1980 MHz, 3201 MHz, 700 W, Enabled'\n")
    smi.chmod(0o755)
    assert machine.nvidia_smi()["clocks.max.sm"] == "1980 MHz"


def test_exact_rollout_is_the_product_of_whole_matrices() -> None:
    torch.manual_seed(0)
    layers = [exact.Layer(*torch.randn(2, 2, 3, 10, 8), 0.5) for _ in range(3)]
    product = torch.eye(10, dtype=torch.float64).expand(2, -1, -1)
    for q, k, scale in layers:
        weights = (q.double() @ k.double().mT * scale).softmax(-1).mean(1)
        product = (weights + torch.eye(10)) / 2 @ product
    torch.testing.assert_close(exact.rollout(layers), product[:, 0, 1:])


def test_blocks_of_the_exact_product_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, r = torch.randn(2, 3, 11, 8), torch.randn(2, 3, 7, 8), torch.rand(2, 11)
    whole = exact.vecmat(r, q, k)
    monkeypatch.setattr(exact, "BLOCK", 2 * 3 * 7 * 4)
    torch.testing.assert_close(exact.vecmat(r, q, k), whole)


@pytest.mark.parametrize("name", ["forward", "word_maps", "gradcam"])
def test_words_run_on_a_tiny_model(name):
    from benchmarks.suites import words

    run = words.Run(2, 32)
    row = words.timed(name, run, None, quick=True) | words.peak(name, run, None, quick=True)
    assert row["contestant"] == name
    assert row["median_ms"] > 0
    assert row["peak_mb"] >= 0
    assert row["error"] is None
    if name != "forward":
        found = getattr(words.Case(run, None, quick=True), name)()
        assert [maps.shape for maps in found] == [(13, 2, 2), (9, 2, 2)]


def test_a_checkout_without_the_original_is_an_error(tmp_path):
    from benchmarks.peers.original import load_original

    with pytest.raises(FileNotFoundError, match=r"expected one of salesforce/ALBEF"):
        load_original(tmp_path)


@pytest.mark.long
def test_python_s_share_is_measured_and_reported(tmp_path):
    """One launch for short rows, two for long ones."""
    from benchmarks.report.host import host_section
    from benchmarks.suites import host

    assert host.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    launches = {(row["call"], row["tokens"]): row["launches"] for row in content["launches"]}
    assert launches == {
        ("map from log-sum-exps", 197): 1,
        ("output and map", 197): 1,
        ("map from log-sum-exps", 577): 1,
        ("output and map", 577): 2,
    }
    assert all(0 < row["planned_us"] < row["not_planned_us"] for row in content["launches"])
    assert [row["contestant"] for row in content["models"]] == ["forward", "capture + rollout", "Extractor"]
    lines = list(host_section(path.name, content))
    assert lines[0].startswith("## Python's share: ")
    assert sum(line.startswith(("| map", "| output")) for line in "\n".join(lines).splitlines()) == 4
