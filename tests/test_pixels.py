"""Pixels equal timm's bit for bit, and the crop is the part of the picture that they show."""

import numpy as np
import pytest
import torch
from PIL import Image

from attnx.models.pixels import Pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(640, 480), (480, 640), (224, 224), (101, 333), (30, 17), (500, 375), (1, 1)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize(("size", "interpolation"), [((224, 224), "bicubic"), ((96, 160), "bilinear")])
def test_timms_own_transform(crop_mode: str, crop_pct: float, size: tuple[int, int], interpolation: str) -> None:
    from timm.data import create_transform

    theirs = create_transform(
        (3, *size), is_training=False, interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_pct,
        crop_mode=crop_mode,
    )  # fmt: skip
    ours = Pixels("timm", size, MEAN, STD, interpolation, crop_pct, crop_mode)
    for width, height in SIZES:
        picture = noise(width, height)
        pixels, _ = ours(picture)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (3, *size))
        got = ours.normalise(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]
        assert torch.equal(got, theirs(picture)), (width, height)


@pytest.mark.parametrize(("kind", "crop_mode"), [("timm", "center"), ("timm", "squash"), ("whole", "center")])
@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
def test_the_crop_is_what_is_seen(kind: str, crop_mode: str, size: tuple[int, int]) -> None:
    """The red and green values of the picture are the coordinates."""
    pixels = Pixels(kind, size, MEAN, STD, "bilinear", 0.8, crop_mode)
    for width, height in [(200, 120), (120, 200), (150, 150)]:
        down, across = np.mgrid[:height, :width]
        picture = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
        (red, green, _), (left, top, right, bottom) = pixels(picture)
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9
        for values, low, high in ((red[size[0] // 2], left, right), (green[:, size[1] // 2], top, bottom)):
            step = (high - low) / len(values)
            seen = low + step * (np.arange(len(values)) + 0.5) - 0.5
            np.testing.assert_allclose(values[2:-2].astype(float), seen[2:-2], atol=1.1)


def test_hugging_faces_processor(tmp_path) -> None:
    import transformers

    sides = {"height": 32, "width": 32}
    for name, options, box in [
        ("ViTImageProcessor", {"size": sides}, (0, 0, 80, 60)),
        (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 40}, "crop_size": sides},
            (10 * 80 / 53, 6, 42 * 80 / 53, 54),
        ),
        ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": sides}, (8, 6, 72, 54)),
        ("ViTImageProcessor", {"size": sides, "do_resize": False, "do_center_crop": True}, None),
    ]:
        processor = getattr(transformers, name)(**options)
        processor.save_pretrained(tmp_path / name)
        ours = Pixels("processor", (32, 32), MEAN, STD, "bicubic", processor=str(tmp_path / name))
        picture = noise(80, 60)
        if box is None:
            with pytest.raises(ValueError, match="expected at most"):
                ours(picture, max_pixels=100)
            continue
        pixels, crop = ours(picture)
        want = transformers.AutoImageProcessor.from_pretrained(tmp_path / name)(images=picture, return_tensors="np")
        assert np.array_equal(pixels, np.asarray(want["pixel_values"][0]))
        assert crop == pytest.approx(box)
        with pytest.raises(ValueError, match=r"gives \[3, 32, 32\]; the model takes \[48, 48\]"):
            Pixels("processor", (48, 48), MEAN, STD, "bicubic", processor=str(tmp_path / name))(picture)


def test_what_is_said_of_them() -> None:
    told = Pixels("whole", (8, 8), MEAN, STD, "bicubic").describe()
    assert set(told) == {"kind", "size", "mean", "std", "interpolation"}
    with pytest.raises(ValueError, match="expected timm, whole or processor; got 'crop'"):
        Pixels("crop", (8, 8), MEAN, STD, "bicubic")
    with pytest.raises(ValueError, match="for hf: models"):
        Pixels("processor", (8, 8), MEAN, STD, "bicubic")
