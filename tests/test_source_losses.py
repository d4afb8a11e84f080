"""No picture of a source is skipped silently: it is processed, refused or reported."""

import io
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from attnx.cli.main import app
from attnx.images import find_images, read_image
from attnx.images.formats import installed_formats
from attnx.jobs.manifest import write_manifest
from attnx.jobs.sources import Source, open_source
from attnx.jobs.sources.table import Table

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(content, "PNG")
    return content.getvalue()


def reds(source: Source) -> list[int]:
    read = source.reader()
    return [read_image(*read(entry)).getpixel((0, 0))[0] for entry in source.entries() if entry.error is None]


def keys(source: Source) -> list[str]:
    return [entry.key for entry in source.entries()]


def extract(*arguments: object) -> Any:
    how = ("--method", "cls", "--workers", "0", "--device", "cpu")
    return CliRunner().invoke(app, ["extract", *map(str, arguments), *how])


def tar_of(path: Path, *members: tuple[str, int]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, value in members:
            member, content = tarfile.TarInfo(name), picture(value)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def hub(table: Path, rows: list[Any], kind: pa.DataType = STRUCT, name: str = "image", **more: Any) -> Path:
    pq.write_table(pa.table({name: pa.array(rows, kind), **more}), table, row_group_size=20)
    return table


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """A folder with one readable picture and other files that can't be read."""
    folder = tmp_path / "phone"
    (folder / "x").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(1))
    for name in ("b.heic", "x/C.HEIC", "raw.DNG", "notes.txt", "list.csv", ".hidden.heic", "doc.pdf"):
        (folder / name).write_bytes(b"?")
    return folder


def test_what_looks_like_an_image_is_said_once(phone: Path, tmp_path: Path) -> None:
    told = "skipped 3 files in formats that attnx can't read: .heic 2, .dng 1, such as b.heic; convert them, or install"
    dry = extract(phone, "--out", tmp_path / "dry", "--dry-run")
    assert (dry.exit_code, dry.stderr.count(told)) == (0, 1)
    first = extract(phone, "--out", tmp_path / "out")
    assert (first.exit_code, first.stderr.count(f"attnx: {told}")) == (0, 1), first.output
    again = extract(phone, "--out", tmp_path / "out")
    assert (again.exit_code, "skipped" in again.stderr) == (0, False)
    (phone / "a.png").unlink()
    none = extract(phone, "--out", tmp_path / "none")
    assert (none.exit_code, "without any but 3 that can't be read" in none.stderr) == (2, True)


@pytest.mark.parametrize("suffix", [".heif", ".CR2", ".nef", ".arw", ".orf", ".raf", ".rw2", ".psd", ".svg", ".jxl"])
def test_suffixes_that_are_said(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / f"b{suffix}").touch()
    source = open_source(tmp_path)
    assert keys(source) == ["a.png"]
    (line,) = source.skipped.lines()
    assert f"{suffix.lower()} 1, such as b{suffix}; convert" in line


def test_heic_is_read_where_pillow_heif_is_installed(phone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_heif")

    def register() -> None:
        from PIL.PngImagePlugin import PngImageFile

        Image.register_open("HEIF", PngImageFile)

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    installed_formats.cache_clear()
    try:
        names = [path.relative_to(phone).as_posix() for path in find_images(phone)]
        assert names == ["a.png", "b.heic", "x/C.HEIC"]
        source = open_source(phone)
        assert len(keys(source)) == 3
        (line,) = source.skipped.lines()
        assert line.endswith("can't read: .dng 1, such as raw.DNG; convert them")
    finally:
        installed_formats.cache_clear()


def test_a_tar_says_what_it_leaves_out(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", ("a.png", 1), ("a.depth.png", 2), ("b.heic", 3))
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        file.addfile(link)
    (tmp_path / "beside.dng").touch()
    source = open_source(tmp_path)
    assert reds(source) == [1]
    unread, part, linked = source.skipped.lines()
    assert "skipped 2 files in formats that attnx can't read: .dng 1, .heic 1, such as beside.dng" in unread
    assert "skipped 1 additional images of their samples: .png 1, such as x.tar/a.depth.png" in part
    assert "links within a tar: .png 1, such as x.tar/c.png" in linked
    result = extract(tmp_path, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("attnx: skipped")) == (0, 3), result.output


@pytest.mark.parametrize(
    "names", [("0.png", "1.png", "0.png"), ("0.png", "0.png", "1.png"), ("0.png", "0.PNG", "1.png")]
)
def test_a_member_that_comes_twice_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    tar = tar_of(tmp_path / "x.tar", *((name, value) for value, name in enumerate(names)))
    with pytest.raises(ValueError, match=r"expected every key once; 'x.tar/0' is in rows 0, [12]$"):
        write_manifest(open_source(tar).entries(), tmp_path / "m.parquet")
    for more in ([], ["--dry-run"]):
        result = extract(tar, "--out", tmp_path / "out", *more)
        assert (result.exit_code, "x.tar/0" in result.stderr) == (2, True)


def test_members_that_only_look_the_same(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", ("./0.png", 1), ("0.png", 2), ("A.png", 3), ("a.png", 4))
    assert reds(open_source(tar)) == [1, 2, 3, 4]
    assert len(set(keys(open_source(tar)))) == 4
    two = list(
        open_source(tar_of(tmp_path / "y.tar", ("0.png", 1), ("0.jpg", 2), ("1.a.png", 3), ("1.b.png", 4))).entries()
    )
    assert [(entry.error or "").partition("got ")[2] for entry in two] == ["0.png, 0.jpg", "1.a.png, 1.b.png"]


def test_a_table_with_pictures_in_it(tmp_path: Path) -> None:
    rows = [{"bytes": picture(value), "path": f"{value}.png"} for value in range(50)]
    source = open_source(hub(tmp_path / "t.parquet", rows, label=list(range(50))))
    entries = list(source.entries())
    assert [entry.key for entry in entries] == [f"{value}.png" for value in range(50)]
    read = source.reader()
    for row in (0, 1, 19, 20, 49, 3, 2, 45, 45):
        assert read_image(*read(entries[row])).getpixel((0, 0)) == (row, 0, 0)
    result = extract(tmp_path / "t.parquet", "--out", tmp_path / "out")
    assert (result.exit_code, "maps of 50 images" in result.stdout) == (0, True), result.output
    # A different table at the same path does not match the job.
    hub(tmp_path / "t.parquet", rows[::-1], label=list(range(50)))
    other = extract(tmp_path / "t.parquet", "--out", tmp_path / "out")
    assert (other.exit_code, "fingerprint" in other.stderr) == (2, True)


def test_keys_and_captions_of_pictures_in_a_table(tmp_path: Path) -> None:
    rows = [{"bytes": picture(value), "path": "same.png"} for value in range(3)] + [{"bytes": picture(3), "path": None}]
    table = tmp_path / "t.parquet"
    assert keys(open_source(hub(table, rows))) == ["same.png#0", "same.png#1", "same.png#2", "t.parquet/3"]
    entries = list(open_source(hub(table, rows, name="photo", text=["a", None, "c", "d"])).entries())
    assert [entry.text for entry in entries] == ["a", None, "c", "d"]
    assert keys(open_source(hub(table, rows, key=["w", "x", "y", "z"]))) == ["w", "x", "y", "z"]
    lists = list(open_source(hub(table, rows, caption=[["a"], ["b"], None, None])).entries())
    assert "row 0: expected a text as caption; got ['a']" in (lists[0].error or "")


@pytest.mark.parametrize("name", ["image", "bytes", "jpg"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_plain_bytes(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    source = open_source(hub(tmp_path / "t.parquet", [picture(7), None, picture(9)], kind, name))
    first, second, third = source.entries()
    assert [first.key, third.key] == ["t.parquet/0", "t.parquet/2"]
    read = source.reader()
    assert read_image(*read(third)).getpixel((0, 0))[0] == 9
    with pytest.raises(ValueError, match="expected a picture in row 1; got none"):
        read(second)


def test_pictures_outside_of_their_table(tmp_path: Path) -> None:
    for value in (4, 5):
        (tmp_path / f"{value}.png").write_bytes(picture(value))
    rows = [{"bytes": None, "path": "4.png"}, {"bytes": None, "path": "5.png"}]
    assert reds(open_source(hub(tmp_path / "t.parquet", rows))) == [4, 5]
    mixed = hub(tmp_path / "t.parquet", [rows[0], {"bytes": picture(9), "path": "gone.png"}])
    assert reds(open_source(mixed)) == [4, 9]
    with pytest.raises(FileNotFoundError, match="none of the first 1 paths"):
        keys(open_source(hub(tmp_path / "t.parquet", [{"bytes": None, "path": "gone.png"}])))
    # Existing paths are used, whatever other columns the table has.
    both = open_source(hub(tmp_path / "t.parquet", [{"bytes": picture(8), "path": "x"}], path=["4.png"]))
    assert isinstance(both, Table)
    assert (reds(both), both.fingerprint) == ([4], None)
    assert reds(open_source(hub(tmp_path / "t.parquet", [{"bytes": picture(8), "path": "x"}], path=["gone"]))) == [8]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"url": ["x"], "label": [1]}, "has url (string), label (int64); rename"),
        ({"image": [[1, 2]]}, "has image (list<"),
        ({"image": [1]}, "has image (int64)"),
        ({"images": pa.array([[{"bytes": b"x", "path": "y"}]], pa.list_(STRUCT))}, "has images (list<"),
        ({"image": pa.array([None], pa.binary())}, "has image (binary)"),
        (
            {name: pa.array([{"bytes": b"x", "path": "y"}], STRUCT) for name in "ab"},
            "one of them called image; got a, b",
        ),
        ({"path": pa.array([None], pa.string())}, "expected rows with a path"),
    ],
)
def test_a_table_without_pictures_is_one_line(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    result = extract(tmp_path / "t.parquet", "--out", tmp_path / "out")
    assert (result.exit_code, told in result.stderr, len(result.stderr.splitlines())) == (2, True, 1), result.output
