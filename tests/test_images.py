"""Unusual and broken image files, written by the tests."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps

from attnx.images import IMAGE_SUFFIXES, ImageError, find_images, read_image, read_scaled, to_tensor

RED, BLUE = (255, 0, 0), (0, 0, 255)
ORIENTATION = 0x0112


def noise(height=48, width=64, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def halves(mode="RGB"):
    """64 x 32: left half red, right half blue."""
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    return image.convert(mode)


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


def near(pixel, colour, tolerance=12):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    halves().convert("L" if suffix == ".pgm" else "RGB").save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (64, 32))
    if suffix != ".pgm":
        assert near(image.getpixel((8, 8)), RED, 40)
        assert near(image.getpixel((56, 8)), BLUE, 40)


def test_cmyk_jpeg(tmp_path):
    halves("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert mode_of(tmp_path / "x.jpg") == "CMYK"
    image = read_image(tmp_path / "x.jpg")
    assert image.mode == "RGB"
    assert near(image.getpixel((8, 8)), RED)
    assert near(image.getpixel((56, 8)), BLUE)


def test_alpha_is_dropped_not_blended(tmp_path):
    pixels = noise(channels=4)
    pixels[:24, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "rgba.png")), pixels[..., :3])

    Image.fromarray(pixels[..., 2:]).save(tmp_path / "la.png")
    assert mode_of(tmp_path / "la.png") == "LA"
    expected = np.repeat(pixels[..., 2:3], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "la.png")), expected)


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128])])
def test_palette(tmp_path, transparency, recwarn):
    image = Image.new("P", (64, 32))
    image.putpalette([*RED, *BLUE])
    image.paste(1, (32, 0, 64, 32))
    image.save(tmp_path / "x.png", **({} if transparency is None else {"transparency": transparency}))
    result = read_image(tmp_path / "x.png")
    assert (result.mode, result.getpixel((0, 0)), result.getpixel((63, 0))) == ("RGB", RED, BLUE)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(tmp_path, mode):
    image = Image.new(mode, (4, 2), 0)
    image.paste(255, (2, 0, 4, 2))
    image.save(tmp_path / "x.png")
    result = read_image(tmp_path / "x.png")
    assert (result.mode, result.getpixel((0, 0)), result.getpixel((3, 0))) == ("RGB", (0,) * 3, (255,) * 3)


@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [
        ("x.png", "<u2", "I;16"),
        ("x.tif", "<u2", "I;16"),
        ("x.tif", ">u2", "I;16B"),
        ("x.tif", "<i4", "I"),
        ("x.pgm", "<i4", "I"),
    ],
)
def test_16_bit_grey_keeps_its_gradient(tmp_path, name, dtype, mode):
    grey = np.linspace(0, 65535, 512).round().astype(dtype).reshape(2, 256)
    Image.fromarray(grey).save(tmp_path / name)
    assert mode_of(tmp_path / name) == mode
    result = np.asarray(read_image(tmp_path / name))
    expected = np.rint(grey.astype(np.float64) / 257).astype(np.uint8)
    np.testing.assert_array_equal(result, np.repeat(expected[..., None], 3, axis=2))
    assert (result[0, 0, 0], result[-1, -1, 0], len(np.unique(result))) == (0, 255, 256)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
@pytest.mark.parametrize("strip", [1, 1000, 64 * 7, 2**20])
def test_16_bit_grey_is_the_same_in_any_strips(tmp_path, dtype, strip, monkeypatch):
    monkeypatch.setattr("attnx.images.reading._STRIP_PIXELS", strip)
    grey = np.random.default_rng(0).permutation(65536).astype(dtype).reshape(1024, 64)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    expected = ((grey.astype(np.int64) + 128) // 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.tif"))[..., 0], expected)


@pytest.mark.parametrize(
    ("pixels", "cause"),
    [
        (np.full((4, 4), -1, np.int32), "-1"),
        (np.full((4, 4), 70000, np.int32), "70000"),
        (np.full((4, 4), 0.5, np.float32), "float"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, pixels, cause):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=cause) as caught:
        read_image(tmp_path / "x.tif")
    assert str(tmp_path / "x.tif") in str(caught.value)


def test_exif_rotated_jpeg(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    halves().save(tmp_path / "x.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "x.jpg")
    # A quarter turn clockwise moves the left side to the top.
    assert image.size == (32, 64)
    assert near(image.getpixel((0, 0)), RED)
    assert near(image.getpixel((31, 0)), RED)
    assert near(image.getpixel((0, 63)), BLUE)
    assert ImageOps.exif_transpose(image).tobytes() == image.tobytes(), "would be turned a second time"


@pytest.mark.parametrize("orientation", [0, *range(1, 10)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(noise()).save(tmp_path / f"x.{suffix}", exif=exif)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        expected = ImageOps.exif_transpose(image)
    result = read_image(tmp_path / f"x.{suffix}")
    assert result.size == ((48, 64) if 5 <= orientation <= 8 else (64, 48))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"II*\0nonsense" + bytes(range(64)), b"no header of any kind"])
def test_broken_exif_does_not_cost_the_pixels(tmp_path, exif):
    Image.fromarray(noise()).save(tmp_path / "x.png", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png")), noise())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise()).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is not None
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "content", [b"", b"this is a text file\n" * 9, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"P6\n0 0\n255\n"]
)
def test_not_an_image(tmp_path, content):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path, cause in [(tmp_path / "missing.png", "FileNotFound"), (tmp_path, "regular file")]:
        with pytest.raises(ImageError, match=cause):
            read_image(path)


@pytest.mark.timeout(20)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "inner.jpg").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        names = ["device.jpg", "folder.jpg/inner.jpg", "pipe.jpg", "socket.jpg"]
        assert [path.as_posix() for path in find_images(Path())] == names
        for name in ("device.jpg", "folder.jpg", "pipe.jpg", "socket.jpg"):
            with pytest.raises(ImageError, match=rf"^{name}: can't be read as an image: OSError"):
                read_image(name)


def test_a_decoders_message_is_cut(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("long " * 1000)

    monkeypatch.setattr(Image, "open", fail)
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError, match=r"…$") as caught:
        read_image(tmp_path / "x.png")
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def photo(width=320, height=240, **options):
    """A JPEG's bytes: red grows to the right, green downwards."""
    down, across = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([across * 255 // width, down * 255 // height, 0 * down], -1).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("most", "scale"), [(76800, 1), (76799, 2), (19200, 2), (19199, 4), (1200, 8)])
def test_a_large_jpeg_is_reduced(most, scale, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = photo(exif=exif)
    picture, size = read_scaled("x.jpg", io.BytesIO(content), most)
    full = read_image("x.jpg", io.BytesIO(content))
    assert (size, picture.mode, picture.info) == (full.size, "RGB", {})
    assert picture.size == (full.width // scale, full.height // scale)
    smaller = np.asarray(full.reduce(scale) if scale > 1 else full).astype(int)
    assert np.abs(np.asarray(picture) - smaller).max() <= (0 if scale == 1 else 6)
    if scale > 1:
        with pytest.raises(ImageError, match="320 x 240"):
            read_image("x.jpg", io.BytesIO(content), most)


def test_what_is_too_large_for_any_scale():
    content, progressive = photo(), photo(progressive=True)
    assert read_scaled("x.jpg", io.BytesIO(progressive), 38400)[0].size == (160, 120)
    png = io.BytesIO()
    halves().save(png, "PNG")
    for data, most in [(content, 1199), (progressive, 38399), (png.getvalue(), 64 * 32 - 1)]:
        with pytest.raises(ImageError, match=f"expected at most {most:,} pixels"):
            read_scaled("x", io.BytesIO(data), most)


def test_postscript_under_an_image_name_is_not_run(tmp_path, monkeypatch):
    halves().save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(ImageError, match="cannot identify"):
        read_image(tmp_path / "x.jpg")


def test_decompression_bomb(tmp_path, monkeypatch):
    halves().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 32 // 2 - 1)
    with pytest.raises(ImageError, match="DecompressionBombError"):
        read_image(tmp_path / "x.png")


def test_find_images(tmp_path):
    wanted = ["B.JPG", "a-b/1.png", "a/2.jpeg", "a/b/3.webp", "a/é.tiff", "z.png"]
    skipped = ["notes.txt", ".hidden.png", ".cache/4.png", "a/.b/5.png", "jpg", "a/6.png.bak"]
    for name in wanted + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == sorted(wanted)
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_find_images_inside_a_hidden_folder(tmp_path):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "1.png").touch()
    assert find_images(tmp_path / ".data") == [tmp_path / ".data" / "1.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_find_images_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "a" / "up").symlink_to(tmp_path / "source")
    (tmp_path / "source" / "self.png").symlink_to("self.png")
    # The last one is a file that can't be read.
    names = ["link/1.png", "self.png"]
    assert find_images(tmp_path / "source") == [tmp_path / "source" / name for name in names]


def test_what_a_job_wrote_is_no_source(tmp_path):
    for name in ("photo.png", "maps/summary/mean.png", "maps/run.json", "maps/manifest.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "photo.png"]


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "1.png").touch()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        find_images(tmp_path)


def test_find_images_says_what_it_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    for source, kind in [(tmp_path / "missing", FileNotFoundError), (tmp_path, ValueError)]:
        with pytest.raises(kind, match=r"\.jpeg.*\.png") as caught:
            find_images(source)
        assert str(source) in str(caught.value)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_to_tensor(interpolation):
    image, mean, std = Image.fromarray(noise()), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = to_tensor(image, (24, 40), mean, std, interpolation)
    assert (result.shape, result.dtype, result.is_contiguous()) == ((3, 24, 40), torch.float32, True)
    resized = image.resize((40, 24), Image.Resampling[interpolation.upper()])
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_to_tensor_sees_every_corner():
    image = Image.new("RGB", (200, 100))
    for corner in [(0, 0), (190, 0), (0, 90), (190, 90)]:
        image.paste((255, 255, 255), (*corner, corner[0] + 10, corner[1] + 10))
    small = to_tensor(image, (20, 20), (0, 0, 0), (1, 1, 1))
    assert all(small[:, y, x].min() > 0.4 for y in (0, -1) for x in (0, -1))
    assert small[:, 5:15, 5:15].max() == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"size": (0, 4)}, "size"),
        ({"size": (4,)}, "size"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (1, 1, 0)}, "std"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"image": Image.new("L", (4, 4))}, "image"),
    ],
)
def test_to_tensor_refuses(change, name):
    right = {"image": Image.new("RGB", (4, 4)), "size": (4, 4), "mean": (0, 0, 0), "std": (1, 1, 1)}
    with pytest.raises(ValueError, match=f"^{name}: expected .* got"):
        to_tensor(**(right | change))


def test_a_pnm_with_an_endless_comment_is_refused(tmp_path: Path) -> None:
    """Pillow reads it byte by byte."""
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6\n#" + b"x" * 2**20 + b"\n2 2\n255\n" + bytes(12))
    with pytest.raises(ImageError, match="expected a header of at most 65,536 bytes"):
        read_image(path)
    path.write_bytes(b"P6\n#" + b"x" * 1000 + b"\n200 200\n255\n" + bytes(120_000))
    assert read_image(path).size == (200, 200)
    path.write_bytes(b"P4\n800 800\n" + bytes(80_000))
    assert read_image(path).size == (800, 800)
