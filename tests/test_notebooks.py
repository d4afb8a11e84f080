"""Objects that show themselves in notebooks."""

from pathlib import Path

import numpy as np
import pytest
import torch

import attnx
from attnx.demo.albef import demo_albef
from attnx.demo.run import run_demo
from attnx.images.inline import heat_tag
from attnx.jobs.columns import MapRow
from attnx.jobs.progress import progress_bar

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


def test_progress_bars_draw_widgets_in_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is tqdm's own choice for the place where it runs."""
    import tqdm.auto

    made: list[dict[str, object]] = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, **options: object) -> None:
            made.append(options)
            super().__init__(**options, disable=True)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    with progress_bar(10) as progress:
        progress(3, 10)
        progress(10, 12)
    assert made == [{"total": 10, "unit": " images", "dynamic_ncols": True}]
