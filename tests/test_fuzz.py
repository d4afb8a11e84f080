"""Every command line gives a result or a one-line error message."""

import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_job import draw, made_job
from typer.testing import CliRunner

from attnx.cli.main import app

SECONDS = 30  # for one command
HOSTILE = [
    "", " ", "-1", "0", "1", "2", "0.5", "-0", "nan", "inf", "-inf", "1e999", "1" * 30, "1" * 5000, "x" * 5000, "0x10",
    "\x00", "a\x00b", "\n", "\x1b[2J", "🙂" * 100, "\udcff", "\ud800", "ключ", "..", "./", "--", "=", "%", "{}",
    "[bold]", "/dev/null", "/dev/zero", "/dev/full", "/missing/x", "pipe", "deep/pipe/x", "pictures", "text",
    "pictures/000.jpg",
    "job", "job/run.json", "job/part-00000.parquet", "pairs.jsonl", "empty", "link", "*", "1%", "1x1", "None",
]  # fmt: skip
OUT = [
    "new",
    "new/deep",
    "job",
    "pipe",
    "text",
    "text/x",
    "empty",
    "link",
    "/dev/null",
    "/proc/x",
    "",
    "\x00",
    "x" * 300,
]
MODELS = [
    "demo", "", "x", "timm:", "timm:nope", "hf:", "hf:/missing", "hf:pictures", "hf:pipe", "\x00", "demo:", "🙂",
    "torchvision:", "torchvision:nope", "open_clip:", "open_clip:x/y", "open_clip:ViT-B-32", "torchhub:", "torchhub:x",
    "torchhub:pictures:x", "torchhub:pipe:x", "torchhub::", "albef:demo", "albef:", "albef:gone.pth", "lavt:",
    "albef:pictures", "lavt:pipe",
]  # fmt: skip
NUMBERS = ["1", "2", "16", "0", "-1", "nan", "1e999", "1" * 30, "0.5", "x", ""]
COMMON: dict[str, list[str] | None] = {
    "--out": OUT, "--checkpoint": HOSTILE, "--image-size": ["64", "16x32", "0", "1x", "-1", "nan", "", "x", "1e9"],
    "--seed": NUMBERS, "--no-pretrained": None, "--pretrained": None, "--heads": ["mean", "max", "each", "x", ""],
    "--layer": ["-1", "0", "99", "*", "", "x", "1" * 30], "--device": ["cpu", "", "x", "cuda:99", "cpu,x", "all"],
    "--preset": ["vit-explain", "vl-dino", "x", ""], "--method": ["rollout", "cls", "layers", "attention", "x", ""],
}  # fmt: skip
STYLE: dict[str, list[str] | None] = {
    "--colormap": ["turbo", "x", "", "\x00"], "--alpha": NUMBERS, "--interpolation": ["nearest", "x", ""],
}  # fmt: skip
JOB: dict[str, list[str] | None] = {
    "--batch-size": NUMBERS, "--dtype": ["float32", "float16", "bfloat16", "x", ""], "--kind": ["folder", "table",
    "tar", "dataset", "x", ""], "--map-dtype": ["float16", "float32", "uint8"], "--root": HOSTILE, "--split": HOSTILE,
    "--shard-size": NUMBERS, "--max-pixels": NUMBERS, "--workers": ["-1", "x", "nan", "0", ""], "--tries": NUMBERS,
    "--decode-timeout": NUMBERS, "--engine": ["local", "ranks", "x", ""], "--rank": NUMBERS, "--world": NUMBERS,
    "--address": HOSTILE, "--actors": NUMBERS, "--actor-cpus": NUMBERS, "--actor-gpus": NUMBERS, "--verify": None,
    "--shard-timeout": ["5", "-1", "nan", "1e999", "x"], "--retry-failed": None, "--allow-errors": HOSTILE,
    "--log-every": NUMBERS, "--dry-run": None,
}  # fmt: skip
ROLLING: dict[str, list[str] | None] = {"--residual": NUMBERS, "--discard": NUMBERS, "--start": NUMBERS}
OPTIONS: dict[str, dict[str, list[str] | None]] = {
    "extract": {
        **COMMON, **JOB, **ROLLING, "--store": ["map", "rows", "full", "x", ""], "--keep": ["map", "qk", "auto", "x"],
        "--pixels": ["timm", "whole", "processor", "x", ""], "--compile": None,
    },
    "words": {
        **COMMON, **JOB, **STYLE, "--pairs": ["pairs.jsonl", *HOSTILE], "--vocab": HOSTILE, "--pictures": None,
        "--stage": ["0", "3", "4", "-1", "1" * 30, "x", ""],
    },
    "probe": {
        **COMMON, **JOB, "--stat": ["entropy", "distance", "max", "mass", "x", ""], "--targets": HOSTILE,
        "--patch-size": NUMBERS, "--pixels": ["timm", "whole", "x"],
    },
    "compare": {"--out": OUT},
    "show": {**COMMON, **STYLE, **ROLLING, "--mass": NUMBERS, "--keep": NUMBERS},
    "summary": {
        **STYLE, "--out": OUT, "--masks": HOSTILE, "--examples": ["1", "2", "0", "-1", "x"], "--mass": NUMBERS,
        "--keep": NUMBERS,
    },
    "explore": {
        "--out": ["page.html", "page.txt", *OUT], "--heads": ["mean", "each", "x", ""], "--layers": NUMBERS,
        "--pool": NUMBERS, "--checkpoint": HOSTILE, "--no-pretrained": None, "--image-size": NUMBERS, "--seed": NUMBERS,
    },
    "browse": {
        "--out": OUT, "--images": ["pictures", *HOSTILE], "--limit": NUMBERS, "--thumb": NUMBERS, "--plain": None,
        "--workers": ["0", "1", "-1", "x", "1" * 30],
    },
    "masks": {
        "--out": OUT, "--kind": ["heat", "mass", "x", ""], "--mass": NUMBERS, "--keep": NUMBERS, "--root": HOSTILE,
        "--workers": ["0", "1", "-1", "x", "1" * 30],
    },
    "kernels": {"--arch": HOSTILE, "--head-dim": NUMBERS, "--dtype": HOSTILE, "--jobs": NUMBERS, "--json": None},
    "demo": {"--out": OUT, "--scenes": NUMBERS},
}  # fmt: skip
ARGUMENTS = {
    "extract": ["pictures"], "words": ["pictures/000.jpg", "a red circle"], "show": ["pictures/000.jpg"],
    "probe": ["pictures"], "compare": ["job", "job"], "summary": ["job"], "masks": ["job"], "kernels": [], "demo": [],
    "explore": ["pictures/000.jpg"], "browse": ["job"],
}  # fmt: skip
COMMANDS = [
    *(
        "extract",
        "extract",
        "words",
        "words",
        "probe",
        "compare",
        "show",
        "explore",
        "browse",
        "summary",
        "summary",
        "masks",
        "kernels",
        "demo",
    ),
]
# The first lines of a job, and messages that torch logs when it imports other packages.
NOTICES = re.compile(r"attnx: (no --model|model |caption: |--keep of show)|[WE]\d{4} .*torch/")


class TooLongError(BaseException):
    """A command hangs. Not an Exception, so that no command catches it."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures, a finished job, and files that are not pictures."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (
        "ATTNX_TRACEBACK",
        "RANK",
        "WORLD_SIZE",
        "SLURM_PROCID",
        "SLURM_ARRAY_TASK_ID",
        "_TYPER_COMPLETE_ARGS",
    ):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "here"
    made_job(draw(folder / "pictures", 2), folder / "job", 1)
    (folder / "empty").mkdir()
    (folder / "deep").mkdir()
    (folder / "text").write_text("no picture")
    (folder / "link").symlink_to("link")
    (folder / "pairs.jsonl").write_text('{"image": "pictures/000.jpg", "caption": "a red circle"}\n' * 2)
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "deep" / "pipe")
    monkeypatch.chdir(folder)
    return folder


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooLongError if the block takes more than SECONDS."""

    def stop(number: int, frame: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command_line(rng: random.Random) -> list[str]:
    """A random command line. About half have one or two options, so that each option is tested alone."""
    command = rng.choice(COMMANDS)
    known, more = OPTIONS[command], []
    for _ in range(rng.choice([0, 1, 1, 2, 2, 4, 8])):
        name = rng.choice(list(known))
        values = known[name]
        if rng.random() < 0.05:
            more += [rng.choice(["--unknown", "-x", "--", "=", "--=", f"{name}-", name[:4], rng.choice(HOSTILE)])]
        elif values is None:
            more += [name] if rng.random() < 0.95 else [f"{name}=x"]
        else:
            value = rng.choice(values)
            more += [f"{name}={value}"] if rng.random() < 0.3 else [name, value]
    arguments = list(ARGUMENTS[command])
    if arguments and rng.random() < 0.3:
        arguments[rng.randrange(len(arguments))] = rng.choice(HOSTILE)
    if rng.random() < 0.05:
        arguments = rng.choices(HOSTILE, k=rng.randrange(4))
    if command == "words" and any(each.startswith("--pairs") for each in more) and rng.random() < 0.8:
        arguments = []
    parts = [arguments, more]
    rng.shuffle(parts)
    line = [command, *parts[0], *parts[1]]
    if command in ("kernels", "demo"):
        # These commands take minutes. --help is read before any other option.
        return [command, "--help", *line[1:]]
    last = [] if "--model" in more else ["--model", rng.choice(MODELS) if rng.random() < 0.15 else "demo"]
    last += ["--device", "cpu"] if rng.random() < 0.8 else []
    if command in ("summary", "compare", "masks", "browse"):
        last = ["--examples", "1"] if command == "summary" and rng.random() < 0.5 else []
    if command in ("extract", "words", "probe"):
        last += ["--workers", "0"]
    at = 1 if "--" in line else len(line)
    return [*line[:at], *last, *line[at:]]


def answered(line: list[str]) -> None:
    """Run a command line, and check its exit code and messages."""
    with limited():
        result = CliRunner().invoke(app, line)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.output
    if result.exit_code == 2:
        lines = [each for each in result.stderr.splitlines() if each.strip() and not NOTICES.match(each)]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("attnx: ")
        assert len(lines[0]) <= 300


def fuzz(here: Path, count: int, seed: int) -> None:
    """Run `count` random command lines."""
    for number in range(count):
        line = command_line(random.Random(f"{seed} {number}"))
        try:
            answered(line)
        except BaseException as error:
            error.add_note(f"line {number} of seed {seed}: {[each[:80] for each in line]!r}")
            raise
    assert {path.name for path in here.parent.iterdir()} == {"here"}, "what is written stays in the current folder"


def test_every_command_line_is_answered(here: Path) -> None:
    fuzz(here, 80, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_command_lines_are_answered(here: Path) -> None:
    fuzz(here, 2000, seed=2)
