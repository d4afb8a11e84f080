"""Maps beside their photos: `Maps.to_torch` with images."""

import dataclasses
import doctest
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_job import draw, made_job
from test_cli import run

import attnx
from attnx.images import read_image
from attnx.jobs.photos import Photos, path_of_key
from attnx.jobs.reader import Maps

COUNT = 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("photos"), COUNT, broken=(2,))


@pytest.fixture(scope="module")
def out(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job whose maps cover the middle square of each photo."""
    return made_job(photos, tmp_path_factory.mktemp("out"), 3, pixels="timm")


def cropped(path: Path, crop: torch.Tensor) -> Image.Image:
    return read_image(path).crop(tuple(round(side) for side in crop.tolist()))


def test_a_photo_is_cropped_as_its_map(photos: Path, out: Path) -> None:
    data = attnx.open(out).to_torch(images=True)
    assert len(data) == COUNT - 1
    for item in data:
        row = attnx.open(out)[item["key"]]
        assert (item["width"], item["height"], tuple(item["crop"].tolist())) == (row.width, row.height, row.crop)
        assert item["crop"].dtype == item["image"].dtype == torch.float32
        expected = np.asarray(cropped(photos / item["key"], item["crop"]))
        assert expected.shape[:2] != (row.height, row.width)
        found = (item["image"] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected)
        assert 0 <= item["image"].min() < item["image"].max() <= 1


def test_without_images_nothing_is_read(out: Path) -> None:
    item = attnx.open(out).to_torch()[0]
    assert set(item) == {"key", "map", "text", "crop", "width", "height"}
    assert torch.equal(attnx.open(out).to_torch(images=False)[0]["map"], item["map"])


def test_size_resizes_photo_and_map_alike(photos: Path, out: Path) -> None:
    item, plain = (attnx.open(out).to_torch(True, size)[1] for size in ((24, 32), None))
    picture = cropped(photos / item["key"], item["crop"]).resize((32, 24), Image.Resampling.BILINEAR)
    assert torch.equal(item["image"], torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    expected = F.interpolate(plain["map"][None, None], size=(24, 32), mode="bilinear", align_corners=False)[0, 0]
    assert torch.equal(item["map"], expected)


def test_a_transform_gets_the_resized_picture(out: Path) -> None:
    data = attnx.open(out).to_torch(images=True, size=(20, 30), transform=lambda picture: picture.size)
    assert [item["image"] for item in data] == [(30, 20)] * (COUNT - 1)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_stack_the_same_items(out: Path, context: str) -> None:
    data = attnx.open(out).to_torch(images=True, size=(16, 16))
    assert data[0]["image"].shape == (3, 16, 16)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert [len(batch["key"]) for batch in batches] == [3, 3]
    for i, item in enumerate(data):
        batch = batches[i // 3]
        assert batch["key"][i % 3] == item["key"]
        assert torch.equal(batch["image"][i % 3], item["image"])
        assert torch.equal(batch["map"][i % 3], item["map"])
        assert batch["width"][i % 3] == item["width"]


def test_photos_that_were_moved(tmp_path: Path) -> None:
    folder = draw(tmp_path / "before", 3)
    out = made_job(folder, tmp_path / "out", 2)
    before = attnx.open(out).to_torch(images=True)[2]["image"]
    folder.rename(tmp_path / "after")
    with pytest.raises(ValueError, match=r"images: the source of .*out can't be opened: source: .* does not exist"):
        attnx.open(out).to_torch(images=True)
    data = attnx.open(out).to_torch(images=tmp_path / "after")
    assert torch.equal(data[2]["image"], before)
    (tmp_path / "after" / "001.jpg").unlink()
    with pytest.raises(ValueError, match=r"^001\.jpg: no photo: .*No such file"):
        data[1]
    Image.new("RGB", (9, 9)).save(tmp_path / "after" / "000.jpg")
    with pytest.raises(ValueError, match=r"^000\.jpg: expected a photo of 50 x 40 pixels.*got 9 x 9"):
        data[0]


def test_a_row_without_a_crop(photos: Path, out: Path) -> None:
    maps = attnx.open(out)
    with pytest.raises(ValueError, match=r"^000\.jpg: expected a row with a crop; got none"):
        Photos(maps, photos)(0, dataclasses.replace(maps[0], crop=None))


def test_a_tar_as_source(tmp_path: Path) -> None:
    folder = draw(tmp_path / "photos", 3)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    out = made_job(tmp_path / "photos.tar", tmp_path / "out", 2, kind="tar")
    data = attnx.open(out).to_torch(images=True)
    for item, path in zip(data, sorted(folder.iterdir()), strict=True):
        expected = np.asarray(cropped(path, item["crop"]))
        assert np.array_equal((item["image"] * 255).round().numpy().transpose(1, 2, 0), expected)


def test_a_large_photo_is_read_at_a_smaller_scale(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (403, 301), "red").save(tmp_path / "photos" / "a.jpg")
    out = made_job(tmp_path / "photos", tmp_path / "out", 1, max_pixels=40_000)
    assert attnx.open(out)[0].crop == (0, 0, 403, 301)
    assert attnx.open(out).to_torch(images=True)[0]["image"].shape == (3, 151, 202)


def test_wrong_arguments(out: Path, tmp_path: Path) -> None:
    maps = attnx.open(out)
    with pytest.raises(ValueError, match=r"images: expected a folder of photos; .*nothing is not a folder"):
        maps.to_torch(images=tmp_path / "nothing")
    for size in ((0, 4), (4,), 4, (4.0, 4), (4, 10**6)):
        with pytest.raises(ValueError, match="size: expected"):
            maps.to_torch(size=size)
    with pytest.raises(ValueError, match="transform: only with images"):
        maps.to_torch(transform=str)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.glob("part-*"):
        (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"images: expected a folder of photos, because .* has no run\.json"):
        attnx.open(copy).to_torch(images=True)
    whole = made_job(draw(tmp_path / "one", 1), tmp_path / "whole", 1, store="full")
    with pytest.raises(ValueError, match="size: expected a job of maps over patches"):
        attnx.open(whole).to_torch(size=(4, 4))


@pytest.mark.parametrize("key", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "", ".", "..", "a\0b"])
def test_keys_that_leave_the_folder(key: str, out: Path, tmp_path: Path) -> None:
    assert path_of_key(key) is None
    maps = attnx.open(out)
    row = attnx.jobs.columns.MapRow(key, width=1, height=1, crop=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="expected a key that is a path below"):
        Photos(maps, tmp_path)(0, row)


def test_maps_of_words_beside_their_photos(tmp_path: Path) -> None:
    folder = draw(tmp_path / "photos", 2)
    (tmp_path / "pairs.csv").write_text("path,key,caption\n000.jpg,000.jpg,a red circle\n001.jpg,001.jpg,a star\n")
    result = run("words", "--pairs", tmp_path / "pairs.csv", "--root", folder, "--model", "demo", "--workers", 0,
                 "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    maps = attnx.open(tmp_path / "out")
    for images in (True, folder):
        item = maps.to_torch(images=images, size=(20, 30))[0]
        row = maps["000.jpg"]
        assert item["text"] == "a red circle"
        assert item["map"].shape == (len(row.map), 20, 30)
        assert item["image"].shape == (3, 20, 30)


def test_the_example_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner, said = doctest.DocTestRunner(), []
    for test in doctest.DocTestFinder().find(Maps.to_torch, "to_torch", globs={"attnx": attnx, "torch": torch}):
        runner.run(test, out=said.append)
    assert runner.tries == 5
    assert not said, "".join(said)


def test_photos_can_be_pickled(out: Path) -> None:
    photos = Photos(attnx.open(out))
    first = photos(0)
    assert pickle.loads(pickle.dumps(photos))(0).tobytes() == first.tobytes()
