"""The page of one image: its numbers, against the maps of a capture, and what it does in a browser."""

import json
import re
import zlib
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from families_hf import FAMILIES as HF
from families_timm import FAMILIES as TIMM
from matplotlib import colormaps
from PIL import Image
from test_cli import fails, run

import attnx
from attnx.demo.scenes import draw_scene
from attnx.page.page import CMAPS, LEVELS, base85, pack

SCENE = Image.fromarray(draw_scene(3).image)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a drawn scene with every head, and the capture with the same maps."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    loaded = attnx.load("demo")
    attnx.explore(loaded, SCENE.resize((480, 360)), heads="each").save(path)
    with torch.inference_mode(), attnx.capture(loaded.model, heads="each") as trace:
        loaded.model(loaded.prepare(SCENE.resize((480, 360)))[None])
    return path, trace


def data_of(html):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html)[1])


def content(page):
    """(data, bytes) of a page."""
    data = data_of(page.html)
    text = re.search(r'<script id="content" type="text/plain">(.*?)</script>', page.html)[1]
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+,-./:;=?@[]^_{|"
    values = np.array([digits.index(character) for character in text], np.int64).reshape(-1, 5)
    words = (values * 85 ** np.arange(4, -1, -1)).sum(1).astype(">u4")
    return data, zlib.decompress(words.tobytes()[: data["bytes"]])


def unpacked(content, shapes):
    """The maps in the result of `pack`, as its docstring says."""
    raw = zlib.decompress(content)
    sizes = [n for shape in shapes for n in shape]
    bits = np.frombuffer(raw, "<u2", sum(sizes)).astype("<u4") << 16
    scales = np.split(bits.view("<f4"), np.cumsum(sizes)[:-1])
    codes = np.frombuffer(raw, np.uint8, offset=2 * sum(sizes) + 768 * len(CMAPS))
    found = []
    for i, (rows, columns) in enumerate(shapes):
        own, codes = codes[: rows * columns].reshape(rows, columns), codes[rows * columns :]
        found.append(own / LEVELS * np.minimum(scales[2 * i][:, None], scales[2 * i + 1]))
    assert not len(codes)
    return found


def test_packed_values_are_within_the_budget_of_their_row_and_of_their_column():
    generator = np.random.default_rng(0)
    maps = [
        np.exp(4 * generator.standard_normal((30, 50))).astype(np.float32),
        np.zeros((3, 4), np.float32),
        np.where(np.arange(20) == 7, 1, 1e-6 * generator.random((9, 20))).astype(np.float32),
    ]
    for amap, found in zip(maps, unpacked(pack(maps), [amap.shape for amap in maps]), strict=True):
        for axis in (0, 1):
            assert (np.abs(found - amap) <= amap.max(axis, keepdims=True) / 259 + 1e-12).all()


@pytest.mark.parametrize("wrong", [[[-1.0, 0.5]], [[np.nan, 0.5]], [[np.inf, 0.5]]])
def test_maps_that_can_not_be_stored_are_refused(wrong):
    with pytest.raises(ValueError, match="expected finite values that are not negative"):
        pack([np.array(wrong, np.float32)])


def test_base85_is_read_back():
    for length in (0, 1, 4, 1001):
        data = bytes(np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8))
        text = base85(data)
        assert len(text) == 5 * -(-length // 4)
        assert not set(text) & set("<>&\"'\\")


def test_the_whole_page_has_the_maps_of_the_capture(made):
    page = attnx.explore(made[1], SCENE)
    data, raw = content(page)
    assert [stop["name"] for stop in data["stops"]] == [
        *made[1], "mean over 4 layers", "max over 4 layers", "min over 4 layers", "rollout"
    ]  # fmt: skip
    assert data["stops"][0]["heads"] == ["mean", *(f"head {i}" for i in range(6))]
    fused = torch.stack([amap[0].mean(0) for amap in (made[1][name] for name in made[1])])
    wanted = [part for name in made[1] for part in (made[1][name][0].mean(0), *made[1][name][0])]
    wanted += [fused.mean(0), fused.amax(0), fused.amin(0), attnx.rollout(made[1], query="all")[0]]
    shapes = [tuple(amap.shape) for amap in wanted]
    for amap, found in zip(wanted, unpacked(zlib.compress(raw), shapes), strict=True):
        for axis in (0, 1):
            limit = amap.numpy().max(axis, keepdims=True) / 259 + 1e-9
            assert (np.abs(found - amap.numpy()) <= limit).all()


def pixel(opened, row, column, grid):
    """The colour of the map at the centre of a patch, [r, g, b, a]."""
    shown = opened.canvas("#panel0 .map")
    height, width = shown.shape[:2]
    return shown[int((row + 0.5) / grid[0] * height), int((column + 0.5) / grid[1] * width)].astype(int)


def colours(values, at, cmap="turbo"):
    """The colours that the stored values allow for a patch, of a map with its own range."""
    low, high = values.min(), values.max()
    index = int(256 * float((values.reshape(-1)[at] - low) / (high - low)))
    # The value, the smallest and the largest one may each be off by 1/259 of the largest.
    reach = 1 + int(np.ceil(2 * 256 / 259 * high / (high - low)))
    return colormaps[cmap](np.arange(index - reach, index + reach + 1).clip(0, 255), bytes=True)[:, :3].astype(int)


@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize(("stop", "head"), [(0, 0), (3, 0), (2, 4)])
def test_the_hovered_patch_shows_the_numbers_of_the_capture(made, browser, stop, head, to):
    path, trace = made
    maps = trace[stop][0]
    amap = (maps.mean(0) if head == 0 else maps[head - 1]).numpy()
    row, column = 7, 4
    token = 1 + row * 12 + column
    values = (amap[:, token] if to else amap[token])[1:]
    with browser.open(path, f"stop={stop}&head={head}&alpha=100&smooth=0") as opened:
        opened.at((column + 0.5) / 12, (row + 0.5) / 12)
        if to:
            opened.page.keyboard.down("Shift")
            opened.settle()
        for at in (0, 17, row * 12 + column, int(values.argmax()), 143):
            *rgb, alpha = pixel(opened, *divmod(at, 12), (12, 12))
            assert alpha == 255
            assert min(np.abs(rgb - near).max() for near in colours(values, at)) <= 1
        # The value of the patch itself, in words.
        said = float(opened.text("#reading").rpartition(": ")[2])
        assert abs(said - values[row * 12 + column]) <= values.max() / 255
        assert opened.page.locator("#panel0 svg rect").count() == 2


def test_the_pointer_reads_the_pinned_map(made, browser):
    path, trace = made
    row = trace[1][0].mean(0)[1 + 5 * 12 + 6].numpy()
    with browser.open(path, "stop=1") as opened:
        opened.at(6.5 / 12, 5.5 / 12, click=True)
        for patch in (0, 50, int(row[1:].argmax())):
            opened.at((patch % 12 + 0.5) / 12, (patch // 12 + 0.5) / 12)
            reading = opened.text("#reading")
            assert f"patch (5, 6) to patch ({patch // 12}, {patch % 12})" in reading
            assert abs(float(reading.rpartition(": ")[2]) - row[1 + patch]) <= row.max() / 255
        assert abs(float(opened.text("#tokens small")) - row[0]) <= row.max() / 190  # three digits


def test_clicks_pin_compare_and_unpin(made, browser):
    with browser.open(made[0]) as opened:
        second = opened.page.locator("#panel1")
        opened.at(0.2, 0.2, click=True)
        assert "pick0=q" in opened.page.url
        opened.at(0.7, 0.6)
        assert opened.text("#panel0 p") == "patch (2, 2): what it attends to"
        assert not second.is_visible()
        opened.at(0.7, 0.6, click=True)
        assert opened.text("#panel1 p") == "patch (7, 8): what it attends to"
        opened.at(0.7, 0.6, click=True)
        assert not second.is_visible()
        opened.press("Escape")
        assert "pick" not in opened.page.url
        opened.at(0.2, 0.2)
        assert opened.text("#panel0 p") == "patch (2, 2): what it attends to"


def test_keys(made, browser):
    with browser.open(made[0]) as opened:
        stop, last = (lambda: opened.text("#stopName")), "blocks.3.attn"
        assert stop() == f"4 of 8: {last}"
        opened.press("[")
        assert stop() == "3 of 8: blocks.2.attn"
        opened.press("]")
        for _ in range(4):
            opened.press("]")
        assert stop() == "8 of 8: rollout"
        opened.press("]")
        assert stop() == "8 of 8: rollout"
        opened.go("")
        opened.page.focus("#panel0 .picture")
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
            opened.press(key)
        assert opened.text("#panel0 p") == "patch (7, 5): what it attends to"
        opened.press("Enter")
        opened.press("t")
        assert opened.text("#panel0 p") == "patch (7, 5): who attends to it"
        for key, changed in {".": "head=1", "c": "cmap=viridis", "m": "mass=60", "s": "smooth=0", "l": "links=1",
                             "r": "common=1", "-": "alpha=50"}.items():  # fmt: skip
            opened.press(key)
            assert changed in opened.page.url, key
        assert opened.page.locator("#panel0 .link").count() == 5
        opened.press("Escape")
        assert "pick" not in opened.page.url
        opened.press("p")
        opened.until("document.getElementById('stopName').textContent.startsWith('5')")
        opened.press("p")


def test_an_address_restores_the_state(made, browser):
    state = "stop=2&head=3&to=1&cmap=magma&alpha=80&mass=60&smooth=0&pick0=k60&pick1=k99"
    look = "[...document.querySelectorAll('canvas.map')].map(c => c.toDataURL()).join() + document.body.innerText"
    with browser.open(made[0]) as opened:
        opened.at(0.4, 0.4, click=True)
        opened.page.mouse.move(0, 0)
        opened.go(state)
        first, address = opened.page.evaluate(look), opened.page.url
    with browser.open(made[0], address.partition("#")[2]) as opened:
        assert opened.page.evaluate(look) == first
        assert opened.page.input_value("#cmap") == str(CMAPS.index("magma"))
    invalid = "stop=99&head=-1&pick0=k9999&cmap=no&alpha=1e9&mass=x&__proto__=1&picks=1"
    for broken in (invalid, "pick0=q1.2.&to=2", "%%%"):
        with browser.open(made[0], broken) as opened:
            opened.at(0.5, 0.5)
            assert opened.text("#panel0 p").startswith("patch (6, 6)")


def test_the_mass_is_that_of_mass_mask(made, browser):
    path, trace = made
    row = trace[3][0].mean(0)[1 + 30, 1:].reshape(12, 12)
    with browser.open(path, f"mass=60&smooth=0&pick0=q{1 + 30}") as opened:
        height, width, _ = (pixels := opened.canvas("#panel0 .map")).shape
    centre = (np.arange(12) + 0.5) / 12
    shown = pixels[(centre * height).astype(int)][:, (centre * width).astype(int), 3] > 0
    # A patch at the edge of the mask may change sides by the steps of the stored values.
    assert (shown != attnx.mass_mask(row, 0.6).numpy()).sum() <= 1


def test_smooth_maps_are_those_of_resize(made, browser):
    path, trace = made
    row = trace[3][0].mean(0)[1 + 30, 1:].reshape(12, 12)
    with browser.open(path, f"alpha=100&cmap=gray&pick0=q{1 + 30}") as opened:
        shown = opened.canvas("#panel0 .map")[..., 0].astype(int)
    height, width = shown.shape
    wanted = (attnx.resize(row, (height, width)) - row.min()) / (row.max() - row.min()) * 256
    assert (width, height) == (560, 420)
    assert np.abs(shown - wanted.clamp(0, 255).int().numpy()).max() <= 3


def test_heads_and_the_overview(made, browser):
    with browser.open(made[0], "stop=2&pick0=q60") as opened:
        assert opened.page.locator("#heads button").count() == 7
        assert opened.page.locator("#overview button").count() == 4 * 7 + 4
        opened.page.click("#heads button >> nth=3")
        opened.settle()
        assert "head=3" in opened.page.url
        opened.page.click("#overview [aria-label='blocks.0.attn, head 4']")
        opened.settle()
        assert opened.text("#stopName") == "1 of 8: blocks.0.attn"
        maps = {(layer, head): made[1][layer][0, head, 60].numpy() for layer in range(4) for head in range(6)}
        own = maps.pop((0, 4))
        cosine = {key: own @ other / np.linalg.norm(own) / np.linalg.norm(other) for key, other in maps.items()}
        best = max(cosine, key=cosine.__getitem__)
        assert opened.text("#similar button >> nth=0") == f"blocks.{best[0]}.attn, head {best[1]} ({cosine[best]:.2f})"
        opened.page.click("#similar button >> nth=0")
        opened.settle()
        assert f"blocks.{best[0]}.attn, head {best[1]}" in opened.text("#reading")


def test_one_range_for_all_layers(made, browser):
    highest = max(made[1][layer][0, :, 60, 1:].max().item() for layer in range(4))
    with browser.open(made[0], "common=1&pick0=q60") as opened:
        low, high = opened.page.locator("#panel0 figcaption span").all_inner_texts()
    assert low == "0"
    assert float(high) == pytest.approx(highest, rel=0.01)


def test_the_class_token_is_a_button(made, browser):
    with browser.open(made[0]) as opened:
        assert opened.text("#panel0 p") == "class: what it attends to"
        opened.page.hover("#tokens button")
        opened.page.click("#tokens button")
        opened.settle()
        assert opened.page.get_attribute("#tokens button", "aria-pressed") == "true"
        assert "pick0=q0" in opened.page.url


def test_a_phone(made, browser):
    phone = {"viewport": {"width": 375, "height": 667}, "has_touch": True, "is_mobile": True}
    with browser.open(made[0], **phone) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 375
        opened.page.tap("#panel0 .picture", position={"x": 100, "y": 100})
        opened.settle()
        assert "pick0=q" in opened.page.url
        opened.page.tap("#tokens button")
        opened.settle()
        assert "pick1=q0" in opened.page.url
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screen_readers(made, browser, scheme):
    package = pytest.importorskip("axe_playwright_python", reason="no axe: pip install axe-playwright-python")
    source = Path(package.__file__).with_name("axe.min.js").read_text()
    with browser.open(made[0], "pick0=q60&pick1=q70", color_scheme=scheme) as opened:
        opened.page.evaluate(source)
        found = opened.page.evaluate("axe.run()")
    serious = [each["id"] for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert serious == []
    assert len(found["passes"]) > 10


def test_a_notebook_shows_the_page_in_a_frame(made, browser, tmp_path):
    page = attnx.explore("demo", SCENE)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><html data-ready>{page._repr_html_()}</html>")
    assert 'sandbox="allow-scripts"' in page._repr_html_()
    with browser.open(path) as opened:
        frame = opened.page.frames[1]
        frame.wait_for_selector("html[data-ready]")
        frame.hover("#panel0 .picture")
        frame.wait_for_selector("#panel0 p:text('patch (')")


def test_a_hostile_title_is_text(browser, tmp_path):
    title = "</title><script>document.title='taken'</script>$body<img src=x onerror=alert(1)>"
    attnx.explore("demo", SCENE, title=title).save(tmp_path / "page.html")
    assert escape(title) in (tmp_path / "page.html").read_text()
    with browser.open(tmp_path / "page.html") as opened:
        assert opened.page.title() == title
        assert opened.text("h1") == title
        assert opened.page.locator("h1 *").count() == 0


def test_the_policy_blocks_scripts_and_connections(made, browser):
    with browser.open(made[0]) as opened:
        blocked = opened.page.evaluate(
            """async () => {
            const refused = (what) => { try { what(); return 'taken'; } catch { return 'refused'; } };
            const answers = await Promise.allSettled([fetch('https://example.com'), fetch('data:,x')]);
            const script = document.createElement('script');
            return [refused(() => { script.textContent = 'window.taken = 1'; }),
                refused(() => { script.src = 'other.js'; }),
                refused(() => { document.body.innerHTML += '<b>x</b>'; }),
                ...answers.map(answer => answer.status)]; }"""
        )
        assert blocked == ["refused", "refused", "refused", "rejected", "rejected"]
        opened.problems.clear()


# The families of the README's table.
FAMILIES = [
    "timm vit", "timm deit distilled", "timm vit dinov2 reg", "timm vit dinov3", "timm eva02", "timm beit",
    "timm vit clip", "timm vit siglip", "open_clip clip", "open_clip coca", "HF CLIP", "HF SigLIP", "timm swin",
    "timm swinv2", "HF Swin", "torchvision swin", "timm crossvit", "HF BLIP retrieval", "HF ViLT", "HF FLAVA",
    "HF LLaVA", "HF Qwen2-VL", "timm maxvit", "timm pvt v2", "timm xcit", "timm levit", "timm hiera",
]  # fmt: skip
BY_NAME = {family.name: family for family in [*TIMM, *HF]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_of_each_family_opens(name, browser, tmp_path):
    if name not in BY_NAME:
        pytest.skip(f"{name}: not in this version of transformers")
    family = BY_NAME[name]
    if getattr(family, "needs", None):
        pytest.importorskip(family.needs)
    model, given = family.build()
    with torch.inference_mode(), attnx.capture(model, heads="each") as trace:
        if family.images_only and isinstance(given, tuple):
            model(given[0][:1])
        elif isinstance(given, tuple):
            model(*given)
        else:
            model(**given)
    with suppress(IndexError, ValueError):  # of one image, or the images are one sequence
        trace = trace.item(0)
    attnx.explore(trace, SCENE).save(tmp_path / "page.html")
    with browser.open(tmp_path / "page.html") as opened:
        stops = int(opened.text("#stopName").partition(":")[0].split()[-1])
        assert stops >= 2
        for stop in range(stops):
            opened.go(f"stop={stop}")
            for place in (0.2, 0.7):
                opened.at(place, place)
            assert "undefined" not in opened.text("main")
            assert "NaN" not in opened.text("main")


@pytest.mark.parametrize("layer", ["layers.0.blocks.1.attn", "layers.1.blocks.0.attn"])
def test_windows_have_their_places(layer, browser, tmp_path):
    model, given = BY_NAME["timm swin"].build()
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(given[0][:1])
    attnx.explore(trace, SCENE).save(tmp_path / "page.html")
    row, column = 2, 5
    grid = trace.windows(layer).grid
    values = attnx.token_map(trace, row * grid[1] + column, layer)[0].numpy()
    with browser.open(tmp_path / "page.html", f"stop={list(trace).index(layer)}&smooth=0&alpha=100") as opened:
        opened.at((column + 0.5) / grid[1], (row + 0.5) / grid[0], click=True)
        for at in (0, int(values.argmax()), values.size - 1):
            near = colours(values, at)
            assert min(np.abs(pixel(opened, *divmod(at, grid[1]), grid)[:3] - each).max() for each in near) <= 1


def test_a_pick_follows_its_place_to_another_grid(browser, tmp_path):
    model, given = BY_NAME["timm swin"].build()
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(given[0][:1])
    attnx.explore(trace, SCENE).save(tmp_path / "page.html")
    grids = [trace.windows(layer).grid for layer in trace]
    with browser.open(tmp_path / "page.html", "stop=0") as opened:
        assert grids[0] == (16, 16)
        opened.at(13.5 / 16, 6.5 / 16, click=True)
        assert opened.text("#panel0 p").startswith("patch (6, 13)")
        while opened.text("#stopName").partition(":")[0] != f"{len(grids)} of 8":
            opened.press("]")
        assert grids[-1] == (8, 8)
        assert opened.text("#panel0 p").startswith("patch (3, 6)")


def test_sizes():
    """Random weights and noise give maps that compress badly."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    loaded = attnx.load("timm:vit_base_patch16_224", pretrained=False)
    mean, each = (attnx.explore(loaded, noise, heads=heads) for heads in ("mean", "each"))
    assert size(mean) < 1e6
    assert size(each) < 6e6
    assert not any("mean of" in note for note in (*mean.notes, *each.notes))


def size(page):
    """Bytes of a page without its photo."""
    return len(page.html) - len(data_of(page.html)["photo"])


@pytest.mark.long
def test_the_size_of_a_long_sequence():
    loaded = attnx.load("timm:vit_small_patch14_dinov2", pretrained=False)
    with torch.inference_mode(), attnx.capture(loaded.model) as trace:
        loaded.model(loaded.prepare(SCENE)[None])
    assert trace[0].shape == (1, 1370, 1370)
    page = attnx.explore(trace, SCENE)
    assert len(page.html) < 15.2e6
    assert page.notes == (
        "A value is the mean of 2 x 2 keys, so that the maps take at most 15 MB; pool=1 keeps each of them.",
    )
    assert len(attnx.explore(trace.select([0, 5, 11]), SCENE).notes) == 0
    assert len(attnx.explore(trace, SCENE, pool=4).html) < 4e6


def test_pooled_keys_are_means(browser, tmp_path):
    loaded = attnx.load("demo", image_size=(88, 104))  # 11 x 13 patches: the last pools are smaller
    with torch.inference_mode(), attnx.capture(loaded.model) as trace:
        loaded.model(loaded.prepare(SCENE)[None])
    attnx.explore(trace, SCENE, pool=2).save(tmp_path / "page.html")
    row = trace[3][0, 1 + 40, 1:].reshape(11, 13)
    with browser.open(tmp_path / "page.html", f"stop=3&pick0=q{1 + 40}") as opened:
        assert "A value is the mean of 2 x 2 keys." in opened.text("#notes")
        for (i, j), wanted in {(0, 0): row[:2, :2].mean(), (10, 12): row[10, 12], (4, 12): row[4:6, 12].mean()}.items():
            opened.at((j + 0.5) / 13, (i + 0.5) / 11)
            reading = opened.text("#reading")
            assert f"to 2 x 2 patches at ({i // 2 * 2}, {j // 2 * 2})" in reading
            assert abs(float(reading.rpartition(": ")[2]) - wanted) <= row.max() / 255


def test_names_of_other_tokens():
    model, given = BY_NAME["timm vit dinov2 reg"].build()
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(given[0][:1])
    registers = [f"register {i}" for i in range(1, 5)]
    assert data_of(attnx.explore(trace).html)["sides"][0]["before"] == ["class", *registers]


def test_text_tokens_have_the_given_names():
    model, given = BY_NAME["HF BERT"].build()
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(**given)
    names = [f"word{i}" for i in range(8)]
    assert data_of(attnx.explore(trace.item(0), text=names).html)["sides"][0]["before"] == names


def test_wrong_arguments():
    loaded = attnx.load("demo")
    with torch.inference_mode(), attnx.capture(loaded.model, rows=0) as chosen:
        loaded.model(torch.rand(1, 3, 96, 96))
    with torch.inference_mode(), attnx.capture(loaded.model) as batch:
        loaded.model(torch.rand(2, 3, 96, 96))
    for call, message in {
        lambda: attnx.explore(chosen, SCENE): "trace: expected a capture with rows=None; got rows=\\[0\\]",
        lambda: attnx.explore(batch, SCENE): "it has 2 maps; of a batch, pass trace.item",
        lambda: attnx.explore(loaded): "image: expected a picture",
        lambda: attnx.explore(torch.nn.Linear(2, 2), SCENE): "model: expected a name, the result of attnx.load",
        lambda: attnx.explore(loaded.model.train(), SCENE): "model: expected eval mode",
        lambda: attnx.explore(loaded, SCENE, pool=0): "pool: expected an int of at least 1",
        lambda: attnx.explore(loaded, SCENE, heads="no"): "heads: expected one of",
        lambda: attnx.explore(loaded, SCENE, layers="no"): "no",
        lambda: attnx.explore(loaded, SCENE).save("page.txt"): "path: expected a name that ends in .html",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_chosen_layers_have_no_rollout():
    page = attnx.explore("demo", SCENE, layers=[0, 3])
    assert [stop["name"] for stop in data_of(page.html)["stops"]][-1] == "min over 2 layers"
    assert page.notes == ("There is no rollout of chosen layers.",)
    assert attnx.explore("demo", SCENE, layers=3).notes == page.notes
    assert data_of(attnx.explore("demo", SCENE, layers="blocks.*").html)["stops"][-1]["name"] == "rollout"


def test_maps_weighted_by_gradients_have_no_rollout():
    loaded = attnx.load("demo")
    with attnx.capture(loaded.model, grad=True) as trace:
        logits = loaded.model(torch.rand(1, 3, 96, 96))
    trace.backward(logits[:, 0].sum())
    page = attnx.explore(trace, SCENE)
    assert page.notes == ("There is no rollout of maps weighted by gradients.",)
    assert data_of(page.html)["stops"][-1]["name"] == "min over 4 layers"


@pytest.mark.parametrize("name", ["timm vit siglip", "timm swin", "timm crossvit"])
def test_the_rollout_of_other_families(name):
    model, given = BY_NAME[name].build()
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(given[0][:1])
    data, raw = content(attnx.explore(trace))
    sides = [
        len(side["before"]) + len(side["after"]) + int(np.prod(side["grid"] or 0)) * (side["grid"] is not None)
        for side in data["sides"]
    ]
    shapes = [(sides[stop["queries"]], sides[stop["keys"]]) for stop in data["stops"]]
    assert data["stops"][-1]["name"] == "rollout"
    if name == "timm crossvit":
        wanted = attnx.rollout(trace).flatten(1)[0, None].numpy()
    else:
        wanted = attnx.rollout(trace, query="all")[0].numpy()
    found = unpacked(zlib.compress(raw), shapes)[-1]
    assert found.shape == wanted.shape
    assert (np.abs(found - wanted) <= wanted.max(1, keepdims=True) / 259 + 1e-9).all()


def test_gradients_with_a_sign_are_refused():
    loaded = attnx.load("demo")
    with attnx.capture(loaded.model, grad="signed") as trace:
        logits = loaded.model(torch.rand(1, 3, 96, 96))
    trace.backward(logits[:, 0].sum())
    with pytest.raises(ValueError, match="not negative"):
        attnx.explore(trace, SCENE)


def test_the_command(tmp_path):
    SCENE.save(tmp_path / "photo.png")
    photo, out = tmp_path / "photo.png", tmp_path / "new" / "page.html"
    done = run("explore", photo, "--heads", "each", "--layers", 0, "--layers", 3, "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{out}  ")
    assert "There is no rollout of chosen layers." in done.stdout
    assert "no --model: using the demo model" in done.stderr
    data = data_of(out.read_text())
    assert [stop["name"] for stop in data["stops"]][:2] == ["blocks.0.attn", "blocks.3.attn"]
    assert data["size"] == [96, 96]
    assert "nothing.png: can't be read as an image" in fails("explore", "nothing.png")
    assert fails("explore", photo, "--out", "page.txt") == (
        "attnx: --out: expected a name that ends in .html; got 'page.txt'"
    )
    assert fails("explore", photo, "--heads", "no") == (
        "attnx: --heads: expected one of mean, max, min, each; got 'no'"
    )
