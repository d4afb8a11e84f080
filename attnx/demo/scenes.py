"""Drawn scenes for the demo: one coloured shape among grey shapes on a textured ground."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 52, 50),
    "green": (52, 158, 72),
    "blue": (46, 98, 212),
    "yellow": (238, 194, 40),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
CLASSES: tuple[str, ...] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

_SUPERSAMPLE = 4
# Circumradius per unit of nominal side, chosen so that all shapes look about equally large.
_RADIUS = {"circle": 0.50, "square": 0.60, "triangle": 0.62, "star": 0.62}
REACH = max(_RADIUS.values())
_TARGET_SIDE = (19.0, 27.5)
_GREY_SIDE = (14.0, 27.0)
_GREY_COUNT = (3, 6)
_NOISE_CELLS = (3, 6, 12, 24, 48)
# Radians from upright. Less than half the symmetry angle of a square, so that it never looks like a diamond.
_TILT = 0.4


@dataclass(frozen=True)
class Scene:
    """A drawn picture and what is in it.

    image: uint8 array [H, W, 3], RGB.
    box: (x0, y0, x1, y1) around the target, half-open, in pixels.
    label: index into ``CLASSES``.
    """

    image: np.ndarray
    box: tuple[int, int, int, int]
    label: int


def draw_scene(seed: int, size: int = 96) -> Scene:
    """Draw the scene of ``seed``: the same seed always gives the same scene.

    seed: a non-negative integer.
    size: height and width of the picture in pixels; everything in it scales along.
    """
    rng = np.random.default_rng(seed)
    scale = size / 96.0
    label = int(rng.integers(len(CLASSES)))
    color, shape = divmod(label, len(SHAPES))
    side = between(rng, *_TARGET_SIDE) * scale
    # Two pixels of ground stay around the target, so that no target is cut off.
    margin = REACH * side + 2.0 * scale
    center = (between(rng, margin, size - margin), between(rng, margin, size - margin))

    canvas = ground(rng, size)
    placed = [(*center, REACH * side)]
    draw_grey(canvas, rng, placed, _GREY_COUNT, _GREY_SIDE, scale)
    box = paint(canvas, rng, SHAPES[shape], center, side, tinted(rng, color), scale)
    return Scene(image=pixels(canvas), box=box, label=label)


def draw_grey(
    canvas: np.ndarray,
    rng: np.random.Generator,
    placed: list[tuple[float, float, float]],
    count: tuple[int, int],
    side: tuple[float, float],
    scale: float,
) -> None:
    """Paint grey shapes into ``canvas`` [H, W, 3] in place, where they touch nothing in ``placed``.

    placed: (x, y, radius) of what is there already; what is painted is added.
    count, side: the least and the most of them; of their sides in pixels, before ``scale``.
    """
    for _ in range(int(rng.integers(count[0], count[1] + 1))):
        spot = _free_spot(rng, placed, len(canvas), between(rng, *side) * scale)
        if spot is None:
            continue
        placed.append((spot[0], spot[1], REACH * spot[2]))
        grey = np.full(3, between(rng, 0.2, 0.9), dtype=np.float32)
        grey_shape = SHAPES[int(rng.integers(len(SHAPES)))]
        paint(canvas, rng, grey_shape, spot[:2], spot[2], grey, scale)


def tinted(rng: np.random.Generator, color: int) -> np.ndarray:
    """One of ``COLORS`` by its index, a little lighter or darker and tinted: float32 [3], about 0 to 1."""
    base = np.array(list(COLORS.values())[color], dtype=np.float32) / 255.0
    return base * between(rng, 0.85, 1.1) + 0.08 * (rng.random(3).astype(np.float32) - 0.5)


def pixels(canvas: np.ndarray) -> np.ndarray:
    """Float32 [H, W, 3], 0 to 1, as uint8."""
    rounded: np.ndarray = (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return rounded


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """A number from ``low`` to ``high``."""
    # Only random() and integers() are drawn from: their streams do not change between numpy versions.
    return low + (high - low) * float(rng.random())


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cloudy, grainy, nearly grey background: float32 [size, size, 3], about 0.2 to 0.8."""
    roughness = between(rng, 0.45, 0.85)
    texture = np.zeros((size, size), dtype=np.float32)
    for octave, cells in enumerate(_NOISE_CELLS):
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32) - np.float32(0.5))
        layer = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        texture += np.float32(roughness**octave) * layer
    texture *= np.float32(between(rng, 0.12, 0.30))
    grain = (rng.random((size, size)).astype(np.float32) - np.float32(0.5)) * np.float32(0.05)
    level = between(rng, 0.35, 0.7)
    tint = 1.0 + 0.12 * (rng.random(3).astype(np.float32) - 0.5)
    return (level + texture + grain)[:, :, None] * tint.astype(np.float32)


def _free_spot(
    rng: np.random.Generator, placed: list[tuple[float, float, float]], size: int, side: float
) -> tuple[float, float, float] | None:
    """A place (x, y, side) that touches nothing in ``placed`` ((x, y, radius) each), or None."""
    radius = REACH * side
    for _ in range(12):
        x, y = between(rng, 0.0, size), between(rng, 0.0, size)
        if all(math.hypot(x - px, y - py) > radius + pr for px, py, pr in placed):
            return x, y, side
    return None


def _outline(shape: str, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners (x, y) of a shape around the origin, in the unit of ``radius``; upright at ``angle`` 0."""
    if shape == "star":
        corners, radii = 10, (radius, 0.45 * radius)
    else:
        corners, radii = {"circle": 48, "square": 4, "triangle": 3}[shape], (radius, radius)
    first = angle - math.pi / (4.0 if shape == "square" else 2.0)
    turns = [first + 2.0 * math.pi * i / corners for i in range(corners)]
    return [(radii[i % 2] * math.cos(t), radii[i % 2] * math.sin(t)) for i, t in enumerate(turns)]


def paint(
    canvas: np.ndarray,
    rng: np.random.Generator,
    shape: str,
    center: tuple[float, float],
    side: float,
    color: np.ndarray,
    scale: float,
) -> tuple[int, int, int, int]:
    """Paint a shaded shape with a soft shadow into ``canvas`` in place; return its box.

    canvas: float32 [H, W, 3]; center and side in pixels; color: float32 [3].
    The box is half-open and cut at the canvas.
    """
    radius = _RADIUS[shape] * side
    half = math.ceil(radius + 5.0 * scale)
    left, top = math.floor(center[0]) - half, math.floor(center[1]) - half
    width = 2 * half + 1
    points = _outline(shape, radius, between(rng, -_TILT, _TILT))
    origin = (center[0] - left, center[1] - top)
    large = Image.new("L", (width * _SUPERSAMPLE, width * _SUPERSAMPLE))
    ImageDraw.Draw(large).polygon(
        [((x + origin[0]) * _SUPERSAMPLE, (y + origin[1]) * _SUPERSAMPLE) for x, y in points], fill=255
    )
    mask = large.reduce(_SUPERSAMPLE)
    cover = np.asarray(mask, dtype=np.float32) / 255.0
    shadow = np.asarray(mask.filter(ImageFilter.GaussianBlur(1.6 * scale)), dtype=np.float32) / 255.0
    drop = max(1, round(1.2 * scale))
    shadow = np.roll(shadow, (drop, drop), axis=(0, 1))

    ramp = np.linspace(1.12, 0.88, width, dtype=np.float32)
    shaded = (0.5 * (ramp[:, None] + ramp[None, :]))[:, :, None] * color
    height_px, width_px = canvas.shape[:2]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, width_px), min(top + width, height_px)
    inner = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    view = canvas[y0:y1, x0:x1]
    view *= 1.0 - 0.4 * shadow[inner][:, :, None]
    view += cover[inner][:, :, None] * (shaded[inner] - view)

    solid = cover[inner] >= 0.25
    columns, rows = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    if len(columns) == 0:
        return (0, 0, 0, 0)
    return (x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1)
