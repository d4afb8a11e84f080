"""Maps at the size of their picture."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnx


@pytest.fixture
def maps() -> Tensor:
    return torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_the_whole_picture(maps: Tensor, mode: str) -> None:
    spelt = {"mode": "nearest-exact"} if mode == "nearest" else {"mode": mode, "align_corners": False}
    want = F.interpolate(maps, size=(33, 41), **spelt)
    torch.testing.assert_close(attnx.resize(maps, (33, 41), mode=mode), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attnx.resize(maps, (33, 41), crop=(0, 0, 41, 33), mode=mode), want, rtol=1e-5, atol=1e-5)
    array = attnx.resize(maps.numpy(), (33, 41), mode=mode)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, want.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_crop_of_whole_pixels_is_the_resized_map_at_its_place(maps: Tensor, mode: str) -> None:
    found = attnx.resize(maps, (40, 60), crop=(10, 5, 45, 30), mode=mode)
    inside = attnx.resize(maps, (25, 35), mode=mode)
    torch.testing.assert_close(found[..., 5:30, 10:45], inside, rtol=1e-5, atol=1e-5)
    outside = found.clone()
    outside[..., 5:30, 10:45] = 0
    assert not outside.any()


def test_a_crop_beyond_the_picture_and_between_pixels(maps: Tensor) -> None:
    # timm's "border" crops reach beyond the picture; crops of resized pictures have fractions of pixels.
    found = attnx.resize(maps, (10, 10), crop=(-3.5, 2.25, 13.5, 9.75), mode="nearest")
    down = [int((y + 0.5 - 2.25) / 7.5 * 5) for y in range(10) if 2.25 <= y + 0.5 < 9.75]
    across = [int((x + 0.5 + 3.5) / 17 * 7) for x in range(10)]
    torch.testing.assert_close(found[..., 2:10, :], maps[..., down, :][..., across])
    assert not found[..., :2, :].any()
    assert not attnx.resize(maps, (10, 10), crop=(20, 20, 30, 30)).any()


def test_normalised_maps(maps: Tensor) -> None:
    crop = (10, 5, 45, 30)
    total = attnx.resize(maps, (40, 60), crop, "sum")
    torch.testing.assert_close(total.sum((-2, -1)), torch.ones(2, 3))
    most = attnx.resize(maps, (40, 60), crop, "max")
    torch.testing.assert_close(most.amax((-2, -1)), torch.ones(2, 3))
    assert (most[..., 5:30, 10:45] > 0).all()
    stretched = attnx.resize(maps, (40, 60), crop, "minmax")[..., 5:30, 10:45]
    torch.testing.assert_close(stretched.amin((-2, -1)), torch.zeros(2, 3))
    torch.testing.assert_close(stretched.amax((-2, -1)), torch.ones(2, 3))
    for how in ("max", "sum", "minmax"):
        assert not attnx.resize(torch.zeros(2, 2), (4, 4), normalize=how).any()
    assert not attnx.resize(torch.full((3, 3), 0.7), (50, 50), normalize="minmax").any()


def test_broken_and_negative_maps() -> None:
    for how in ("max", "sum", "minmax"):
        assert attnx.resize(torch.tensor([[float("nan"), 1], [2, 3]]), (2, 2), normalize=how).isnan().any()
    found = attnx.resize(torch.tensor([[-1e7, 1.0], [3.0, 0.0]]), (2, 2), normalize="max")
    torch.testing.assert_close(found, torch.tensor([[0, 1 / 3], [1, 0]]))
    found = attnx.resize(torch.tensor([[-1.0, 1.0], [3.0, 0.0]]), (2, 2), normalize="sum")
    torch.testing.assert_close(found, torch.tensor([[0, 0.25], [0.75, 0]]))


def test_arrays_of_any_kind() -> None:
    maps = np.eye(2, dtype=">f4")
    maps.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(attnx.resize(maps, (2, 2)), np.eye(2))
        np.testing.assert_array_equal(attnx.resize(maps.astype(np.longdouble), (2, 2)), np.eye(2))


def test_dtypes() -> None:
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64):
        found = attnx.resize(torch.eye(2).to(dtype), (4, 4), mode="nearest")
        assert found.dtype == torch.float32
        assert found.sum() == 8


def test_wrong_arguments_are_named(maps: Tensor) -> None:
    for arguments, message in (
        (((0, 5),), r"size: expected \(height, width\) in pixels"),
        ((4,), "size: expected"),
        (((4, 4), (3, 0, 3, 4)), "crop: expected .left, top, right, bottom. with left < right"),
        (((4, 4), (0, 0, float("nan"), 4)), "crop: expected"),
        (((4, 4), 3), "crop: expected"),
        (((4, 4), None, "mean"), "normalize: expected None, 'max', 'sum' or 'minmax'; got 'mean'"),
        (((4, 4), None, None, "area"), "mode: expected one of bilinear, nearest; got 'area'"),
    ):
        with pytest.raises(ValueError, match=message):
            attnx.resize(maps, *arguments)
    for wrong in (
        torch.zeros(3),
        np.array([["a"]]),
        torch.zeros(0, 3),
        "maps",
        torch.zeros(2, 2, dtype=torch.complex64),
    ):
        with pytest.raises(ValueError, match="maps: expected a real tensor or array"):
            attnx.resize(wrong, (4, 4))
