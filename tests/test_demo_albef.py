"""The bundled ALBEF on captioned scenes that neither training nor `attnx demo` has drawn."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attnx.demo import albef as pair
from attnx.demo.captioned import RELATIONS, describe, draw_pair
from attnx.demo.pointing import Pointing, point_at_phrases, words_sheet
from attnx.demo.scenes import COLORS, SHAPES
from attnx.demo.training.objective import holds, phrase

UNSEEN = 30_000_000


@pytest.fixture(scope="module")
def pointing() -> Pointing:
    return point_at_phrases(64, UNSEEN)


def test_a_captioned_scene_is_its_seed() -> None:
    a, b, c = draw_pair(7), draw_pair(7), draw_pair(8)
    assert np.array_equal(a.image, b.image)
    assert (a.caption, a.phrases, a.facts) == (b.caption, b.phrases, b.facts)
    assert not np.array_equal(a.image, c.image)
    assert draw_pair(7, 64).image.shape == (64, 64, 3)


def test_captions_are_true_and_boxes_hold_what_they_name() -> None:
    for seed in range(UNSEEN, UNSEEN + 60):
        scene = draw_pair(seed)
        (first, box), (second, box2) = scene.phrases
        color, shape, relation, color2, shape2 = scene.facts
        assert first != second
        assert first == f"{tuple(COLORS)[color]} {SHAPES[shape]}"
        assert second == f"{tuple(COLORS)[color2]} {SHAPES[shape2]}"
        assert scene.caption == f"a {first} {RELATIONS[relation]} a {second}"
        # The positions of the boxes match the relation in the caption.
        gaps = {"left of": box2[0] - box[2], "right of": box[0] - box2[2]}
        gaps |= {"above": box2[1] - box[3], "below": box[1] - box2[3]}
        assert max(gaps, key=lambda name: gaps[name]) == RELATIONS[relation]
        # Only pixels in the boxes are saturated, and each box contains its colour.
        outside = np.ptp(scene.image.astype(int), axis=2)
        for (x0, y0, x1, y1), index in ((box, color), (box2, color2)):
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
            inside = scene.image[y0:y1, x0:x1].reshape(-1, 3).astype(int)
            vivid = np.median(inside[np.ptp(inside, axis=1) > 80], axis=0)
            palette = np.array(list(COLORS.values()))
            assert np.linalg.norm(palette - vivid, axis=1).argmin() == index
            outside[y0:y1, x0:x1] = 0
        assert outside.max() < 80


def test_a_scene_without_an_object_is_otherwise_the_same() -> None:
    whole = draw_pair(7)
    for shown in ((False, True), (True, False), (False, False)):
        scene = draw_pair(7, shown=shown)
        changed = (scene.image != whole.image).any(2)
        for (x0, y0, x1, y1), seen in zip((box for _, box in whole.phrases), shown, strict=True):
            assert changed[y0:y1, x0:x1].mean() == 0 if seen else changed[y0:y1, x0:x1].mean() > 0.3
            changed[max(y0 - 6, 0) : y1 + 6, max(x0 - 6, 0) : x1 + 6] = False  # with its soft shadow
        assert not changed.any()


def test_phrases_hold_of_shown_objects_only() -> None:
    """Checks every phrase on a scene of a red circle and a blue star, for each set of shown objects."""
    (red, blue), (circle, star) = map(list(COLORS).index, ("red", "blue")), map(SHAPES.index, ("circle", "star"))
    true = {"a red circle", "a red", "a circle"}, {"a blue star", "a blue", "a star"}
    said = torch.cartesian_prod(torch.arange(len(COLORS) + 1), torch.arange(len(SHAPES) + 1))[:-1]
    facts = torch.tensor([[red, circle, 0, blue, star]])
    for shown in itertools.product((True, False), repeat=2):
        wanted = set().union(*itertools.compress(true, shown))
        found = holds(said[None], facts, torch.tensor([shown]))[0]
        assert {phrase(*row) for row in said[found].tolist()} == wanted


def test_weights_are_small() -> None:
    assert pair.WEIGHTS.stat().st_size <= 5_000_000


def test_words_point_at_what_they_name(pointing: Pointing) -> None:
    assert pointing.shares[f"gradcam {pair.LAYER}"] >= 0.88
    assert pointing.shares[f"attention mean {pair.LAYER}"] >= 0.88
    assert pointing.shares["random"] < 0.2
    assert 0.04 < pointing.shares["area"] < 0.15
    assert all(maps.shape == (64, 2, 12, 12) for maps in pointing.maps.values())
    assert "of 128 phrases" in str(pointing)


def test_the_pair_knows_what_belongs_to_what(pointing: Pointing) -> None:
    """Captions with exchanged colours or shapes are refused; true captions are accepted."""
    model = pair.demo_albef()
    images = pair.prepare([scene.image for scene in pointing.scenes])
    facts = [scene.facts for scene in pointing.scenes]
    captions = [scene.caption for scene in pointing.scenes]
    colors = [describe((c2, s, relation, c, s2)) for c, s, relation, c2, s2 in facts]
    shapes = [describe((c, s2, relation, c2, s)) for c, s, relation, c2, s2 in facts]
    assert model.tokenizer is not None
    for texts, answer in ((captions, 1), (colors, 0), (shapes, 0)):
        said = [model.tokenizer(text).ids for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in said], batch_first=True)
        with torch.no_grad():
            answers = model(images, ids, ids != model.tokenizer.id_of("[PAD]")).argmax(1)
        assert (answers == answer).double().mean() >= 0.85


def test_the_sheet_has_a_row_for_every_scene(pointing: Pointing) -> None:
    one, two = words_sheet(pointing, 1), words_sheet(pointing, 2)
    assert one.width > 5 * 224
    assert 224 < one.height < two.height


@pytest.mark.long
def test_training_writes_weights(tmp_path: Path) -> None:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # with two threads the order of sums varies
    few = "--steps 3 --scenes 60 --batch-size 8 --held-out 4"
    runs = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for out in runs:
        command = [sys.executable, "-m", "attnx.demo.training.albef", "--out", str(out), *few.split()]
        told = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True).stdout
        assert "3/3" in told
        assert "gradcam 2" in told
    assert runs[0].read_bytes() == runs[1].read_bytes()
