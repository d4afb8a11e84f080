"""Drawn scenes with captions: two coloured shapes, their spatial relation, and grey shapes around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnx.demo.scenes import COLORS, REACH, SHAPES, between, draw_grey, ground, paint, pixels, tinted

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
"""The opposite of relation r is r ^ 1."""

Facts = tuple[int, int, int, int, int]
"""Colour and shape of the first object, relation, colour and shape of the second: indices."""
Box = tuple[int, int, int, int]

_SIDE = (23.0, 31.0)
_GREY_SIDE = (10.0, 18.0)
_GREY_COUNT = (1, 3)
# Largest distance of the objects across the relation's axis, as a share of their distance along it.
_SLANT = 0.5


@dataclass(frozen=True)
class CaptionedScene:
    """A drawn picture, a true caption, and the boxes of the objects in the caption.

    image: uint8 array [H, W, 3], RGB.
    phrases: the caption's two noun phrases, in order, each with the box (x0, y0, x1, y1) of its object: half-open, in
    pixels.
    facts: content of the caption as indices; see ``describe``.
    """

    image: np.ndarray
    caption: str
    phrases: tuple[tuple[str, Box], tuple[str, Box]]
    facts: Facts


def name(color: int, shape: int) -> str:
    """An object's noun phrase: "red circle"."""
    return f"{tuple(COLORS)[color]} {SHAPES[shape]}"


def describe(facts: Facts) -> str:
    """The caption of these facts: "a red circle left of a blue square"."""
    first, second = name(*facts[:2]), name(*facts[3:])
    return f"a {first} {RELATIONS[facts[2]]} a {second}"


def draw_pair(seed: int, size: int = 96, shown: tuple[bool, bool] = (True, True)) -> CaptionedScene:
    """Draw the captioned scene of ``seed``: the same seed always gives the same scene.

    The objects differ in colour and in shape, and the relation is plain: across it they are at most half as far apart
    as along it.

    seed: a non-negative integer.
    size: height and width of the picture in pixels; everything in it scales along.
    shown: whether the first and the second object are painted; without one the picture is otherwise the same, and the
    caption no longer true.
    """
    rng = np.random.default_rng(seed)
    scale = size / 96.0
    first = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
    apart = 1 + int(rng.integers(len(COLORS) - 1)), 1 + int(rng.integers(len(SHAPES) - 1))
    second = (first[0] + apart[0]) % len(COLORS), (first[1] + apart[1]) % len(SHAPES)
    relation = int(rng.integers(len(RELATIONS)))
    things = (first, second)
    sides = (between(rng, *_SIDE) * scale, between(rng, *_SIDE) * scale)
    centers = _places(rng, relation, sides, size)

    canvas = ground(rng, size)
    placed = [(*center, REACH * side) for center, side in zip(centers, sides, strict=True)]
    draw_grey(canvas, rng, placed, _GREY_COUNT, _GREY_SIDE, scale)
    boxes = []
    for (color, shape), center, side, seen in zip(things, centers, sides, shown, strict=True):
        onto = canvas if seen else canvas.copy()
        boxes.append(paint(onto, rng, SHAPES[shape], center, side, tinted(rng, color), scale))
    facts = (*things[0], relation, *things[1])
    phrases = ((name(*things[0]), boxes[0]), (name(*things[1]), boxes[1]))
    return CaptionedScene(pixels(canvas), describe(facts), phrases, facts)


def _places(
    rng: np.random.Generator, relation: int, sides: tuple[float, float], size: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres (x, y) of two objects in this relation that do not overlap and lie inside the picture."""
    axis, sign = relation // 2, 1 if relation % 2 == 0 else -1
    # At least two pixels of background around each object.
    margins = [REACH * side + size / 48.0 for side in sides]
    while True:
        first, second = ([between(rng, m, size - m) for _ in range(2)] for m in margins)
        along, across = sign * (second[axis] - first[axis]), abs(second[1 - axis] - first[1 - axis])
        if along >= sum(margins) and across <= _SLANT * along:
            return (first[0], first[1]), (second[0], second[1])
