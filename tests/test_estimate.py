"""The time model of benchmarks.estimate: its arithmetic by hand, its tables against the kernels, and its check."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so nothing can be compiled")

from attnx.kernels.configs import Config, Target
from attnx.kernels.machine_code import parse_sass
from benchmarks import estimate_check as checking
from benchmarks.chips import CHIPS, named, slots
from benchmarks.estimate import Shape, floor, work
from benchmarks.pipes import START, Use, estimate, resident, stages
from benchmarks.problems import Candidate, Problem, build, default

ROOT = Path(__file__).resolve().parents[1]
H200 = CHIPS["h200"]
FOUR = Config(64, 64, 4, 3)


def sass(*lines):
    """Code of these lines; those after "loop" stand in a loop, up to "end"."""
    text, start = [], 0
    for line in lines:
        if line == "loop":
            start = 16 * len(text)
            continue
        line = f"@P0 BRA {start:#x}" if line == "end" else line
        text.append(f"/*{16 * len(text):04x}*/ {line} ;")
    return parse_sass("\n".join([*text, f"/*{16 * len(text):04x}*/ EXIT ;"]))


PRODUCTS = sass("loop", *["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"] * 8, "end")
EXPS = sass("loop", *["MUFU.EX2 R4, R5"] * 100, "end")


def test_a_pipe_is_busy_as_its_rate_says():
    """A warp's exp holds the 16 lanes of special functions for 2 clocks; a Hopper product 64 x 64 x 16, 8 of them."""
    exp, product = EXPS.instructions[0], PRODUCTS.instructions[0]
    assert slots(exp, H200) == {"exp": 2.0, "issue": 0.25}
    assert slots(product, H200)["matrix"] * 4 == pytest.approx(64 * 64 * 16 / (2048 * H200.matrix_share))
    assert slots(product, H200)["shared"] * 4 == pytest.approx((64 + 64) * 32 / 128)


def test_as_many_programs_fit_as_registers_and_shared_memory_allow():
    assert resident(Use(128, 0), FOUR, H200) == 4
    assert resident(Use(129, 0), FOUR, H200) == 3  # registers come by eights
    assert resident(Use(32, 0), FOUR, H200) == 16  # of 64 warps
    assert resident(Use(32, 100 << 10), FOUR, H200) == 2
    assert resident(Use(255, 0), Config(64, 64, 16, 1), H200) == 0
    assert resident(Use(128, 0), FOUR, CHIPS["mi300x"]) == 4  # 4 waves of 512 registers on each of 4 SIMDs
    assert resident(Use(8, 0), FOUR, CHIPS["mi300x"]) == 8


def test_time_is_that_of_the_busiest_pipe():
    """132 SMs, 4 programs of 4 warps each: 100 exps a warp and round are 3200 clocks a round of all."""
    programs = 4 * H200.processors
    found = estimate(EXPS, Use(128, 0), FOUR, H200, programs, (1000,), 0, 1)
    assert found.limit == "exp"
    assert found.seconds - START == pytest.approx(1000 * 16 * 200 / 1.83e9, rel=0.01)
    assert found.busy["exp"] == pytest.approx(1, rel=0.02)


def test_waves_are_whole():
    def seconds(programs):
        return estimate(EXPS, Use(128, 0), FOUR, H200, programs, (1000,), 0, 1).seconds - START

    full = 4 * H200.processors
    assert seconds(2 * full) == pytest.approx(2 * seconds(full))
    assert seconds(full + 1) == pytest.approx(1.25 * seconds(full))  # one more program on one SM
    assert seconds(full - 1) == seconds(full)


def test_a_program_alone_waits():
    """Products and exps of one program follow one another; a load that nothing prefetches is waited for."""
    lines = ["loop", *["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"] * 8, *["MUFU.EX2 R4, R5"] * 100, "end"]
    both = stages(sass(*lines), FOUR, H200, (10,))[1]
    assert both.serial == pytest.approx(both.clocks["matrix"] + both.clocks["exp"])
    waiting = sass(*lines[:-1], "LDG.E.128 R4, [R2]", "end")
    once, ahead = (stages(waiting, FOUR._replace(num_stages=n), H200, (10,))[1].serial for n in (1, 2))
    assert once - ahead == H200.latency
    assert estimate(waiting, Use(255, 0), FOUR, H200, 1, (10,), 0, 1).limit.startswith("serial")


def test_memory_is_a_limit():
    found = estimate(EXPS, Use(128, 0), FOUR, H200, 1, (1,), 43e9, 1)
    assert found.limit == "memory"
    assert found.seconds - START == pytest.approx(0.01)


def test_a_round_that_was_moved_out_of_the_loop_is_not_counted_twice():
    product = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    assert stages(sass("loop", product, "end"), FOUR, H200, (10,))[1].trips == 10
    assert stages(sass(product, "loop", product, "end"), FOUR, H200, (10,))[1].trips == 9
    assert stages(sass(product, "loop", product, "end"), FOUR, H200, (10,), outside=1)[1].trips == 10


def test_other_loops_than_expected_are_an_error():
    with pytest.raises(ValueError, match="has 1 loops that work; 2 are expected"):
        stages(EXPS, FOUR, H200, (10, 1))


def launches(problem, candidate):
    target = Target("cuda", 90)
    built = build(problem, candidate or default(problem, target), target, "meta")
    return built.launch, built.fuse


def test_loops_follow_the_shape():
    """1370 keys are 21 tiles of 64 and an edge; heads are split where programs are few, and then fused."""
    forward, _ = launches(Problem("forward", 1370, 64, 4), Candidate(64, 64, 4, 3))
    assert (work(forward).programs, work(forward).trips) == (22 * 4 * 12, (21, 1))
    whole, _ = launches(Problem("map", 1370, 64, 16), Candidate(64, 64, 4, 3))
    assert (work(whole).programs, work(whole).trips) == (22 * 22 * 16, (12,))
    assert work(whole).fmas == 16 * 12 * 1370 * 1370 * 64
    part, fuse = launches(Problem("map", 197, 64, 1), Candidate(64, 64, 4, 3, splits=6))
    assert (work(part).programs, work(part).trips) == (16 * 6, (2,))
    assert work(fuse).moved == 4 * 197 * 197 * 7
    short, _ = launches(Problem("one_pass", 197, 64, 64), None)
    assert work(short).trips[0] in (12, 13)  # with the lag once more
    vecmat, _ = launches(Problem("vecmat", 1370, 64, 2), Candidate(64, 128, 4, 3))
    assert (work(vecmat).programs, work(vecmat).trips) == (11 * 2 * 12, (22,))


def test_floor_is_that_of_the_design():
    """ViT-B, 1370 tokens, H200: 5.8 G flop an image and layer at 790 TFLOP/s are 7.3 us."""
    assert floor(Shape(1, 12, 1370, 64), H200) == pytest.approx(7.3e-6, rel=0.02)
    assert floor(Shape(1, 12, 197, 64), H200) == pytest.approx((1.21e6 + 0.16e6) / 4.3e12, rel=0.02)


def test_chips_are_found_by_the_name_of_the_hardware():
    assert [named(name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "AMD EPYC")] == ["h200", "a100", None]


def synthetic(path, device="cuda"):
    """A result file that no GPU has written: SYNTHETIC, made up for this test."""
    sizes = [Shape(4, 12, 100 * n, 64) for n in range(1, 6)]
    rows = [
        {"suite": "op", "shape": str(s), "dtype": "bf16", "contestant": name, "median_ms": 1e3 * _guess(s) * off}
        for s in sizes
        for name, off in (("attnx", 2.0), ("sdpa", 1.0), ("hf_eager", 9.0))
    ]
    rows += [{"kernel": "map", "N": 1370, "D": 64, "config": [64, 64, 4, n], "ms": n} for n in (1, 2, 3)]
    rows += [{"kernel": "map", "N": 1370, "D": 64, "config": [64, 64, 8, 1], "error": "it spills"}]
    path.write_text(json.dumps({"SYNTHETIC": True, "hardware": "NVIDIA H200", "device": device, "rows": rows}))
    return json.loads(path.read_text())


def _guess(shape):
    return 1e-9 * shape.N


def test_check_states_the_error(tmp_path):
    measured = checking.cases(synthetic(tmp_path / "synthetic.json"))
    assert len(measured) == 5 + 5 + 3

    def predicted(case):
        if case.key is None:
            return _guess(case.shape)
        stages = case.key[1].num_stages
        if stages == 3:
            raise ValueError("it doesn't compile")
        return 4e-3 / stages

    lines = list(checking.compare(measured, predicted))
    assert "attnx" in lines[0]
    assert "median 0.50, worst factor 2.00, rank correlation 1.00" in lines[0]
    assert "median 1.00, worst factor 1.00, rank correlation 1.00" in lines[1]
    assert "map B=4 N=1370 D=64" in lines[2]
    assert "worst factor 4.00" in lines[2]
    assert lines[3] == "  1 measurements have no estimate"


def test_check_says_that_nothing_is_checked(tmp_path):
    synthetic(tmp_path / "synthetic.json", device="cpu")
    assert list(checking.check_files([tmp_path / "synthetic.json"], 1)) == [checking.NOTHING]


def test_rank_correlation():
    assert checking.rank_correlation([1, 2, 3], [10, 20, 90]) == 1
    assert checking.rank_correlation([1, 2, 3], [9, 2, 1]) == -1
    assert checking.rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert checking.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def run(*flags):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.estimate", "--jobs=2", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_command_ranks_what_the_sweep_would_time(tmp_path):
    done = run("--kernel=one_pass", "--shape=1,12,197,64", "--json", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (rows,) = result["ranking"]
    assert sum(row["default"] for row in rows) == 1
    times = [row["us"] for row in rows if "us" in row and row["spills"] <= 64]
    assert times
    assert times == sorted(times)
    assert all(row["limit"] and math.isfinite(row["us"]) and row["waste"] >= 1 for row in rows if "us" in row)
    (whole,) = result["whole"]
    assert whole["ratio"] > 1
    assert whole["us"] > whole["floor_us"]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("estimate-h200-triton")
    assert json.loads(path.read_text())["estimated"] is True


@pytest.mark.parametrize(
    ("flag", "word"),
    [("--shape=1,2,3", "B,H,N,D"), ("--shape=1,6,197,64", "expected 12 heads"), ("--chip=tpu", "invalid choice")],
)
def test_command_says_what_it_expects(flag, word):
    done = run(flag)
    assert done.returncode == 2
    assert word in done.stderr
