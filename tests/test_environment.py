"""Loss of the source, the output, disk space or locks ends a run and makes no error rows."""

import errno
import fcntl
import io
import os
import tarfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError

import pytest
import torch
from small_job import draw, files, opened, tools
from test_cli import fails
from typer.testing import CliRunner, Result

import attnx
from attnx.cli.main import app
from attnx.jobs import shards as shard_files
from attnx.jobs.engines.queue import RunError
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.progress import Log
from attnx.jobs.run import Report, run_job
from attnx.jobs.runtime import Runtime
from attnx.jobs.sources import Entry, reachable
from attnx.jobs.sources.folder import Files
from attnx.jobs.sources.reachable import Reachable, is_unreachable

HERE = RunOptions(batch_size=4, workers=0)
HOW = ("--method", "cls", "--device", "cpu", "--workers", "0", "--batch-size", "4", "--shard-size", "5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    torch.set_num_threads(1)
    return tools(draw(tmp_path_factory.mktemp("environment") / "pictures", 40))


@pytest.fixture(scope="module")
def whole(made: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed job, in shards of 5."""
    out = tmp_path_factory.mktemp("whole")
    run(made, out)
    return out


def run(made: Runtime, out: Path, **options: Any) -> Report:
    with opened(made, out, 5) as job:
        return run_job(made, job, HERE, **options)


def extract(source: str | Path, out: Path, *more: object) -> Result:
    return CliRunner().invoke(app, ["extract", str(source), "--out", str(out), *HOW, *map(str, more)])


def once(act: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that calls `act` after the first shard."""
    left = [act]

    def progress(done: int, total: int) -> None:
        if done and left:
            left.pop()()

    return progress


def between_shards(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` after the first shard of a command."""
    progress, count = once(act), Log.progress

    def both(self: Log, done: int, total: int) -> None:
        count(self, done, total)
        progress(done, total)

    monkeypatch.setattr(Log, "progress", both)


def test_a_source_that_vanishes_ends_the_run_and_costs_no_row(made: Runtime, whole: Path, tmp_path: Path) -> None:
    source = Path(made.recipe.source)
    gone = source.with_name("gone")
    with pytest.raises(RunError, match=r"source: .*pictures can't be reached: it no longer exists.*run the same"):
        run(made, tmp_path, progress=once(lambda: source.rename(gone)))
    gone.rename(source)
    there = Job(tmp_path).done()
    assert 0 < len(there) < 8
    assert [row.error for row in attnx.open(tmp_path)] == [None] * 5 * len(there)
    assert not list(tmp_path.glob(".attempt*")), "it was no shard's fault"
    report = run(made, tmp_path)
    assert (report.errors, report.made) == (0, 40 - 5 * len(there))
    assert files(tmp_path) == files(whole)


def test_a_command_whose_source_vanishes_ends_with_2(
    made: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(made.recipe.source)
    gone, out = source.with_name("gone"), tmp_path / "out"
    between_shards(monkeypatch, lambda: source.rename(gone))
    result = extract(source, out)
    gone.rename(source)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert "can't be reached: it no longer exists. Nothing of this shard was written; run the same" in lines[-1]
    assert lines[-2].startswith("attnx: stopped at ")
    again = extract(source, out)
    assert again.exit_code == 0, again.output
    assert "maps of 40 images" in again.stdout


def test_pictures_that_can_not_be_read_are_their_rows_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture is deleted and one is not readable. The source itself exists."""
    pictures, out = draw(tmp_path / "pictures", 20), tmp_path / "out"
    made_with = tools(pictures)
    with opened(made_with, out, 5):
        (pictures / "007.jpg").unlink()
        (pictures / "012.jpg").chmod(0)
    if os.geteuid() == 0:
        read = Files.__call__

        def refused(self: Files, entry: Entry) -> tuple[Path, IO[bytes] | None]:
            if entry.key == "012.jpg":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), entry.path)
            return read(self, entry)

        monkeypatch.setattr(Files, "__call__", refused)
    report = run(made_with, out)
    assert (report.rows, report.maps, report.errors, report.set_aside) == (20, 18, 2, {})
    errors = {row.key: row.error for row in attnx.open(out) if row.error}
    assert list(errors) == ["007.jpg", "012.jpg"]
    assert "No such file" in str(errors["007.jpg"])
    assert "Permission denied" in str(errors["012.jpg"])


def test_a_source_in_which_nothing_can_be_read_is_not_reached(tmp_path: Path) -> None:
    """The source is an empty mount point from the first shard on, so no row was ever readable."""
    pictures, out = draw(tmp_path / "pictures", 20), tmp_path / "out"
    made_with = tools(pictures)
    with opened(made_with, out, 5):
        for path in pictures.iterdir():
            path.unlink()
    with pytest.raises(
        RunError, match="several rows were tried and none can be read; the first error: FileNotFoundError"
    ):
        run(made_with, out)
    assert Job(out).done() == set()


def caused(error: Exception, by: Exception, name: str = "__cause__") -> Exception:
    """The error with its cause set, as if it was caught."""
    setattr(error, name, by)
    return error


class HubError(Exception):
    """An error as in libraries that read from a hub: the response has the status code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.response = types.SimpleNamespace(status_code=code)


def http(code: int) -> HTTPError:
    return HTTPError("https://example.org/a.jpg", code, "", None, io.BytesIO())  # type: ignore[arg-type]


GONE = OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in (errno.ENOENT, errno.ESTALE, errno.EIO, errno.EACCES)),
        caused(ValueError("can't be read"), GONE), caused(ValueError("can't be read"), GONE, "__context__"),
        caused(RuntimeError("of a loader"), caused(ValueError("can't be read"), GONE)), http(503), HubError(503),
        caused(ValueError("can't be read"), http(500)),
    ],
)  # fmt: skip
def test_errors_that_may_be_the_sources(error: Exception) -> None:
    assert is_unreachable(error)


@pytest.mark.parametrize(
    "error",
    [
        None, http(404), HubError(404), ValueError("truncated"), OSError("no picture"), MemoryError(),
        caused(ValueError("truncated"), KeyError("a")), OSError(errno.EISDIR, "Is a directory"),
    ],
)  # fmt: skip
def test_errors_that_are_a_rows_own(error: BaseException | None) -> None:
    assert not is_unreachable(error)


def test_errors_that_cause_each_other_come_to_an_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_unreachable(first)


def test_a_source_is_reached_if_what_could_be_read_still_can(tmp_path: Path) -> None:
    pictures = draw(tmp_path / "pictures", 3)
    source = Reachable(pictures, Files(pictures))
    entries = [Entry(f"{i:03d}.jpg", f"{i:03d}.jpg") for i in range(3)]
    assert source.why_not([], entries) is None
    (pictures / "000.jpg").unlink()
    assert source.why_not([], entries) is None, "another row can be read"
    source.add(entries[1])
    (pictures / "001.jpg").unlink()
    told = str(source.why_not([], entries))
    assert "a row that could be read a moment ago can't be read: FileNotFoundError" in told
    source.add(entries[2])
    assert source.why_not([], entries) is None, "the latest of a folder is asked for"


def test_of_several_folders_the_one_that_fails_is_looked_at(tmp_path: Path) -> None:
    """A share may be mounted below the source, and a folder that is done may be removed."""
    for name in ("done", "share"):
        draw(tmp_path / name, 2)
    source = Reachable(tmp_path, Files(tmp_path))
    entries = {name: [Entry(f"{name}/00{i}.jpg", f"{name}/00{i}.jpg") for i in range(3)] for name in ("done", "share")}
    source.add(entries["share"][0])
    source.add(entries["done"][0])
    (tmp_path / "share").rename(tmp_path / "gone")
    assert "share/000.jpg" in str(source.why_not([entries["share"][1]], []))
    (tmp_path / "gone").rename(tmp_path / "share")
    (tmp_path / "done").rename(tmp_path / "gone")
    assert source.why_not([entries["share"][2]], []) is None


def test_another_device_at_the_sources_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = draw(tmp_path / "pictures", 1)
    source = Reachable(pictures, Files(pictures))
    assert source.why_not([], [Entry("a", "000.jpg")]) is None
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", lambda self: types.SimpleNamespace(st_dev=-1))
        assert source.why_not([], [Entry("a", "000.jpg")]) == "another device is mounted there"


def test_a_source_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard mount without its server blocks like this."""
    monkeypatch.setattr(reachable, "_PATIENCE", 0.3)
    end = threading.Event()

    def read(entry: Entry) -> tuple[Path, IO[bytes] | None]:
        end.wait(60)
        return tmp_path, None

    start = time.monotonic()
    source = Reachable(tmp_path, read)
    source.add(Entry("a", "a"))
    assert source.why_not([], []) == "it did not respond within 0.3 s"
    assert time.monotonic() - start < 10
    end.set()


def test_an_output_that_is_removed_ends_the_run_and_is_not_made_anew(
    made: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # The folder is renamed, so that all files vanish at the same time.
    between_shards(monkeypatch, lambda: out.rename(tmp_path / "removed"))
    result = extract(made.recipe.source, out)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert "No such file or directory" in lines[-1]
    assert all(line.startswith("attnx: ") for line in lines)
    assert len(lines[-1]) <= 300
    assert not out.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT])
def test_a_disk_that_takes_no_more_ends_the_run(
    made: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    seal, sealed = shard_files.seal, []

    def full(path: Path) -> None:
        sealed.append(path)
        if len(sealed) > 2:
            raise OSError(code, os.strerror(code), str(path))
        seal(path)

    with monkeypatch.context() as patched:
        patched.setattr(shard_files, "seal", full)
        result = extract(made.recipe.source, tmp_path)
    assert result.exit_code == 2, result.output
    assert os.strerror(code) in result.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "manifest.parquet", "part-00000.parquet", "part-00001.parquet", "run.json"
    ]  # fmt: skip
    assert extract(made.recipe.source, tmp_path).exit_code == 0


def no_locks(file: object, how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_told(
    made: Runtime, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(
        UserWarning, match=r"has no locks \(No locks available\): don't start a second run there while this"
    ):
        run(made, tmp_path)
    assert files(tmp_path) == files(whole)


def test_where_there_are_no_locks_the_run_that_began_first_gives_way(
    made: Runtime, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    said: list[str] = []
    second: list[Report] = []
    with pytest.warns(UserWarning, match="has no locks"):
        with pytest.raises(RunError, match=r"^out: another run writes to .*, whose file system has no locks"):
            run(made, tmp_path, say=said.append, progress=once(lambda: second.append(run(made, tmp_path))))
    assert (second[0].maps, second[0].set_aside) == (40, {})
    assert said == [], "it is no shard's fault, so none is tried again"
    assert files(tmp_path) == files(whole)


def test_a_processor_that_can_not_be_loaded_is_told_before_there_is_a_job(made: Runtime, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    ViTModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    told = fails(
        "extract", made.recipe.source, "--out", tmp_path / "out", "--model", f"hf:{tmp_path / 'model'}", *HOW,
        "--pixels", "processor",
    )  # fmt: skip
    assert "processor" in told
    assert not (tmp_path / "out").exists()


def test_a_tar_that_can_not_be_read_ends_the_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its samples would be missing from the plan permanently."""
    path = tmp_path / "tars" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("x.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"none"))

    def stale(path: Path) -> IO[bytes]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("attnx.jobs.sources.tar.open_regular", stale)
    result = extract(path.parent, tmp_path / "out")
    assert result.exit_code == 2
    assert "Stale file handle" in result.stderr
    assert not (tmp_path / "out").exists()
