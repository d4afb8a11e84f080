"""Every kind of source lists the same images, and an invalid row gives an error for that row only."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attnx.images import ImageError, find_images, read_image
from attnx.jobs import manifest
from attnx.jobs.manifest import Manifest, write_manifest
from attnx.jobs.sources import Entry, Source, open_source
from attnx.jobs.sources.dataset import DataSet


def picture(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a.png, a/b.png and a-b.png, whose red values are 0, 1 and 2."""
    folder = tmp_path / "photos"
    for value, name in enumerate(["a.png", "a/b.png", "a-b.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(value))
    return folder


def reds(source: Source) -> list[int]:
    read = source.reader()
    return [read_image(*read(entry)).getpixel((0, 0))[0] for entry in source.entries() if entry.error is None]


def keys(source: Source) -> list[str]:
    return [entry.key for entry in source.entries()]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_a_sample_of_several_pictures(tmp_path: Path) -> None:
    members = {"a.depth.png": picture(1), "a.png": picture(2), "b.c.png": picture(3)}
    members |= {"d.1.png": picture(4), "d.2.png": picture(5)}
    source = open_source(tar_of(tmp_path / "x.tar", members))
    assert reds(source) == [2, 3]
    assert [entry.error for entry in source.entries()][:2] == [None, None]
    assert "expected one picture in this sample; got d.1.png, d.2.png" in (list(source.entries())[2].error or "")


def test_captions_of_a_data_set_that_are_lists(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "caption": [["a dog", "a cat"], ["a bird"]]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    entries = list(open_source(tmp_path / "data").entries())
    assert entries[0].text is None
    assert "row 0: expected a text as caption; got ['a dog', 'a cat']" in (entries[0].error or "")


def test_a_folder_is_in_the_order_of_its_paths(photos: Path) -> None:
    source = open_source(photos)
    assert (source.kind, keys(source), reds(source)) == ("folder", ["a-b.png", "a.png", "a/b.png"], [2, 0, 1])
    assert keys(source) == sorted(keys(source)) == [p.relative_to(photos).as_posix() for p in find_images(photos)]
    one = open_source(photos / "a.png")
    assert (one.kind, keys(one), reds(one)) == ("folder", ["a.png"], [0])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_a_table(photos: Path, suffix: str) -> None:
    rows = [
        {"key": "007", "path": "a/b.png", "caption": 'a "dog", <b>\nred</b>'},
        {"key": "../é", "path": str(photos / "a.png"), "caption": "x"},
        {"key": "k" * 5000, "path": "../photos/a-b.png", "caption": "x"},
    ]
    table = photos / f"table.{suffix}"
    if suffix == "jsonl":
        table.write_text("\n\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        separator = "," if suffix == "csv" else "\t"
        lines = [
            ["key", "path", "caption"],
            *([f'"{v}"' for v in (r["key"], r["path"], r["caption"].replace('"', '""'))] for r in rows),
        ]
        table.write_text("\n".join(map(separator.join, lines)), encoding="utf-8")
    source = open_source(table)
    entries = list(source.entries())
    assert [(e.key, e.text) for e in entries] == [(row["key"], row["caption"]) for row in rows]
    assert (source.kind, reds(source)) == ("table", [1, 0, 2])


def test_keys_of_a_table_without(photos: Path) -> None:
    table = photos / "t.jsonl"
    table.write_text('{"image": "a.png"}\n{"image": "a.png", "caption": "one"}\n{"image": "a.png", "text": "two"}')
    assert keys(open_source(table)) == ["a.png", "a.png#1", "a.png#2"]
    # A caption that is not there names its row, too.
    table.write_text('{"image": "a.png", "caption": null}\n{"image": "a.png", "caption": "one"}\n{"image": "a.png"}')
    assert keys(open_source(table)) == ["a.png#0", "a.png#1", "a.png"]
    (photos / "t.csv").write_text("path,caption\na.png,\na.png,one\na.png,\n")
    assert keys(open_source(photos / "t.csv")) == ["a.png#0", "a.png#1", "a.png#2"]


def test_a_path_that_is_too_long_for_a_file_is_one_row(photos: Path) -> None:
    table = photos / "t.csv"
    table.write_text("path\n" + "p" * 5000 + "\na.png\n")
    assert keys(open_source(table)) == ["p" * 5000, "a.png"]
    table.write_text("path\n" + "p" * 5000 + "\n")
    with pytest.raises(FileNotFoundError, match="none of the first 1 paths"):
        keys(open_source(table))


def test_rows_that_are_none(photos: Path) -> None:
    table = photos / "t.jsonl"
    table.write_text('{"path": "a.png"}\nno json\n[1]\n{"caption": "x"}\n{"path": "a.png", "key": "k", "caption": 7}')
    good, *bad = open_source(table).entries()
    assert good == Entry("a.png", "a.png")
    told = ["line 2: expected", "line 3: expected", "line 4: expected a path", "line 5: expected a text"]
    for entry, start in zip(bad, told, strict=True):
        assert (entry.error or "").startswith(start)
    (photos / "t.csv").write_text("path,key\na.png,1\na.png,2,3\n,4\n")
    errors = [entry.error for entry in open_source(photos / "t.csv").entries()]
    assert errors[0] is None
    assert "line 3: expected 2 columns" in (errors[1] or "")
    assert "line 4: expected a path" in (errors[2] or "")


def test_tables_that_are_none(photos: Path) -> None:
    table = photos / "t.csv"
    for content, told in [
        (b"url,key\nx,y\n", "expected a column path or image; .*t.csv has url, key"),
        (b"path\ngone.png\nother.png\n", "none of the first 2 paths .*gone.png; set --root"),
        (b"path\n", "expected at least one row"),
        (b"path\n\xff\xfe\n", "in UTF-8"),
    ]:
        table.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            list(open_source(table).entries())
    (photos / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="expected a Parquet file"):
        list(open_source(photos / "t.parquet").entries())
    assert keys(open_source(photos / "t.csv", kind="folder")) == ["t.csv"]


def test_tars(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tar_of(folder / "1.tar", {"x/7.png": picture(5), "x/7.txt": b"a dog", "note.txt": b"no picture"})
    tar_of(folder / "0.tar", {"../7.json": b'{"caption": "a <b>cat</b>"}', "../7.seg.png": picture(9), "8.png": b"?"})
    source = open_source(folder)
    first, second, third = source.entries()
    assert (first.key, first.text) == ("0.tar/../7", "a <b>cat</b>")
    assert (third.key, third.text) == ("1.tar/x/7", "a dog")
    assert second.key == "0.tar/8"
    read = source.reader()
    assert [read_image(*read(e)).getpixel((0, 0))[0] for e in (first, third)] == [9, 5]
    assert keys(open_source(folder / "1.tar")) == ["1.tar/x/7"]


def test_a_tar_that_ends_early(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(4000)
    tar = tar_of(tmp_path / "0.tar", {f"{i}.png": noise for i in range(5)})
    whole = tar.read_bytes()
    for cut, good in [(512 + 4096 + 512 + 100, 1), (2 * (512 + 4096) + 100, 2), (100, 0)]:
        tar.write_bytes(whole[:cut])
        entries = list(open_source(tar).entries())
        assert [entry.error is None for entry in entries[:good]] == [True] * good
        assert any("ends early" in (entry.error or "") for entry in entries[good:]), entries
    tar.write_bytes(b"\x1f\x8b" + whole)
    assert "without compression" in (next(iter(open_source(tar).entries())).error or "")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("stem", ["{}", "./some/{}", "d" * 95 + "/{}", "n" * 120 + "{}", "\u00e9/{}"])
def test_a_tar_that_was_changed_gives_no_picture_of_another_key(tmp_path: Path, stem: str, format: int) -> None:
    def write(order: list[int], longer: bytes = b"") -> None:
        with tarfile.open(tmp_path / "x.tar", "w", format=format) as file:
            for i in order:
                member = tarfile.TarInfo(stem.format(i) + ".png")
                content = picture(i) + longer
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))

    if format == tarfile.USTAR_FORMAT and len(stem) > 100:
        pytest.skip("this format has no such names")
    write([1, 2])
    source = open_source(tmp_path / "x.tar")
    one, two = source.entries()
    read = source.reader()
    assert [read_image(*read(entry)).getpixel((0, 0))[0] for entry in (one, two)] == [1, 2]
    if stem.isascii() and len(stem) < 90:
        write([2, 1])
        with pytest.raises(ValueError, match=r"the tar has changed since the job was planned: expected .*1 of \d+"):
            read(one)
    write([1, 2], b"longer")
    with pytest.raises(ValueError, match=r"the tar has changed since the job was planned: .* bytes; got .* bytes$"):
        read(one)
    with pytest.raises(ValueError, match="got something else"):
        read(one._replace(offset=513))


def test_an_error_is_the_same_in_every_run(tmp_path: Path) -> None:
    """The message has no object address, because rows are compared by their bytes."""
    source = open_source(tar_of(tmp_path / "x.tar", {"a.png": b"no picture"}))
    (entry,) = source.entries()
    with pytest.raises(ImageError, match=r"UnidentifiedImageError: cannot identify image file$"):
        read_image(*source.reader()(entry))


def test_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"id": datasets.Value("string"), "photo": datasets.Image(), "caption": datasets.Value("string")}
    )
    rows = {"id": ["x", "y"], "photo": [{"bytes": picture(3), "path": None}, None], "caption": ["a dog", None]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    first, second = source.entries()
    assert (source.kind, first.key, first.text, second.text) == ("dataset", "x", "a dog", None)
    read = source.reader()
    assert read_image(*read(first)).getpixel((0, 0))[0] == 3
    with pytest.raises(ValueError, match="row 1; got none"):
        read(second)
    data.select([1, 0]).save_to_disk(tmp_path / "other")
    assert isinstance(source, DataSet)
    assert source.fingerprint == DataSet(tmp_path / "set", None).fingerprint
    assert source.fingerprint != DataSet(tmp_path / "other", None).fingerprint
    data.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"expected (a data set with rows|at least one row)"):
        keys(open_source(tmp_path / "empty"))
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "sets")
    assert keys(open_source(tmp_path / "sets", split="train")) == ["x", "y"]
    with pytest.raises(ValueError, match="split: expected one of train; got 'test'"):
        keys(open_source(tmp_path / "sets", split="test"))


def test_sources_that_are_none(photos: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(photos / "gone")
    for name in ("list.txt", "x.json", "x.tar.gz"):
        (photos / name).touch()
        with pytest.raises(ValueError, match=rf"expected an image, a table \(.parquet .*\) or a .tar; got .*{name}"):
            open_source(photos / name)
    with pytest.raises(ValueError, match="expected one of folder, table, tar, dataset; got 'zip'"):
        open_source(photos, kind="zip")
    with pytest.raises(ValueError, match="is read as a folder"):
        open_source(photos, root=photos)
    with pytest.raises(ValueError, match="is read as a folder"):
        open_source(photos, split="train")


def test_a_manifest_is_what_was_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_GROUP", 4)
    entries = [Entry(f"k{i}", f"\udcff{i}.png", i, 2, f"<{i}>", None) for i in range(10)]
    entries.append(Entry("z", None, error="e"))
    assert write_manifest(iter(entries), tmp_path / "m.parquet") == 11
    written = Manifest(tmp_path / "m.parquet")
    assert len(written) == 11
    for start, stop in [(0, 11), (3, 5), (2, 9), (9, 99), (4, 8), (11, 12)]:
        assert written.entries(start, stop) == entries[start:stop]
    assert [key for keys in written.key_groups() for key in keys] == [entry.key for entry in entries]


def test_a_key_that_comes_twice_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_GROUP", 3)
    entries = [Entry(key, "p") for key in ("a", "b", "c", "d", "b", "e", "a", "b")]
    with pytest.raises(ValueError, match="every key once; 'a' is in rows 0, 6; 1 other keys are repeated"):
        write_manifest(entries, tmp_path / "m.parquet")
    # Two keys of one hash are no duplicates.
    monkeypatch.setattr(manifest, "hash", lambda key: 7, raising=False)
    assert write_manifest(entries[:4], tmp_path / "m.parquet") == 4
    with pytest.raises(ValueError, match="at least one image"):
        write_manifest([], tmp_path / "m.parquet")
