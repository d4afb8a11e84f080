"""Malicious sources: each gives a one-line error or an error row, quickly and with little memory."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attnx.jobs import masks
from attnx.jobs.columns import MapRow
from attnx.jobs.masks import read_labels
from attnx.jobs.sources import Entry, open_source
from attnx.jobs.sources.tar import Members
from attnx.limits import CAPTION_BYTES, HEADER_BYTES, LINE_BYTES, PICTURE_BYTES

PICTURE = io.BytesIO()
Image.new("RGB", (8, 6)).save(PICTURE, "PNG")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = max(size, 0), kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = b"\xff" + (size & (2**88 - 1)).to_bytes(11, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    made = b""
    for name, value in records:
        rest = f" {name}={value}\n".encode()
        length = len(rest) + len(str(len(rest) + 1))
        length = len(rest) + len(str(length))
        made += str(length).encode() + rest
    return member("pax", made, kind)


def entries(path: Path, content: bytes) -> list[Entry]:
    path.write_bytes(content)
    return list(open_source(path).entries())


GOOD = member("good.png", PICTURE.getvalue())
LOOP = [pax(("size", size)) + member("x.png", b"?") for size in ("-512", "-1024", "9e99", "1" * 30, "9" * 10_000, "x")]
BROKEN = [
    *LOOP,
    header("x.png", -512) + bytes(2048),
    header("x.png", -1024) + bytes(2048),
    pax(("GNU.sparse.size", "-512"), ("GNU.sparse.map", "0,1")) + member("x.png", b"?"),
    pax(("GNU.sparse.map", "0,x")) + member("x.png", b"?"),
    pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")) + member("x.png", b"?" * 512),
    # CPython's parser takes gigabytes for records that declare a length of two bytes, and hours for records of digits.
    member("pax", b"2 " * 200_000 + b"=\n", tarfile.XHDTYPE) + member("x.png", b"?"),
    pax(("comment", "1" * 500_000)) + member("x.png", b"?"),
    pax(("a", "b")) * 1000 + member("x.png", b"?"),
    member("x", b"long.png\0", tarfile.GNUTYPE_LONGNAME) * 3000 + member("x.png", b"?"),
    header("x.png", 2**62) + bytes(1024),
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_header_is_a_row_and_other_tars_go_on(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD + content + bytes(1024))
    (tmp_path / "b.tar").write_bytes(GOOD + bytes(1024))
    os.mkfifo(tmp_path / "c.tar")
    first, *broken, last = open_source(tmp_path).entries()
    assert (first.key, first.error, last.key, last.error) == ("a.tar/good", None, "b.tar/good", None)
    assert broken
    for row in broken:
        assert "the tar ends early" in (row.error or "")
        assert len((row.error or "").replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_40_gb_is_not_read(tmp_path: Path, kind: bytes) -> None:
    tar, size = tmp_path / "a.tar", 40 * 2**30
    tar.write_bytes(GOOD + header("x", size, kind))
    os.truncate(tar, len(GOOD) + 1024 + size)
    good, broken = open_source(tar).entries()
    assert (good.key, f"headers of at most {HEADER_BYTES:,} bytes" in (broken.error or "")) == ("a.tar/good", True)


def test_sparse_headers_that_do_not_end(tmp_path: Path) -> None:
    block = bytearray(header("x.png", 512, tarfile.GNUTYPE_SPARSE))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    _, broken = entries(tmp_path / "a.tar", GOOD + bytes(block) + (b"1" * 512) * 4096)
    assert "headers of at most" in (broken.error or "")


@pytest.mark.parametrize("format", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("name", ["x.png", "x.txt"])
def test_a_sparse_member_is_its_samples_error(tmp_path: Path, name: str, format: str) -> None:
    content = b"?" * 600
    sparse = {
        "old": member(name, content, tarfile.GNUTYPE_SPARSE),
        "0.0": pax(("GNU.sparse.size", "900"), ("GNU.sparse.offset", "0"), ("GNU.sparse.numbytes", "600"))
        + member(name, content),
        "0.1": pax(("GNU.sparse.size", "900"), ("GNU.sparse.map", "0,600")) + member(name, content),
        "1.0": pax(
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", name),
            ("GNU.sparse.realsize", "900"),
        )
        + member("GNUSparseFile/x", b"1\n0\n600\n".ljust(512, b"\0") + content),
    }[format]
    rest = member("x.png", PICTURE.getvalue()) if name == "x.txt" else b""
    sample, good = entries(tmp_path / "a.tar", sparse + rest + GOOD + bytes(1024))
    assert (sample.key, good.key, good.error) == ("a.tar/x", "a.tar/good", None)
    assert "got a sparse one" in (sample.error or "")


@pytest.mark.parametrize(("name", "size"), [("x.txt", 300_000_000), ("x.json", 40 * 2**30), ("x.png", 40 * 2**30)])
def test_members_that_are_too_large(tmp_path: Path, name: str, size: int) -> None:
    tar = tmp_path / "a.tar"
    rest = member("x.jpg", PICTURE.getvalue()) if name != "x.png" else b""
    end = 512 + size + -size % 512
    with tar.open("wb") as file:
        file.write(header(name, size))
        file.seek(end)
        file.write(rest + GOOD + bytes(1024))
    sample, good = open_source(tar).entries()
    assert (sample.key, good.key, good.error) == ("a.tar/x", "a.tar/good", None)
    assert f"{size:,}" in (sample.error or "")
    assert "at most" in (sample.error or "")


def test_a_member_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD)
    os.mkfifo(tmp_path / "b.tar")
    for size in (-1, PICTURE_BYTES + 1, 2**62):
        with pytest.raises(ValueError, match="expected a picture of at most"):
            Members(tmp_path)(Entry("a.tar/good", "a.tar", 512, size))
    with pytest.raises(OSError, match="regular file"):
        Members(tmp_path)(Entry("b.tar/good", "b.tar", 512, 10))


def test_global_records_and_odd_names(tmp_path: Path) -> None:
    content = pax(("comment", "x" * 400_000), kind=tarfile.XGLTYPE) * 2 + GOOD
    content += b"".join(pax(("comment", "x" * 400_000), kind=tarfile.XGLTYPE) + member(f"{i}.png", b"?") for i in "123")
    content += pax(("path", "a\0\nb\u202e.png")) + member("y.png", b"?")
    found = entries(tmp_path / "a.tar", content + bytes(1024))
    assert [entry.error for entry in found] == [None] * 5
    for entry in found:
        entry.key.encode()


@pytest.mark.parametrize("name", ["x.tar", "x.csv", "x.jsonl", "x.parquet", "x.png", "x"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="expected a regular file or a folder"):
        open_source(tmp_path / name)
    if name.endswith(("csv", "jsonl", "parquet")):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="which is a folder"):
            open_source(tmp_path / name, kind="table")


def test_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE.getvalue())
    lines = [
        '{"path": "a.png"}',
        "[" * 200_000,
        '{"path": ' + "1" * 10_000 + "}",
        '{"path": "a.png", "key": ' + "[" * 900 + "]" * 900 + "}",
        '{"path": "a.png", "caption": "' + "x" * (CAPTION_BYTES + 1) + '"}',
        '{"path": "' + "x" * (2 * LINE_BYTES + 7) + '"}',
        '{"path": NaN}',
        '{"path": "a.png", "path": "b.png"}',
        '{"path": "a.png", "key": "last"}',
    ]
    found = entries(tmp_path / "x.jsonl", "\n".join(lines).encode())
    errors = [entry.error or "" for entry in found]
    assert ["nested too deep" in errors[1], "10000 digits" in errors[2]] == [True, True]
    assert f"at most {CAPTION_BYTES:,} bytes; got {CAPTION_BYTES + 1:,}" in errors[4]
    assert "line 6: expected at most" in errors[5]
    assert "line 7: expected a path" in errors[6]
    assert "line 8: " in errors[7]
    assert "path comes twice" in errors[7]
    assert (errors[0], found[-1].key, errors[-1]) == ("", "last", "")
    assert max(map(len, errors)) < 300


def test_fields_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE.getvalue())
    table = tmp_path / "x.csv"
    long = "path,key\na.png,1\n" + "x" * 200_000 + ",2\n" + "y," * LINE_BYTES + "\na.png,4\n"
    found = entries(table, long.encode())
    assert [entry.key for entry in found] == ["1", "line 3", "line 4", "4"]
    assert ["field limit" in (entry.error or "") for entry in found] == [False, True, True, False]
    quote = 'path,key\na.png,1\n"' + "x\n" * 100_000 + "\na.png,4\n"
    found = entries(table, quote.encode())
    assert any("field limit" in (entry.error or "") for entry in found)
    assert found[-1] == Entry("4", "a.png")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"path,path\na.png,b.png\n", "has path 2 times"),
        (b"x" * 200_000 + b",path\na.png,b.png\n", "field limit"),
        ("path\na.png\n".encode("utf-16"), "UTF-8"),
        (b"path\na.png\n\xe9.png\n", "UTF-8"),
        (b"", "expected a column"),
        (b"\n".join([b"path", b'"a.png']), "unexpected end of data"),
    ],
)
def test_tables_that_are_refused_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE.getvalue())
    with pytest.raises(ValueError, match=told) as caught:
        entries(tmp_path / "x.csv", content)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300
    assert [entry.key for entry in entries(tmp_path / "y.csv", b"path\ra.png\r")] == ["a.png"]


def parquet_bytes(table: pa.Table, **more: bool) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content, **more)
    return content.getvalue()


@pytest.mark.parametrize(
    "path",
    [
        pa.array([1]),
        pa.array([["a.png"]]),
        pa.array([b"a.png"]),
        pa.array([{"a": "a.png"}]),
        pa.array([1], pa.timestamp("ns")),
        pa.array([None]),
        pa.array([None], pa.string()),
    ],
    ids=lambda array: str(array.type),
)
def test_columns_of_other_types(tmp_path: Path, path: pa.Array) -> None:
    with pytest.raises(ValueError, match=r"^source: expected"):
        entries(tmp_path / "x.parquet", parquet_bytes(pa.table({"path": path})))


def test_parquet_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE.getvalue())
    table = pa.table({"path": ["a.png"] * 3, "caption": ["x", None, "x" * (CAPTION_BYTES + 1)]})
    good = parquet_bytes(table, write_page_checksum=True)
    found = entries(tmp_path / "x.parquet", good)
    assert [entry.error is None for entry in found] == [True, True, False]
    twice = pa.Table.from_arrays([pa.array(["a.png"])] * 2, names=["path", "path"])
    for bad in (good[:-9], good[:-20] + good[-8:], b"PAR1" + bytes(100) + b"PAR1", b"", parquet_bytes(twice)):
        with pytest.raises(ValueError, match=r"^source: expected"):
            entries(tmp_path / "x.parquet", bad)
    plain = parquet_bytes(table, write_page_checksum=True, use_dictionary=False, compression="none")
    place = plain.index(b"a.png\5\0\0\0a.png")
    with pytest.raises(ValueError, match=r"expected a Parquet file; .*(CRC|crc|checksum)"):
        entries(tmp_path / "x.parquet", plain[:place] + b"b" + plain[place + 1 :])
    for place in range(len(good) - 400, len(good), 3):
        try:
            entries(tmp_path / "x.parquet", good[:place] + bytes([good[place] ^ 0x7F]) + good[place + 1 :])
        except (ValueError, FileNotFoundError) as error:
            assert str(error).startswith("source: ")  # noqa: PT017


def test_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = MapRow("a", width=8, height=6)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="can't be read as an image"):
        read_labels(tmp_path / "pipe.png", row)
    Image.new("L", (8, 6)).save(tmp_path / "good.png")
    assert read_labels(tmp_path / "good.png", row).shape == (6, 8)
    Image.new("L", (9, 6)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="another size"):
        read_labels(tmp_path / "other.png", row)
    monkeypatch.setattr(masks, "PICTURE_PIXELS", 40)
    with pytest.raises(ValueError, match="more than 40 pixels"):
        read_labels(tmp_path / "good.png", row)


def test_captions_of_json_in_a_tar(tmp_path: Path) -> None:
    deep = member("good.json", b"[" * 200_000)
    number = member("x.json", json.dumps({"caption": "a"}).encode()[:-1] + b', "n": ' + b"1" * 9999 + b"}")
    found = entries(tmp_path / "a.tar", GOOD + deep + member("x.png", b"?") + number + bytes(1024))
    assert [(entry.text, entry.error) for entry in found] == [(None, None), (None, None)]


@pytest.mark.parametrize(("name", "content"), [("good.txt", b"caf\xe9"), ("good.json", b'{"caption": "caf\xe9"}')])
def test_a_caption_of_a_tar_that_is_no_utf_8_is_its_samples_error(tmp_path: Path, name: str, content: bytes) -> None:
    [found] = entries(tmp_path / "a.tar", GOOD + member(name, content) + bytes(1024))
    assert (found.text, found.path) == (None, None)
    assert "expected valid Unicode as caption; got 'caf\\udce9'" in (found.error or "")
