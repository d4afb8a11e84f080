"""Tokens, extractors and pictures of every family of `test_families`.

The tokens of each layer fill its map, and a patch of the image changes the column that the layout says.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import EACH, FAMILIES, UNFUSED, built
from torch import Tensor, nn

import attnx
from attnx.figures.one_image import draw
from attnx.figures.shown import Request
from attnx.figures.style import Style
from attnx.methods.received import last_on_grid, received
from attnx.models.loaded import Loaded
from attnx.trace.sides import Tokens

KINDS = {"image", "text", "windows", "channels", "queries", "tokens"}
MAPPED = [p for p in EACH if p.values[0] not in UNFUSED]
OF_IMAGES = [p for p in MAPPED if FAMILIES[p.values[0]].images_only]
# Pictures take longer than maps: every fourth family, and all of them in the slow tests.
DRAWN = [pytest.param(*p.values, marks=p.marks if i % 4 == 0 else pytest.mark.slow) for i, p in enumerate(OF_IMAGES)]

# Families of images of which no layer is over a known grid, so that only the counts of tokens can be checked.
NO_GRID = {"timm hiera", "timm tnt", "HF Hiera", "HF Deformable DETR"}
# Stems whose fields of view overlap: the largest change may be in a neighbour of the patch.
OVERLAPPING = {
    "timm vitamin",
    "timm maxvit",
    "timm maxvit tf",
    "timm davit",
    "timm pit",
    "timm levit",
    "timm efficientformer",
    "timm coatnet",
    "timm coatnet rmlp",
    "timm levit conv",
    "timm mobilevit",
    "timm gcvit",
    "timm caformer",
    "timm visformer",
}
# Families of images where the place of a patch can't be seen in the first layer.
NOT_PLACED = {
    **dict.fromkeys(
        (
            "timm pvt v2",
            "timm twins pcpvt",
            "HF PVT v2",
            "HF SegFormer",
            "timm efficientformerv2",
            "timm mobilenetv4 hybrid",
        ),
        "its first layer is over pooled keys",
    ),
    **dict.fromkeys(
        ("timm tiny vit", "timm volo", "timm efficientvit m0"), "its first layer is over windows that are not known"
    ),
    **dict.fromkeys(
        ("timm resnet50 clip", "open_clip resnet visual"),
        "a ResNet: every cell of its 2 x 2 grid depends on the whole image",
    ),
    "HF MobileViT": "every cell depends on most of the image",
    "HF Pixtral": "it packs the images of a batch into one sequence",
    "HF RT-DETR": "a ResNet: every cell of its 2 x 2 grid depends on the whole image",
    "timm vit hybrid": "a ResNet with group norm: every cell of its 2 x 2 grid depends on the whole image",
    "HF DETR": "a ResNet: every cell of its 2 x 2 grid depends on the whole image",
    "timm cait": "only the last two layers have the class token",
    "timm convit": "only the last layer has the class token",
    "timm xcit": "its first layers attend over channels",
    "timm mvitv2": "its first layer is over pooled keys",
}
# Families without a rollout and without a class token, of which a layer is over a known grid.
RECEIVED = {
    *("timm maxvit", "timm maxvit tf", "timm mvitv2", "timm davit", "timm twins svt"),
    *("HF DETR", "HF MaskFormer", "HF Mask2Former", "HF PVT v2", "HF SegFormer", "HF RT-DETR"),
    *("timm coatnet", "timm coatnet rmlp", "timm efficientformerv2", "timm efficientvit m0", "timm mobilenetv4 hybrid"),
    *("timm levit conv", "timm mobilevit", "HF MobileViT", "timm nest", "timm volo"),
    *("timm visformer", "timm pvt v2", "timm levit", "timm twins pcpvt", "timm tiny vit", "timm gcvit"),
}
PLACED = [p for p in OF_IMAGES if p.values[0] not in NO_GRID | NOT_PLACED.keys()]
# Pixtral packs the images of a batch into one sequence.
PACKED = {"HF Pixtral"}


def assert_fills(tokens: Tokens, count: int) -> None:
    """The tokens are as many as the rows or columns of the map, and of a documented kind."""
    assert tokens.kind in KINDS
    assert tokens.count == count
    if tokens.kind == "image" and tokens.grid is not None:
        h, w = tokens.grid
        assert tokens.prefix + tokens.frames * h * w + tokens.suffix == count
        assert not tokens.cls or tokens.prefix > 0
    elif tokens.kind != "windows":
        assert tokens.grid is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAPPED)
def test_tokens_fill_the_map(name: str) -> None:
    model, call, images = built(name)
    with torch.no_grad(), attnx.capture(model) as trace:
        call()
    for layer in trace:
        items, rows, columns = trace[layer].shape
        queries, keys = trace.sides(layer)
        assert_fills(queries, rows)
        assert_fills(keys, columns)
        windows = trace.windows(layer)
        if windows is None:
            continue
        assert keys.kind == "windows"
        assert keys.grid == windows.grid
        assert windows.index.shape == (windows.count, rows)
        assert windows.index[windows.index >= 0].sort().values.tolist() == list(
            range(windows.grid[0] * windows.grid[1])
        )
        assert rows == columns
        assert items % windows.count == 0
        assert images is None or items == len(images) * windows.count


def over_grid(trace: attnx.Trace, layer: str, columns: Tensor) -> Tensor:
    """One number for each column of each map, [items, N], as [images, h, w]."""
    keys, windows = trace.sides(layer)[1], trace.windows(layer)
    assert keys.grid is not None
    if windows is None:
        return columns[:, keys.prefix : keys.count - keys.suffix].unflatten(1, keys.grid)
    grid = columns.new_zeros(len(columns) // windows.count, windows.tokens + 1)
    grid[:, windows.index.flatten()] = columns.reshape(len(grid), -1)  # padding, -1, is the last
    return grid[:, :-1].unflatten(1, windows.grid)


def patch(images: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels of a cell of the grid."""
    height, width = images.shape[-2:]
    (h, w), (r, c) = grid, cell
    return slice(r * height // h, (r + 1) * height // h), slice(c * width // w, (c + 1) * width // w)


def changed(model: nn.Module, image: Tensor, cell: tuple[int, int], layer: str, draws: int = 4) -> Tensor:
    """Change of the scores of each column of the layer's map, [h, w], if noise replaces one patch of [1, 3, H, W].

    The log of a weight is its score minus a number of its row. If the key of one token changes, the logs of all other
    columns of a row change by the same amount, which is their median. The row of the changed token itself differs from
    the others, so the median over rows ignores it.
    """
    images = image.repeat(draws, 1, 1, 1)

    def logs() -> tuple[attnx.Trace, Tensor]:
        with torch.no_grad(), attnx.capture(model, layers=[layer], heads="each") as trace:
            model(images)
        return trace, trace[layer].clamp(min=1e-30).log()

    trace, before = logs()
    grid = trace.sides(layer)[1].grid
    assert grid is not None
    rows, columns = patch(images, grid, cell)
    images[:, :, rows, columns] = 4 * torch.randn(
        images[:, :, rows, columns].shape, generator=torch.Generator().manual_seed(0)
    )
    change = logs()[1] - before
    change = change - change.median(-1, keepdim=True).values
    return over_grid(trace, layer, change.abs().median(-2).values.mean(1)).sum(0)


def corners(grid: tuple[int, int]) -> set[tuple[int, int]]:
    """Some cells of a grid. None is where it would be with rows and columns exchanged, except the last."""
    h, w = grid
    return {(0, w - 1), (h - 1, 0), (h // 2, w // 4), (h - 1, w - 1)}


def captured(model: nn.Module, images: Tensor) -> attnx.Trace:
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    return trace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PLACED)
def test_a_patch_of_the_image_changes_its_own_column(name: str) -> None:
    model, images = model_and_images(name)
    trace = captured(model, images[:1])
    layer = next(iter(trace))
    grid = trace.sides(layer)[1].grid
    assert grid is not None
    for cell in corners(grid):
        change = changed(model, images[:1], cell, layer)
        found = divmod(int(change.argmax()), grid[1])
        if name in OVERLAPPING:
            assert max(abs(found[0] - cell[0]), abs(found[1] - cell[1])) <= 1
            continue
        assert found == cell
        others = change.flatten().sort().values[:-1]
        assert others.max() < 1e-3 * change.max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OF_IMAGES)
def test_maps_of_an_image_do_not_depend_on_its_batch(name: str) -> None:
    model, _, images = built(name)
    assert images is not None
    both, alone = captured(model, images), captured(model, images[1:])
    assert list(both) == list(alone)
    if name in PACKED:
        assert {len(both[layer]) for layer in both} == {1}
        return
    for layer in both:
        second = both[layer].unflatten(0, (len(images), -1))[1]
        torch.testing.assert_close(second, alone[layer], rtol=0, atol=1e-4)


def result(call: Callable[[], Tensor]) -> Tensor | str:
    """The result of a call, or the message of its error, one line."""
    try:
        return call()
    except (ValueError, RuntimeError) as error:
        message = str(error)
    assert "\n" not in message
    return message


def model_and_images(name: str) -> tuple[nn.Module, Tensor]:
    model, _, images = built(name)
    assert images is not None
    return model, images[:1] if name in PACKED else images


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["rollout", "cls"])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_an_extractor_gives_what_a_capture_gives(name: str, method: str) -> None:
    model, images = model_and_images(name)
    trace = captured(model, images)
    want = result(lambda: attnx.rollout(trace) if method == "rollout" else attnx.cls_map(trace))
    got = result(lambda: attnx.Extractor(model, method)(images))
    if isinstance(want, str):
        assert got == want
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OF_IMAGES)
def test_received_is_the_mean_of_the_columns(name: str) -> None:
    model, images = model_and_images(name)
    trace = captured(model, images)
    if name in NO_GRID:
        with pytest.raises(ValueError, match="expected a layer over a known grid of patches; got "):
            last_on_grid(trace)
        return
    layer = last_on_grid(trace)
    got, windows = received(trace, layer), trace.windows(layer)
    assert got.shape == (len(images), *(trace.sides(layer)[1].grid or ()))
    if windows is not None and windows.padded:
        torch.testing.assert_close(got.sum((-2, -1)), torch.ones(len(images)))
        return
    queries = trace[layer].shape[1] if windows is None else windows.tokens
    torch.testing.assert_close(got, over_grid(trace, layer, trace[layer].sum(1) / queries), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DRAWN)
def test_show_draws_the_family(name: str, tmp_path: Path) -> None:
    model, images = model_and_images(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    loaded = Loaded(name, model, (images.shape[-2], images.shape[-1]))

    def written(**rolling: float) -> dict[Path, str]:
        return draw(picture, loaded, tmp_path, Request(rolling=rolling), Style(), torch.device("cpu"))

    texts = written()
    main = tmp_path / ("matrix.png" if name in NO_GRID else "received.png" if name in RECEIVED else "overlay.png")
    assert next(iter(texts)) == main
    assert all(path.is_file() for path in texts)
    assert ("is attended to in " in texts[main]) == (name in RECEIVED)
    assert ("a row for each query" in texts[main]) == (name in NO_GRID)
    rolled = texts[main].startswith("rollout")
    assert rolled == isinstance(result(lambda: attnx.rollout(captured(model, images))), Tensor)
    assert rolled != ("no rollout: " in texts[main])
    assert "layers: " not in texts[main]
    if len(texts) == 1:
        assert texts[main].partition("no heads.png, masks.png and layers.png: ")[2] in {
            "the model has no class token",
            "the model attends in windows, without a class token",
            "the layers attend to different tokens",
        }
    if not rolled:
        with pytest.raises(ValueError, match=r"layers|layout|declare|discard"):
            written(discard=0.5)
