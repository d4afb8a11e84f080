"""Objects that show themselves in notebooks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attnx
from attnx.demo.albef import demo_albef
from attnx.demo.run import run_demo
from attnx.images.inline import heat_tag
from attnx.jobs.columns import MapRow

IMG = '<img src="data:image/png;base64,'


def test_word_maps() -> None:
    found = attnx.word_maps(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle", "a <b>star</b>"], layer=2)
    assert repr(found[0]) == "CaptionMaps('a red circle', [5, 12, 12])"
    page = found[0]._repr_html_()
    assert page.count(IMG) == 3
    assert "red" in page
    both = found._repr_html_()
    assert both.count(IMG) == 3 + len(found[1].words)
    assert "<b>" not in both
    scored = attnx.gradcam(demo_albef(), torch.rand(1, 3, 96, 96), ["a star"], layer=2)[0]
    assert "match" in scored._repr_html_()
    assert "score=" in repr(scored)


def test_rows_and_jobs(tmp_path: Path) -> None:
    run_demo(tmp_path, scenes=7)
    maps = attnx.open(tmp_path / "rollout")
    page = maps._repr_html_()
    assert page.count(IMG) == 5
    assert "and 2 more rows" in page
    assert repr(maps[0]) == "MapRow('00000.png', [12, 12])"
    assert maps[0]._repr_html_().count(IMG) == 1


def test_rows_of_every_kind() -> None:
    amap = np.random.default_rng(0).random((4, 3, 3), dtype=np.float32)
    words = MapRow("<i>", text="a <b>star</b>", map=amap, tokens=("[CLS]", "a", "star", "[SEP]"),
                   word_of=(None, 0, 1, None), words=("a", "star"))  # fmt: skip
    page = words._repr_html_()
    assert page.count(IMG) == 2
    assert "<b>" not in page
    assert "<i>" not in page
    assert MapRow("a", map=amap)._repr_html_().count(IMG) == 1
    failed = MapRow("a", error="a.jpg: broken")
    assert repr(failed) == "MapRow('a', error='a.jpg: broken')"
    assert IMG not in failed._repr_html_()
    assert repr(MapRow("a", entropy=np.zeros(3))) == "MapRow('a', no map)"


def test_a_constant_map_is_a_picture() -> None:
    assert heat_tag(np.ones((2, 3))).startswith(IMG)


CELLS = """\
import attnx, torch; from attnx.jobs.progress import progress_bar; loaded = attnx.load("demo")
with torch.no_grad(), attnx.capture(loaded.model) as trace: loaded.model(torch.rand(1, 3, 96, 96))
trace
attnx.word_maps(attnx.load("albef:demo").model, torch.rand(1, 3, 96, 96), ["a red circle"], layer=2)[0]
attnx.picture.heads_grid("photo.png", torch.rand(3, 4, 4), colorbar=True)
with progress_bar(10) as progress: progress(10, 10)
"""


def test_a_notebook_shows_them(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipywidgets")
    pytest.importorskip("ipykernel")
    Image.new("RGB", (96, 96)).save(tmp_path / "photo.png")
    cells = [nbformat.v4.new_code_cell(line) for line in CELLS.splitlines()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [set(output["data"]) for cell in notebook.cells for output in cell.outputs if "data" in output]
    assert [kinds - {"text/plain"} for kinds in shown] == [
        {"text/html"}, {"text/html"}, {"image/png"}, {"application/vnd.jupyter.widget-view+json"}
    ]  # fmt: skip
