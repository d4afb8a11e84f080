"""The bundled demo on scenes that neither training nor `attnx demo` has drawn."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from attnx.demo.run import run_demo
from attnx.demo.scenes import CLASSES, draw_scene
from attnx.demo.vit import demo_model

UNSEEN = 30_000_000


def test_the_best_method_points_at_the_target(tmp_path: Path) -> None:
    verdict = run_demo(tmp_path, scenes=150, seed=UNSEEN)
    assert max(verdict.shares["rollout"], verdict.shares["cls"]) >= 0.90
    assert verdict.shares["random"] < 0.15
    assert "150 unseen scenes" in str(verdict)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pointing_game"] == verdict.shares
    assert results["words"] == verdict.words.shares
    assert "of 300 phrases" in str(verdict)
    assert np.mean([row["cls"] for row in results["rows"]]) == verdict.shares["cls"]


def test_the_model_names_the_target() -> None:
    scenes = [draw_scene(UNSEEN + i) for i in range(100)]
    model = demo_model()
    config = model.pretrained_cfg
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        named = model((images - mean) / std).argmax(1)
    assert (named == torch.tensor([s.label for s in scenes])).double().mean() >= 0.9


def test_weights_are_small() -> None:
    import attnx.demo.vit as module

    assert module.WEIGHTS.stat().st_size <= 3 << 20


def test_a_scene_is_its_seed() -> None:
    a, b, c = draw_scene(7), draw_scene(7), draw_scene(8)
    assert np.array_equal(a.image, b.image)
    assert a.box == b.box
    assert not np.array_equal(a.image, c.image)
    assert {f.name for f in dataclasses.fields(a)} == {"image", "box", "label"}
    for seed in range(UNSEEN, UNSEEN + 50):
        scene = draw_scene(seed)
        x0, y0, x1, y1 = scene.box
        assert 0 <= x0 < x1 <= 96
        assert 0 <= y0 < y1 <= 96
        assert 0 <= scene.label < len(CLASSES)
        # The target is the only saturated object, and the box contains it.
        saturation = np.ptp(scene.image.astype(int), axis=2)
        inside = saturation[y0:y1, x0:x1].max()
        outside = saturation.copy()
        outside[y0:y1, x0:x1] = 0
        assert inside > 80 > outside.max()
