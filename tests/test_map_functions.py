"""Functions of single maps: tensors and numpy arrays, and attention maps passed as pictures."""

import warnings

import numpy as np
import pytest
import torch

import attnx

rng = np.random.default_rng(0)
MAPS = rng.random((4, 5, 7)).astype(np.float16)
BOXES = np.array([[0, 0, 70, 50], [0, 0, 1, 1], [10, 10, 60, 40], [35, 0, 70, 50]])


def flipped(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


KINDS = {
    "float16": lambda a: a,
    "float32": lambda a: a.astype(np.float32),
    "float64": lambda a: a.astype(np.float64),
    "big endian": lambda a: a.astype(">f4"),
    "flipped": flipped,
    "read-only": read_only,
    "float16 tensor": torch.from_numpy,
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_give_what_tensors_give(kind):
    maps, exact = KINDS[kind](MAPS), torch.from_numpy(MAPS.astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks, values = attnx.mass_mask(maps, 0.6), attnx.entropy(maps)
        hits = attnx.pointing_game(maps, BOXES, (50, 70))
        levels = attnx.entropy_levels(KINDS[kind](MAPS[:, 0, 0]), 2)
    assert torch.equal(masks, attnx.mass_mask(exact, 0.6))
    torch.testing.assert_close(values, attnx.entropy(exact))
    assert torch.equal(hits, attnx.pointing_game(exact, torch.from_numpy(BOXES), (50, 70)))
    assert torch.equal(levels, attnx.entropy_levels(exact[:, 0, 0], 2))


def test_integers_and_boxes_of_any_dtype():
    counts = (MAPS * 100).astype(np.uint16)
    assert torch.equal(attnx.mass_mask(counts), attnx.mass_mask(torch.from_numpy(counts.astype(np.float32))))
    wanted = attnx.pointing_game(MAPS, BOXES, (50, 70))
    for dtype in (np.uint8, np.uint32, np.int16, np.float32):
        assert torch.equal(attnx.pointing_game(MAPS, BOXES.astype(dtype), (50, 70)), wanted)


@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_many_patches_in_half_precision(make):
    # In half precision, a running sum of so many values stops growing.
    maps = make((64, 128), dtype=np.float16 if make is np.ones else torch.float16)
    assert attnx.mass_mask(maps, 0.25).sum() == pytest.approx(2048, abs=1)


WRONG = {
    "a list": ([[0.5, 0.5]], "got list"),
    "None": (None, "got NoneType"),
    "text": (np.array([["a"]]), r"got <U1 \[1, 1\]"),
    "objects": (np.array([[None]]), r"got object \[1, 1\]"),
    "complex": (np.ones((2, 3), np.complex64), r"got complex64 \[2, 3\]"),
    "a complex tensor": (torch.ones(2, 3, dtype=torch.complex64), r"got complex64 \[2, 3\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_said(name):
    value, got = WRONG[name]
    for call in (
        lambda: attnx.mass_mask(value),
        lambda: attnx.entropy(value),
        lambda: attnx.pointing_game(value, BOXES, (50, 70)),
    ):
        with pytest.raises(ValueError, match=f"maps: expected a real tensor or numpy array .*{got}"):
            call()
    with pytest.raises(ValueError, match=f"values: expected a real tensor or numpy array .*{got}"):
        attnx.entropy_levels(value)
    with pytest.raises(ValueError, match=f"boxes: expected a real tensor or numpy array .*{got}"):
        attnx.pointing_game(MAPS, value, (50, 70))


@pytest.mark.parametrize("call", [attnx.mass_mask, attnx.entropy])
def test_a_row_of_numbers_is_no_picture(call):
    with pytest.raises(ValueError, match=r"maps: expected .* \[\.\.\., h, w\]; got float32 \[3\]"):
        call(torch.ones(3))


@pytest.mark.parametrize("call", [attnx.mass_mask, attnx.entropy])
@pytest.mark.parametrize("shape", [(5, 5), (2, 17, 17), (2, 3, 10, 10)])
def test_attention_maps_are_not_taken_for_pictures_in_silence(call, shape):
    maps = torch.randn(shape).softmax(-1)
    for given in (maps, maps.half(), maps.numpy()):
        with pytest.warns(UserWarning, match=r"like attention maps \[N, N\] instead of maps over patches") as told:
            call(given)
        message = str(told[0].message)
        assert "layout.patches(trace[layer][:, 0])" in message
        assert "attnx.cls_map" in message
        assert "torch.special.entr(maps).sum(-1)" in message
        assert told[0].filename == __file__


@pytest.mark.parametrize("call", [attnx.mass_mask, attnx.entropy])
def test_pictures_are_taken_without_a_word(call):
    rows = torch.randn(2, 6, 6).softmax(-1)
    rows[1, 3] *= 1.01
    shares = torch.randn(2, 36).softmax(-1).view(2, 6, 6)
    wide = torch.randn(2, 4, 6).softmax(-1)
    pictures = [torch.rand(2, 6, 6), shares, rows, wide, torch.ones(2, 1, 1), torch.zeros(0, 6, 6), torch.ones(6, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for maps in pictures:
            call(maps)
