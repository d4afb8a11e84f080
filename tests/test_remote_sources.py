"""Sources at URLs: `memory://` in this process, and `s3://` on a local server for every process of a job."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import attnx
from attnx.cli.main import app
from attnx.jobs.sources import Entry, open_source
from attnx.jobs.sources.reachable import is_unreachable
from attnx.jobs.sources.tar import Tars
from attnx.remote import RemotePath, location

fsspec = pytest.importorskip("fsspec")
NAMES = ["a.jpg", "sub/b.png", "sub/deeper/c.jpg"]
HOW = ("--model", "demo", "--method", "cls", "--device", "cpu", "--batch-size", "2")


def picture(number: int, form: str = "JPEG") -> bytes:
    values = np.random.default_rng(number).integers(0, 255, (40, 48, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(values).save(content, form)
    return content.getvalue()


def files() -> dict[str, bytes]:
    """Pictures, and files that a listing skips."""
    found = {name: picture(i, "PNG" if name.endswith("png") else "JPEG") for i, name in enumerate(NAMES)}
    return found | {".hidden/x.jpg": b"x", "notes.txt": b"x", "old/run.json": b"{}", "old/manifest.parquet": b"x",
                    "old/y.jpg": b"x", "raw.cr2": b"x"}  # fmt: skip


def fill(root: str, content: dict[str, bytes]) -> None:
    system, path = fsspec.core.url_to_fs(root)
    for name, data in content.items():
        system.pipe_file(f"{path}/{name}", data)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://pictures/photos"
    fsspec.filesystem("memory").store.clear()


def local(folder: Path) -> Path:
    for name, data in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(url: str, **options: str) -> dict[str, bytes]:
    """The bytes of each picture by its key, read with the source's own reader."""
    source = open_source(url, **options)
    reader = source.reader()
    content = {}
    for entry in source.entries():
        assert entry.error is None
        _, file = reader(entry)
        assert file is not None
        content[entry.key] = file.read()
    return content


def test_a_folder_is_listed_as_a_local_one(memory: str, tmp_path: Path) -> None:
    fill(memory, files())
    remote, own = open_source(memory), open_source(local(tmp_path))
    assert [entry.key for entry in remote.entries()] == [entry.key for entry in own.entries()] == NAMES
    assert remote.skipped.lines() == own.skipped.lines() != []
    assert remote.kind == own.kind == "folder"
    assert read(memory) == {name: files()[name] for name in NAMES}


def test_one_picture(memory: str) -> None:
    fill(memory, files())
    assert read(f"{memory}/a.jpg") == {"a.jpg": files()["a.jpg"]}


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in (("1.jpg", picture(1)), ("1.txt", b"a dog"), ("2.jpg", picture(2))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def test_tars(memory: str) -> None:
    fill(memory, {"x.tar": tar(), "y.tar": tar()})
    assert open_source(memory).kind == "tar"
    assert read(memory) == {f"{t}.tar/{n}": picture(n) for t in "xy" for n in (1, 2)}
    assert [entry.text for entry in open_source(f"{memory}/x.tar").entries()] == ["a dog", None]
    entries = list(open_source(memory).entries())
    fill(memory, {"x.tar": tar()[512:]})
    with pytest.raises(ValueError, match="the tar has changed"):
        open_source(memory).reader()(entries[0])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_of_paths(memory: str, suffix: str) -> None:
    fill(memory, files())
    rows = [{"path": name, "caption": f"picture {i}"} for i, name in enumerate([*NAMES[:2], f"{memory}/{NAMES[2]}"])]
    content = io.BytesIO()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), content)
    elif suffix == "csv":
        content.write(b"path,caption\n" + b"".join(f"{r['path']},{r['caption']}\n".encode() for r in rows))
    else:
        content.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    fill(memory, {f"table.{suffix}": content.getvalue()})
    assert list(read(f"{memory}/table.{suffix}").values()) == [files()[name] for name in NAMES]
    fill("memory://elsewhere", {f"t.{suffix}": content.getvalue()})
    assert list(read(f"memory://elsewhere/t.{suffix}", root=memory).values()) == [files()[name] for name in NAMES]


def test_a_table_with_pictures(memory: str) -> None:
    rows = [{"image": {"bytes": picture(i), "path": f"{i}.jpg"}} for i in range(40)]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content, row_group_size=7)
    fill(memory, {"hub.parquet": content.getvalue()})
    source = open_source(f"{memory}/hub.parquet")
    assert list(read(f"{memory}/hub.parquet").values()) == [picture(i) for i in range(40)]
    assert source.fingerprint is not None
    fsspec.filesystem("memory").rm(f"{memory.removeprefix('memory:/')}/hub.parquet")
    with pytest.raises(FileNotFoundError) as gone:
        source.reader()(next(iter([Entry("0.jpg", "hub.parquet", 0)])))
    assert is_unreachable(gone.value)


def test_a_job_in_this_process(memory: str, tmp_path: Path) -> None:
    fill(memory, files())
    done = CliRunner().invoke(app, ["extract", memory, "--out", str(tmp_path / "out"), "--workers", "0", *HOW])
    assert done.exit_code == 0, done.output
    local(tmp_path / "local")
    CliRunner().invoke(
        app, ["extract", str(tmp_path / "local"), "--out", str(tmp_path / "own"), "--workers", "0", *HOW]
    )
    ours, own = attnx.open(tmp_path / "out"), attnx.open(tmp_path / "own")
    assert list(ours.keys()) == list(own.keys()) == NAMES
    assert all(np.array_equal(a.map, b.map) for a, b in zip(ours, own, strict=True))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["source"]["path"] == memory


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/x", "without credentials"),
        ("https://host/x.csv?X-Amz-Signature=secret", "without credentials, a query"),
        ("nothing://x/y", "can't open nothing://"),
        ("file:///tmp", "expected a path for files of this machine"),
        ("local:///tmp", "expected a path for files of this machine"),
        ("zip://a.jpg::https://u:secret@127.0.0.1/x.zip", "another URL in it"),
        ("simplecache::https://u:secret@127.0.0.1/x.zip", "another URL in it"),
        ("abfs://c@account/x?sig=secret", "without credentials"),
        ("ftp://user@127.0.0.1:1/x", "can't open ftp://"),
        ("S3://bucket/x", "lower case"),
        ("memory://none/here", "which does not exist"),
    ],
)
def test_what_is_refused(url: str, message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["extract", url, "--out", str(tmp_path / "out"), "--model", "demo"])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "secret" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"pip install 'attnx\[fsspec\]'"):
        location("s3://bucket/x")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a moto server. The environment has the server's address and credentials."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "attnx-key",
             "AWS_SECRET_ACCESS_KEY": "attnx-secret", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    before = dict(os.environ)
    os.environ.update(names)
    try:
        fsspec.filesystem("s3").mkdir("pictures")
        yield "s3://pictures/photos"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@pytest.mark.long
def test_a_job_whose_decoders_read_from_a_server(bucket: str, tmp_path: Path) -> None:
    fill(bucket, files())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "attnx", "extract", bucket, "--out", str(out), "--workers", "2", *HOW]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    maps = attnx.open(out)
    assert list(maps.keys()) == NAMES
    assert list(maps.errors()) == []
    for path in out.rglob("*"):
        assert not path.is_file() or b"attnx-secret" not in path.read_bytes(), path


@pytest.mark.long
def test_a_picture_that_is_gone_is_an_error_row(bucket: str, tmp_path: Path) -> None:
    table = b"path\n" + b"\n".join(name.encode() for name in (*NAMES, "none.jpg")) + b"\n"
    fill(bucket, {**files(), "list.csv": table})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "attnx", "extract", f"{bucket}/list.csv", "--out", str(out), *HOW]
    done = subprocess.run([*command, "--allow-errors", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = dict(attnx.open(out).errors())
    assert list(errors) == ["none.jpg"]
    assert "FileNotFoundError" in errors["none.jpg"]


class OutageError(Exception):
    """An exception of a client, without an errno."""


class Failing(fsspec.AbstractFileSystem):
    """A file system with one tar, whose server is gone from some byte on."""

    protocol = "failing"
    content, works = b"", 10**9

    def info(self, path: str, **options: object) -> dict[str, object]:
        return {"name": path, "size": len(self.content), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: object) -> io.BytesIO:
        return Broken(self.content, self.works)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        if (end or 0) > self.works:
            raise OutageError("timeout")
        return self.content[start:end]


class Broken(io.BytesIO):
    def __init__(self, content: bytes, works: int) -> None:
        super().__init__(content)
        self.works = works

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() + (size or 0) > self.works:
            raise OutageError("timeout")
        return super().read(size)


@pytest.fixture
def failing() -> RemotePath:
    Failing.content, Failing.works = tar(), 10**9
    return RemotePath(Failing(skip_instance_cache=True), "/x.tar", "failing")


def test_an_outage_is_no_broken_tar_and_no_error_row(failing: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Tars(failing)
    entries = list(source.entries())
    assert [entry.error for entry in entries] == [None, None]
    monkeypatch.setattr(Failing, "works", 1000)
    with pytest.raises(OSError, match="OutageError: timeout") as planning:
        list(source.entries())
    with pytest.raises(OSError, match="OutageError: timeout") as reading:
        source.reader()(entries[1])
    assert is_unreachable(planning.value)
    assert is_unreachable(reading.value)


def test_a_server_without_byte_ranges_is_named(failing: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Tars(failing)
    entry = next(iter(source.entries()))
    monkeypatch.setattr(Failing, "cat_file", lambda self, path, start=None, end=None, **options: self.content)
    with pytest.raises(OSError, match="the server has no byte ranges"):
        source.reader()(entry)


def test_a_key_that_looks_like_a_url_stays_in_its_folder(memory: str) -> None:
    fill(memory, {"https://127.0.0.1:1/q.jpg": picture(1), "a.jpg": picture(2)})
    assert list(read(memory).values()) == [picture(2), picture(1)]


def test_rows_with_credentials_are_errors_that_do_not_repeat_them(memory: str) -> None:
    rows = b"path\na.jpg\nhttps://h/x.jpg?X-Amz-Signature=SECRET\nhttp://u:SECRET@h/x.jpg\n"
    fill(memory, {"a.jpg": picture(0), "t.csv": rows})
    entries = list(open_source(f"{memory}/t.csv").entries())
    assert [entry.error is None for entry in entries] == [True, False, False]
    assert "SECRET" not in str(entries)


def test_words_of_a_remote_table_and_its_summary(memory: str, tmp_path: Path) -> None:
    table = b"path,caption\n" + b"".join(f"{name},a red circle\n".encode() for name in NAMES)
    fill(memory, {**files(), "pairs.csv": table})
    out = tmp_path / "out"
    options = ["--pairs", f"{memory}/pairs.csv", "--model", "demo", "--device", "cpu", "--workers", "0", "--pictures"]
    done = CliRunner().invoke(app, ["words", *options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert [row.tokens for row in attnx.open(out)] == [("[CLS]", "a", "red", "circle", "[SEP]")] * 3
    assert list(out.rglob("*.png"))
    again = CliRunner().invoke(app, ["words", *options, "--out", str(out), "--retry-failed"])
    assert again.exit_code == 0, again.output
    done = CliRunner().invoke(app, ["summary", str(out)])
    assert done.exit_code == 0, done.output
