"""The pages of a job: what they show, and that they are made once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from small_job import draw, made_job
from test_cli import fails, run

import attnx
from attnx.jobs.columns import MapRow
from attnx.jobs.packing import Format
from attnx.jobs.photos import Photos
from attnx.jobs.reader import Maps
from attnx.jobs.shards import write_part
from attnx.jobs.summary import summarise
from attnx.page.browse import Browse, write_pages


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """150 pictures in 3 shards; two are truncated."""
    folder = tmp_path_factory.mktemp("job")
    draw(folder / "photos", 150, broken=(3, 70))
    return made_job(folder / "photos", folder / "maps", 60)


@pytest.fixture(scope="module")
def pages(job):
    done = run("browse", job)
    assert done.exit_code == 0, done.output
    assert done.output == f"{job / 'browse' / 'index.html'}  150 rows; 3 chunks made, 0 there before\n"
    return job / "browse" / "index.html"


def shown(opened):
    """The keys of the visible cells, in order."""
    return opened.page.evaluate(
        """[...document.querySelectorAll('.cell')].map(cell => [new DOMMatrix(cell.style.transform), cell])
        .sort((a, b) => a[0].f - b[0].f || a[0].e - b[0].e).map(([, cell]) => cell.querySelector('.key').textContent)"""
    )


def test_the_pages_show_all_rows(job, pages, browser):
    maps = attnx.open(job)
    with browser.open(pages) as opened:
        assert opened.text("#count") == "150 of 150 rows"
        assert shown(opened)[:10] == [f"{i:03d}.jpg" for i in range(10)]
        opened.page.wait_for_selector(".cell img")
        opened.page.evaluate("document.getElementById('scroller').scrollTop = 1e6")
        opened.settle()
        assert shown(opened)[-1] == "149.jpg"
        opened.until("[...document.querySelectorAll('.cell')].every(c => c.querySelector('canvas'))")
        found = summarise(maps)
        assert opened.text("#about").startswith("demo, cls")
        mean = opened.canvas("#mean")[..., :3].astype(int)
    shares = (found.mean - found.mean.min()) / (found.mean.max() - found.mean.min())
    assert np.abs(mean - colormaps["turbo"](shares, bytes=True)[..., :3]).max() <= 11  # a step of the colours


def test_a_picture_has_the_map_of_its_row(job, pages, browser):
    row = attnx.open(job)["020.jpg"]
    with browser.open(pages) as opened:
        opened.page.fill("#query", "020")
        opened.page.locator("#alpha").evaluate("e => { e.value = 100; e.dispatchEvent(new Event('input')); }")
        opened.page.wait_for_selector(".cell img")
        opened.settle()
        shown_map = opened.canvas(".cell canvas")[..., :3].astype(int)
        assert opened.text("#count") == "1 of 150 rows"
    amap = row.map.astype(np.float32)
    shares = (attnx.resize(amap, shown_map.shape[:2]) - amap.min()) / (amap.max() - amap.min())
    off = np.abs(shown_map - colormaps["turbo"](shares.clip(0, 1), bytes=True)[..., :3]).max(-1)
    # A step of the colours changes a channel by at most 11.
    assert np.quantile(off, 0.99) <= 2 * 11


def test_sort_search_and_filters(job, pages, browser):
    maps = attnx.open(job)
    found = summarise(maps)
    keys = list(maps.keys())
    with browser.open(pages) as opened:
        opened.page.select_option("#sort", "entropy")
        opened.settle()
        order = [keys[place] for place in found.focused(len(found.places))]
        assert shown(opened)[:10] == order[:10]
        opened.page.check("#down")
        opened.settle()
        assert shown(opened)[:10] == order[::-1][:10]
        opened.page.select_option("#sort", "peak")
        opened.settle()
        peaks = {place: maps[int(place)].map.max() / maps[int(place)].map.sum() for place in found.places}
        assert shown(opened)[0] == keys[max(peaks, key=peaks.__getitem__)]
        opened.page.uncheck("#down")
        opened.page.select_option("#sort", "row")
        for level in range(4):
            opened.page.select_option("#kind", f"l{level}")
            opened.settle()
            assert opened.text("#count") == f"{(found.levels == level).sum()} of 150 rows"
            assert shown(opened)[0] == keys[found.places[found.levels == level][0]]
        opened.page.select_option("#kind", "e0")
        opened.settle()
        assert shown(opened) == ["003.jpg", "070.jpg"]
        assert "OSError" in opened.text(".cell")
        opened.page.select_option("#kind", "")
        opened.page.locator("#low").evaluate("e => { e.value = 50; e.dispatchEvent(new Event('input')); }")
        middle = (found.entropies.min() + found.entropies.max()) / 2
        assert opened.text("#count") == f"{(found.entropies >= middle).sum()} of 150 rows"
        assert opened.text("#range").startswith(f"{middle:.3g} to ")


def test_an_enlarged_picture(job, pages, browser):
    with browser.open(pages) as opened:
        opened.page.wait_for_selector(".cell img")
        opened.page.locator(".cell").nth(2).click()
        opened.page.wait_for_selector("#large img")
        assert opened.text("#largeKey") == "002.jpg"
        assert "entropy" in opened.text("#largeNumbers")
        opened.press("ArrowRight")
        assert opened.text("#largeKey") == "003.jpg"
        assert "can't be read" in opened.text("#largeNumbers")
        opened.press("ArrowLeft")
        opened.press("ArrowLeft")
        opened.press("Escape")
        assert not opened.page.is_visible("#large")


def test_words_of_captions(browser, tmp_path):
    from attnx.demo.captioned import draw_pair

    (tmp_path / "photos").mkdir()
    pairs = []
    for i in range(3):
        scene = draw_pair(i)
        Image.fromarray(scene.image).save(tmp_path / "photos" / f"{i}.png")
        pairs.append({"image": f"photos/{i}.png", "caption": scene.caption})
    pairs.append({"image": "photos/0.png", "caption": "<img src=x onerror=alert(1)> </script> a star"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    out = tmp_path / "words"
    assert run("words", "--pairs", tmp_path / "pairs.jsonl", "--model", "demo", "--method", "gradcam", "--workers", 0,
               "--out", out).exit_code == 0  # fmt: skip
    assert run("browse", out, "--workers", 0).exit_code == 0
    rows = list(attnx.open(out))
    with browser.open(out / "browse" / "index.html") as opened:
        opened.page.select_option("#sort", "score")
        opened.page.check("#down")
        opened.settle()
        assert shown(opened)[0] == max(rows, key=lambda row: row.score).key
        opened.page.fill("#query", "onerror")
        opened.settle()
        assert opened.text("#count") == "1 of 4 rows"
        opened.page.locator(".cell").click()
        opened.page.wait_for_selector("#large img")
        assert opened.text("#largeText") == pairs[3]["caption"]
        assert opened.page.locator("#largeWords button").all_inner_texts() == list(rows[3].words)
        opened.page.locator("#largeWords button").nth(len(rows[3].words) - 1).click()
        opened.settle()
        assert opened.page.locator("#largeWords [aria-pressed=true]").inner_text() == "star"


def test_screen_readers(pages, browser):
    package = pytest.importorskip("axe_playwright_python", reason="no axe: pip install axe-playwright-python")
    source = Path(package.__file__).with_name("axe.min.js").read_text()
    with browser.open(pages) as opened:
        opened.page.wait_for_selector(".cell img")
        opened.page.evaluate(source)
        found = opened.page.evaluate("axe.run()")
        opened.page.locator(".cell").nth(2).click()
        opened.settle()
        enlarged = opened.page.evaluate("axe.run()")
    for result in (found, enlarged):
        assert [v["id"] for v in result["violations"] if v["impact"] in ("serious", "critical")] == []


def test_a_second_run_keeps_the_chunks(job, pages):
    before = {path.name: path.stat().st_mtime_ns for path in (job / "browse" / "chunks").iterdir()}
    assert "0 chunks made, 3 there before" in run("browse", job).output
    assert before == {path.name: path.stat().st_mtime_ns for path in (job / "browse" / "chunks").iterdir()}


def test_other_settings_and_lost_chunks_are_made_again(job, tmp_path):
    out = tmp_path / "pages"
    assert "2 chunks made, 0 there before" in run("browse", job, "--out", out, "--limit", 70, "--workers", 0).output
    names = sorted(path.name for path in (out / "chunks").iterdir())
    assert names == ["part-00000-000000.js", "part-00001-000000.js"]
    (out / "chunks" / names[1]).unlink()
    assert "1 chunks made, 1 there before" in run("browse", job, "--out", out, "--limit", 70, "--workers", 0).output
    assert "2 chunks made" in run("browse", job, "--out", out, "--limit", 70, "--thumb", 64, "--workers", 0).output
    assert "1 chunks made" in run("browse", job, "--out", out, "--limit", 60, "--plain", "--workers", 0).output
    assert sorted(path.name for path in (out / "chunks").iterdir()) == names[:1]


def test_rows_of_a_running_job_are_added(job, tmp_path):
    out = shutil.copytree(job, tmp_path / "maps", ignore=shutil.ignore_patterns("browse", "part-00000*"))
    assert "90 rows; 2 chunks made, 0 there before" in run("browse", out, "--workers", 0).output
    shutil.copy2(job / "part-00000.parquet", out)
    assert "150 rows; 1 chunks made, 2 there before" in run("browse", out, "--workers", 0).output


def test_a_run_that_is_stopped_leaves_whole_chunks(job, tmp_path):
    browse = Browse(Maps(job), tmp_path, Photos(Maps(job)))
    (tmp_path / "chunks").mkdir()
    chunk = next(browse.chunks())
    assert browse.write_chunk(chunk, lambda: True).made == 0
    assert list((tmp_path / "chunks").iterdir()) == []
    assert browse.write_chunk(chunk).made == 1
    assert write_pages(browse, 0).kept == 1


def test_the_index_opens_before_its_chunks_are_there(job, browser, tmp_path):
    run("browse", job, "--out", tmp_path, "--workers", 0)
    shutil.rmtree(tmp_path / "chunks")
    with browser.open(tmp_path / "index.html") as opened:
        opened.page.wait_for_selector("text=not made yet")
        opened.problems.clear()  # the missing files


def test_photos_that_moved(job, tmp_path):
    moved = tmp_path / "elsewhere"
    copied = shutil.copytree(job, tmp_path / "maps", ignore=shutil.ignore_patterns("browse"))
    photos = job.parent / "photos"
    shutil.copytree(photos, moved)
    hidden = photos.rename(tmp_path / "hidden")
    try:
        done = run("browse", copied, "--workers", 0)
        assert "3 chunks made" in done.output
        assert "maps alone, without photos" in done.output or done.exit_code == 1
        text = (copied / "browse" / "chunks" / "part-00000-000000.js").read_text()
        assert '"maps"' in text
        assert '"photo"' not in text
        done = run("browse", copied, "--images", moved, "--workers", 0)
        assert done.exit_code == 0, done.output
        assert '"photo"' in (copied / "browse" / "chunks" / "part-00000-000000.js").read_text()
        (moved / "005.jpg").unlink()
        done = run("browse", copied, "--images", moved, "--thumb", 100, "--workers", 0)
        assert done.exit_code == 1
        assert "005.jpg" in done.output
        assert "1 photos could not be read" in done.output
        shutil.copy(hidden / "005.jpg", moved)
        done = run("browse", copied, "--images", moved, "--thumb", 100, "--workers", 0)
        assert "1 chunks made, 2 there before" in done.output
    finally:
        hidden.rename(photos)


def big_job(folder, rows):
    """Ten shards of rows with random maps."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    each = rows // 10
    for shard in range(10):
        maps = rng.random((each, 14, 14), np.float32) ** 8
        made = [
            MapRow(f"folder/{i:06d}.jpg", f"a caption of the picture {i}", amap, 640, 480, (0.0, 0.0, 640.0, 480.0))
            for i, amap in enumerate(maps, shard * each)
        ]
        write_part(Format().table(made), folder / f"part-{shard:05d}.parquet", {"model": "demo"})
    return folder


# The 90th percentile of the time between frames, near and far from what was shown before.
SCROLLING = """async () => {
    const scroller = document.getElementById('scroller'), times = [];
    scroller.scrollTop = 0;
    for (let i = 0, last = performance.now(); i < 90; i++) {
        scroller.scrollTop += i < 45 ? 400 : 30000;
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
    }
    return times.sort((a, b) => a - b)[80]; }"""


@pytest.mark.long
def test_a_hundred_thousand_rows(browser, tmp_path):
    folder = big_job(tmp_path / "maps", 100_000)
    done = run("browse", folder, "--plain")
    assert done.exit_code == 0, done.output
    assert "100,000 rows" in done.output
    # Other work on the machine may disturb one try. In milliseconds.
    times = []
    for _ in range(3):
        with browser.open(folder / "browse" / "index.html") as opened:
            times.append(opened.page.evaluate("performance.now()"))
    assert min(times) < 2000
    with browser.open(folder / "browse" / "index.html") as opened:
        assert opened.text("#count") == "100,000 of 100,000 rows"
        assert min(opened.page.evaluate(SCROLLING) for _ in range(3)) < 100
        opened.page.evaluate("document.getElementById('scroller').scrollTop = 1e9")
        opened.until("[...document.querySelectorAll('.key')].pop().textContent.includes('0999')")
        opened.page.wait_for_selector(".cell canvas")
        opened.page.fill("#query", "picture 77777")
        opened.settle()
        assert shown(opened) == ["folder/077777.jpg"]
        opened.page.fill("#query", "")
        opened.page.select_option("#sort", "entropy")
        opened.until("[...document.querySelectorAll('.cell')].every(c => c.querySelector('canvas'))")


def test_jobs_without_maps_over_patches_are_refused(job, tmp_path):
    full = made_job(job.parent / "photos", tmp_path / "full", 60, store="full", method="cls")
    assert "browse: expected a job with maps over patches" in fails("browse", full)
    assert "expected the output of a job" in fails("browse", tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    assert "has another index.html" in fails("browse", job, "--out", other)
    assert (other / "index.html").read_text() == "mine"
    assert "--images: expected a folder" in fails("browse", job, "--images", tmp_path / "none")
    assert "--thumb" in fails("browse", job, "--thumb", 2)
