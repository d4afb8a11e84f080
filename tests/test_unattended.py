"""Unattended jobs: the log, and one line and an exit code for every failure."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_job import draw, shards
from typer.testing import CliRunner, Result

from attnx.cli.job_options import allowed_errors
from attnx.cli.main import app
from attnx.jobs import memory, runfile, sources
from attnx.jobs.progress import Log

HOW = ("--method", "cls", "--device", "cpu", "--workers", "0", "--batch-size", "4", "--shard-size", "4")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten pictures, the fourth of them truncated."""
    return draw(tmp_path / "photos", 10, broken=(3,))


def extract(source: str | Path, out: str | Path, *more: object) -> Result:
    command = ["extract", str(source), "--out", str(out), *HOW, *map(str, more)]
    return CliRunner().invoke(app, command)


def told(result: Result) -> list[str]:
    """The lines of a run on standard error, without the program's name that each starts with."""
    lines = result.stderr.splitlines()
    assert all(line.startswith("attnx: ") for line in lines), result.stderr
    return [line.removeprefix("attnx: ") for line in lines]


def test_a_log_says_how_far_the_job_is(photos: Path, tmp_path: Path) -> None:
    result = extract(photos, tmp_path / "out", "--log-every", 0.001, "--model", "demo")
    assert result.exit_code == 1, result.output
    lines = [line for line in told(result) if re.match(r"\d+ of 10 images", line)]
    assert lines[0] == "0 of 10 images (0 %), 0.0 images/s"
    assert any(
        re.fullmatch(r"4 of 10 images \(40 %\), [\d.]+ images/s, \d+:\d\d minutes left, 1 errors", line)
        for line in lines
    )


def test_a_log_speaks_while_nothing_is_done() -> None:
    lines: list[str] = []
    with Log("images", 0.01, lines.append) as log:
        time.sleep(0.2)
        log.progress(0, 10)
        time.sleep(0.2)
    assert {lines[0], lines[-1]} == {"listing the source", "0 of 10 images (0 %), 0.0 images/s"}
    count = len(lines)
    time.sleep(0.1)
    assert len(lines) <= count + 1


def test_a_log_is_quiet_between_its_lines(photos: Path, tmp_path: Path) -> None:
    result = extract(photos, tmp_path / "out", "--log-every", 1000, "--model", "demo")
    assert [line for line in told(result) if " of 10 images" in line] == []


def test_the_rate_is_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of earlier runs do not count."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = Log("images", None, print)
    log.progress(5000, 10_000)
    now[0] += 60
    log.errors = 1200
    log.progress(5120, 10_000)
    assert log.line() == "5,120 of 10,000 images (51 %), 2.0 images/s, 40:40 minutes left, 1,200 errors"


def test_the_beginning_and_the_end_say_which_model_and_source(photos: Path, tmp_path: Path) -> None:
    result = extract(photos, tmp_path / "out", "--model", "demo")
    about = f"model demo (its bundled weights), source {photos} (folder)"
    assert told(result)[0] == about
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"maps of 9 images in {tmp_path / 'out'} (")
    assert "1 images have an error: see the error column; --retry-failed tries them again" in last
    assert last.endswith(f"; {about}")
    (photos / "003.jpg").write_bytes((photos / "004.jpg").read_bytes())
    again = extract(photos, tmp_path / "out", "--model", "demo", "--retry-failed")
    assert again.exit_code == 0, again.output
    assert "retry-failed" not in again.output
    assert "first error" not in again.output


def test_the_first_error_is_told_with_its_file(photos: Path, tmp_path: Path) -> None:
    (photos / "008.jpg").write_bytes(b"no picture")
    line = told(extract(photos, tmp_path / "out"))[-1]
    assert line.startswith("the first error is in 003.jpg: ")
    assert str(photos / "003.jpg") in line
    assert "can't be read" in line


def test_a_name_that_moves_the_cursor_is_escaped(photos: Path, tmp_path: Path) -> None:
    (photos / "000\x1b[2J\n.jpg").write_bytes(b"no picture")
    line = told(extract(photos, tmp_path / "out"))[-1]
    assert line.startswith(r"the first error is in 000\x1b[2J\n.jpg: ")


def test_no_model_says_that_it_is_the_demo_model(photos: Path, tmp_path: Path) -> None:
    notice = "no --model: using the demo model, which was trained on drawn scenes and not on photos"
    assert told(extract(photos, tmp_path / "a"))[0] == notice
    assert notice not in told(extract(photos, tmp_path / "b", "--model", "demo"))


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_pictures_that_were_added_since_are_told(photos: Path, tmp_path: Path, kind: str) -> None:
    source, out = photos, tmp_path / "out"
    if kind == "csv":
        source = tmp_path / "list.csv"
        source.write_text("path\n" + "".join(f"photos/{i:03d}.jpg\n" for i in range(10)))
    assert not any("added to the source" in line for line in told(extract(source, out)))
    assert not any("added to the source" in line for line in told(extract(source, out)))
    draw(photos, 12, broken=(3,))
    if kind == "csv":
        with source.open("a") as table:
            table.write("photos/010.jpg\nphotos/011.jpg\n")
    result = extract(source, out)
    (line,) = [line for line in told(result) if "added to the source" in line]
    assert line.startswith("2 rows were added to the source after the job was planned, and are not in it, such as")
    assert "010.jpg" in line
    assert line.endswith("choose another --out to include them")
    assert "maps of 9 images" in result.stdout


def test_so_many_errors_are_allowed(photos: Path, tmp_path: Path) -> None:
    codes = {"0": 1, "1": 0, "9.9%": 1, "10%": 0, "100%": 0, "0%": 1}
    assert {
        allowed: extract(photos, tmp_path / "out", "--allow-errors", allowed).exit_code for allowed in codes
    } == codes


def test_shares_are_exact() -> None:
    assert [allowed_errors(f"{share}%", 100) for share in range(101)] == list(range(101))
    assert allowed_errors("0.1%", 1000) == 1
    assert allowed_errors("0.1%", 999) == 0
    assert allowed_errors("7", 3) == 7


@pytest.mark.parametrize("wrong", ["", "%", "-1", "101%", "1.5", "1e3", "a few", "1 %", "٣", "nan", "inf%"])
def test_other_allowances_are_refused(photos: Path, tmp_path: Path, wrong: str) -> None:
    result = extract(photos, tmp_path / "out", "--allow-errors", wrong)
    assert result.exit_code == 2
    (line,) = told(result)[-1:]
    assert line.startswith("--allow-errors: expected a number of rows, or a share such as 0.1%; got ")
    assert not (tmp_path / "out").exists()


def test_another_batch_size_is_told(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not any("batch-size" in line for line in told(extract(photos, out)))
    assert json.loads((out / "run.json").read_text())["batch_size"] == 4
    assert not any("batch-size" in line for line in told(extract(photos, out)))
    lines = told(extract(photos, out, "--batch-size", 2))
    assert (
        "batch-size: 4 in earlier runs, 2 now: sums may be rounded differently, so maps may differ in their last"
        in (next(line for line in lines if "batch-size" in line))
    )


def test_a_job_keeps_its_own_max_pixels(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, out, "--max-pixels", 50_000)
    (out / "part-00001.parquet").unlink()
    again = extract(photos, out)
    assert "maps of 9 images" in again.stdout
    assert "6 rows from earlier runs" in again.stdout
    assert json.loads((out / "run.json").read_text())["settings"]["max_pixels"] == 50_000
    other = extract(photos, out, "--max-pixels", 60_000)
    assert other.exit_code == 2
    assert "max_pixels: 50000 in the job, 60000 now" in told(other)[-1]


def test_ranks_of_machines_with_other_memory_share_a_job(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, looked = runfile.read_run, [0]

    def late(out: Path) -> dict:
        looked[0] += 1
        # The first rank plans just after the second one has checked for a plan.
        if looked[0] == 2:
            raise FileNotFoundError(out)
        return read(out)

    monkeypatch.setattr(runfile, "read_run", late)
    for rank, most in enumerate((5_000_000, 4_000_000, 9_000_000)):
        monkeypatch.setattr(memory, "default_max_pixels", lambda decoders, most=most: most)
        result = extract(photos, tmp_path / "out", "--engine", "ranks", "--rank", rank, "--world", 3)
        assert result.exit_code == (1 if rank == 0 else 0), result.output
        assert f"rank {rank} of 3: maps of {(3, 4, 2)[rank]} images" in result.stdout
    assert looked == [4], "the second rank looked twice"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["max_pixels"] == 5_000_000


@pytest.mark.parametrize(
    "options",
    [
        ["extract", "", "--out", "out"], ["extract", "PHOTOS", "--out", ""], ["extract", "PHOTOS", "--checkpoint", ""],
        ["extract", "PHOTOS", "--root", ""], ["show", ""], ["summary", ""], ["words", ""],
        ["extract", "PHOTOS", "--no-such-option"], ["extract", "PHOTOS", "--batch-size", "many"], ["extract"],
        ["extract", "PHOTOS", "--batch-size", "0"], ["extract", "PHOTOS", "--tries"], ["no-such-command"],
        ["extract", "PHOTOS", "--workers", "-1"], ["extract", "PHOTOS", "--engine", "x" * 5000], ["x\n" * 5000],
        ["extract", "PHOTOS", "--batch-size", "1\n" * 5000], ["extract", "PHOTOS", "--max-pixels", "0"],
        ["extract", "PHOTOS", "--log-every", "0"], ["extract", "PHOTOS", "--log-every", "nan"],
        ["extract", "PHOTOS", "--image-size", "9\x1b[2J" * 200], ["extract", "PHOTOS", "--kind", "k" * 5000],
        ["extract", "x" * 100 + "/" + "y\n" * 2000], ["extract", "PHOTOS", "--actors", "2"],
        ["extract", "PHOTOS", "--model", "m" * 5000], ["extract", "PHOTOS", "--shard-timeout", "-1"],
        ["extract", "PHOTOS", "--out", "\udcff"], ["extract", "PHOTOS", "--image-size", "1000000"],
        ["extract", "PHOTOS", "--image-size", "9" * 5000], ["extract", "PHOTOS", "--image-size", "\u0663\u0662"],
        ["extract", "PHOTOS", "--device", "hpu"], ["extract", "PHOTOS", "--device", "mkldnn"],
        ["extract", "PHOTOS", "--device", ""], ["extract", "PHOTOS", "--device", "cpu,"],
    ],
    ids=lambda options: " ".join(options).encode("unicode_escape").decode()[:60],
)  # fmt: skip
def test_a_mistake_is_one_line_and_makes_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, [str(photos) if text == "PHOTOS" else text for text in options])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *before, line = told(result)
    assert all(text.startswith(("no --model: ", "model ", "'mkldnn' is no longer used")) for text in before)
    assert len(f"attnx: {line}") <= 300
    assert line.isprintable()
    if "--device" in options:
        assert line.startswith("--device: expected ")
    elif "" in options:
        assert "expected a file or folder; got an empty text" in line
    assert list(here.iterdir()) == []


def test_what_nobody_foresaw_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a\nb")

    monkeypatch.setattr(sources, "open_source", broken)
    monkeypatch.delenv("ATTNX_TRACEBACK", raising=False)
    line = "attnx: extract: AssertionError: a b (ATTNX_TRACEBACK=1 shows where)"
    result = extract(photos, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (2, f"{line}\n")
    monkeypatch.setenv("ATTNX_TRACEBACK", "1")
    result = extract(photos, tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert 'raise AssertionError("a\\nb")' in result.stderr
    assert result.stderr.endswith(f"\n{line}\n")


@pytest.mark.slow
def test_a_scheduler_that_ends_a_job_is_told_how_far_it_is(tmp_path: Path) -> None:
    pictures, out = draw(tmp_path / "pictures", 300), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "attnx",
        "extract",
        str(pictures),
        "--out",
        str(out),
    ]
    with subprocess.Popen(
        [*command, *HOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        while not out.exists() or not shards(out):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    lines = errors.splitlines()
    assert lines[-2] == (
        "attnx: interrupted, ended by SIGTERM; run the same command again to continue with the first missing shard"
    )
    stopped = re.match(r"attnx: stopped at (\d+) of 300 images \(\d+ %\), .*; model demo", lines[-1])
    assert stopped is not None, lines[-1]
    assert 0 <= int(stopped[1]) // 4 <= len(shards(out)) < 75
    assert "Traceback" not in errors
