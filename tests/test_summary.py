"""attnx summary: its numbers against a simple reference, its pictures, and mask scores for each pixel."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_job import draw, made_job
from test_cli import fails, run

import attnx
from attnx.demo.scenes import draw_scene
from attnx.jobs.columns import MapRow
from attnx.jobs.masks import jaccard, mask_of, points_at, score
from attnx.jobs.summary import spatial, summarise

SCENES = 24


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's scenes, two of them truncated, and the boxes of their targets as masks."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "masks").mkdir()
    (folder / "images").mkdir()
    for i in range(SCENES):
        scene = draw_scene(30_000_000 + i)
        path = folder / "images" / f"{i:02d}.png"
        Image.fromarray(scene.image).save(path)
        labels = np.zeros(scene.image.shape[:2], np.uint8)
        x0, y0, x1, y1 = scene.box
        labels[y0:y1, x0:x1] = 1
        labels[:3] = 255
        Image.fromarray(labels).save(folder / "masks" / f"{i:02d}.png")
        if i in (5, 20):
            path.write_bytes(path.read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def out(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_job(scenes / "images", tmp_path_factory.mktemp("out"), 7, heads="each")


def test_the_numbers_are_plain_arithmetic(out: Path) -> None:
    found = summarise(attnx.open(out))
    rows = list(attnx.open(out))
    assert (found.rows, found.planned) == (SCENES, SCENES)
    assert dict(found.errors) == {"OSError": 2}
    good = [i for i, row in enumerate(rows) if row.map is not None]
    assert found.places.tolist() == good
    shares = []
    for place, value in zip(good, found.entropies, strict=True):
        amap = rows[place].map
        assert amap is not None
        share = amap.astype(np.float64).mean(0)
        share /= share.sum()
        shares.append(share)
        assert value == pytest.approx(-sum(p * math.log(p) for p in share.flat if p > 0), rel=1e-4)
    np.testing.assert_allclose(found.mean, np.mean(shares, 0), rtol=1e-4)
    order = np.argsort(found.entropies, kind="stable")
    assert found.focused(4).tolist() == [good[i] for i in order[:4]]
    assert found.focused(4, least=True).tolist() == [good[i] for i in order[::-1][:4]]
    groups = [[good[i] for i in order[np.flatnonzero(found.levels[order] == level)]] for level in range(4)]
    assert [len(group) for group in groups] == [6, 5, 6, 5]
    assert [place for group in groups for place in group] == [good[i] for i in order]
    for level in range(4):
        chosen = found.of_level(level, 3).tolist()
        assert chosen == [groups[level][i] for i in (0, round((len(groups[level]) - 1) / 2), -1)]
    assert found.per_second is None or found.per_second > 0


def test_maps_of_any_method_become_one_over_patches() -> None:
    maps = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def row(amap: np.ndarray | None, **more: object) -> MapRow:
        return MapRow("a", map=amap, width=1, height=1, **more)

    assert np.array_equal(spatial(row(maps[0])), maps[0])
    assert np.array_equal(spatial(row(maps)), maps.mean(0))
    assert np.array_equal(spatial(row(maps.reshape(2, 1, 3, 4))), maps.mean(0))
    assert np.array_equal(spatial(row(maps, word_of=(None, 0))), maps[1])
    assert spatial(row(None)) is None
    assert spatial(row(maps), whole=True) is None


def brute_force(heads: np.ndarray, labels: np.ndarray, crop: tuple, keep: float) -> list[list[float]]:
    """Reference scores with loops over pixels and an explicit version of DINO's mask."""
    left, top, right, bottom = crop
    masks = []
    for head in heads:
        order = sorted(range(head.size), key=lambda i: head.flat[i])
        total, running, chosen = float(head.sum()), 0.0, set()
        for i in order:
            running += float(head.flat[i]) / total
            if running > 1 - keep:
                chosen.add(i)
        masks.append(chosen)
    found = []
    for number in sorted(set(labels.flat) - {0, 255}):
        line = []
        for chosen in masks:
            both = either = 0
            for y in range(labels.shape[0]):
                for x in range(labels.shape[1]):
                    if not (left <= x + 0.5 < right and top <= y + 0.5 < bottom) or labels[y, x] == 255:
                        continue
                    row = int((y + 0.5 - top) / (bottom - top) * heads.shape[1])
                    column = int((x + 0.5 - left) / (right - left) * heads.shape[2])
                    marked, inside = row * heads.shape[2] + column in chosen, labels[y, x] == number
                    both, either = both + (marked and inside), either + (marked or inside)
            line.append(both / either)
        found.append(line)
    return found


@pytest.mark.parametrize("crop", [(0, 0, 30, 20), (5, 0, 25, 20), (3.5, -4, 31.5, 24)])
@pytest.mark.parametrize("keep", [0.6, 0.9])
def test_jaccard_is_counted_pixel_by_pixel(crop: tuple, keep: float) -> None:
    rng = np.random.default_rng(3)
    heads = rng.random((3, 4, 5)).astype(np.float32) ** 3
    labels = np.zeros((20, 30), np.int64)
    labels[3:9, 6:17], labels[8:18, 12:24], labels[0:2] = 1, 7, 255
    found = jaccard(heads, labels, tuple(map(float, crop)), keep)
    np.testing.assert_allclose(found, brute_force(heads, labels, crop, keep), rtol=1e-12)


def test_the_peak_is_in_the_object_or_not() -> None:
    amap = np.zeros((4, 4), np.float32)
    amap[1, 2] = 1
    labels = np.zeros((40, 80), np.int64)
    labels[10:20, 40:60] = 1
    assert points_at(amap, labels, (0, 0, 80, 40))
    assert not points_at(amap.T, labels, (0, 0, 80, 40))
    # In the middle square of the picture.
    assert points_at(amap, np.roll(labels, -2, 1), (20, 0, 60, 40))
    assert not points_at(amap, np.where(labels == 1, 255, labels), (0, 0, 80, 40))
    # A square around the picture's middle, of which it has less.
    amap[:] = 0
    amap[0, 0] = 1
    assert not points_at(amap, labels + 1, (0, -20, 80, 60))
    assert not points_at(np.eye(1, 40, dtype=np.float32), labels + 1, (-0.9, -0.9, 79.1, 39.1))


def test_masks_score_a_trained_model_above_chance(scenes: Path, out: Path) -> None:
    maps = attnx.open(out)
    found = score(maps, scenes / "masks")
    assert (found.images, found.objects, dict(found.left)) == (SCENES - 2, SCENES - 2, {"no map": 2})
    rows = [row for row in maps if row.map is not None]
    best = []
    for row in rows:
        assert row.map is not None
        assert row.crop is not None
        labels = np.asarray(Image.open(scenes / "masks" / row.key)).astype(np.int64)
        best.append(max(brute_force(row.map, labels, row.crop, 0.6)[0]))
    assert found.jaccard == pytest.approx(np.mean(best), rel=1e-12)
    assert found.heads[0][1] == max(value for _, value in found.heads) <= found.jaccard
    assert found.jaccard > 0.2
    assert found.pointing > 0.6


def test_the_command(scenes: Path, out: Path, tmp_path: Path) -> None:
    result = run("summary", out, "--masks", scenes / "masks", "--examples", 3, "--out", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert "24 rows: 22 maps, 2 errors" in result.output
    assert "2 x OSError" in result.output
    assert "22 masks with 22 objects: Jaccard 0." in result.output
    said = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert sum(level["images"] for level in said["levels"]) == 22
    assert said["masks"]["pointing"] > 0.6
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["focus.png", "levels.png", "mean.png", "summary.json"]
    with Image.open(tmp_path / "s" / "levels.png") as sheet:
        assert sheet.width > 3 * 150
        colours = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
        assert (colours.max(1).astype(int) - colours.min(1) > 60).mean() > 0.02  # maps in colour over the scenes
    assert "expected a folder of masks" in fails("summary", out, "--masks", tmp_path / "nothing")
    assert "no image of this job has a usable mask" in fails("summary", out, "--masks", tmp_path)
    assert "expected the output of a job, with part-*.parquet files" in fails("summary", tmp_path)


def test_masks_that_are_none_are_said(scenes: Path, out: Path, tmp_path: Path) -> None:
    for i in range(SCENES):
        Image.new("RGB" if i % 2 else "L", (96, 96) if i % 2 else (10, 10)).save(tmp_path / f"{i:02d}.png")
    told = fails("summary", out, "--masks", tmp_path)
    assert "11 images: the mask has another size than its image" in told
    assert "11 images: expected a palette or grey mask; got mode RGB" in told


@pytest.mark.parametrize("key", ["/", "..", "../a", "/etc/a", "a" * 5000, "a\0b", ".", ""])
def test_keys_that_name_no_file_have_no_mask(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "masks").mkdir()
    assert mask_of(key, tmp_path / "masks") is None
    assert mask_of("a.b.jpg", tmp_path) is None
    assert mask_of("a.jpg", tmp_path) == tmp_path / "a.png"


def test_of_several_layers_the_last_counts(scenes: Path, out: Path, tmp_path: Path) -> None:
    layers = attnx.open(made_job(scenes / "images", tmp_path / "layers", 7, method="layers"))
    fused = attnx.open(made_job(scenes / "images", tmp_path / "cls", 7))
    assert score(layers, scenes / "masks").jaccard == pytest.approx(score(fused, scenes / "masks").jaccard, abs=0.01)
    assert len(score(layers, scenes / "masks").heads) == 1
    (tmp_path / "masks").mkdir()
    for path in (scenes / "masks").iterdir():
        (tmp_path / "masks" / path.name).write_bytes(path.read_bytes()[: 60 if path.name < "12" else None])
    found = score(fused, tmp_path / "masks")
    assert found.left["the mask can't be read as an image"] == 11
    assert found.images == 11


def test_pictures_do_not_need_the_images(out: Path, scenes: Path, tmp_path: Path) -> None:
    """If the images were moved, the maps are drawn alone."""
    for shard in out.glob("part-*.parquet"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    assert run("summary", tmp_path).exit_code == 0
    assert (tmp_path / "summary" / "levels.png").is_file()
    assert "24 rows: 22 maps" in run("summary", tmp_path).output


@pytest.mark.parametrize("store", ["rows", "full"])
def test_stores(tmp_path: Path, store: str) -> None:
    folder = made_job(draw(tmp_path / "pictures", 5, broken=(1,)), tmp_path / "out", 7, store=store)
    result = run("summary", folder)
    assert result.exit_code == 0, result.output
    assert "5 rows: 4 maps, 1 errors" in result.output
    assert ("level 0" in result.output) == (store == "rows")
    if store == "full":
        assert "expected maps of images over patches" in fails("summary", folder, "--masks", tmp_path / "pictures")
