"""Pictures of every kind become upright RGB, and squares are pasted into them with a measured seam."""

import numpy as np
import pytest
from PIL import Image

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media.crop import Crop, View
from keysync_jax.media.pasting import RING, Paster
from keysync_jax.media.still import read_picture


def scene(width=40, height=24):
    """Red to the right, green downwards, blue in the upper left corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    rgb[:8, :8, 2] = 255
    return rgb


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".avif"])
def test_formats_that_pillow_reads(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(scene()).save(path, **({"lossless": True} if suffix == ".webp" else {"quality": 100} if suffix == ".avif" else {}))
    picture = read_picture(path)
    assert np.abs(picture.rgb.astype(int) - scene()).mean() < (6 if suffix == ".avif" else 0.01) and picture.notes == ()


def test_rotation_transparency_and_colour_models(tmp_path):
    image = Image.fromarray(scene())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png")
    np.testing.assert_array_equal(turned.rgb, scene())
    assert any("EXIF" in note for note in turned.notes)

    layer = image.convert("RGBA")
    layer.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 20, axis=1).repeat(24, axis=0)))
    layer.save(tmp_path / "alpha.png")
    laid = read_picture(tmp_path / "alpha.png")
    assert (laid.rgb[:, :20] == 128).all() and (laid.rgb[:, 20:] == scene()[:, 20:]).all() and "transparency" in laid.notes[0]

    image.convert("L").save(tmp_path / "grey.png")
    grey = read_picture(tmp_path / "grey.png")
    assert grey.rgb.shape == (24, 40, 3) and (grey.rgb[..., 0] == grey.rgb[..., 2]).all() and "grey" in grey.notes[0]
    image.convert("CMYK").save(tmp_path / "print.tif")
    assert np.abs(read_picture(tmp_path / "print.tif").rgb.astype(int) - scene()).mean() < 2
    deep = (np.arange(24 * 40).reshape(24, 40) * 60).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png").rgb[..., 1], np.rint(deep / 257).astype(np.uint8))
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[image.rotate(180)])
    assert "holds 2 pictures" in read_picture(tmp_path / "moving.gif").notes[0]


def test_a_moment_of_a_video(talker):
    clip = talker / "clip.mp4"
    first, later = read_picture(clip), read_picture(clip, at=0.5)
    assert first.rgb.shape == later.rgb.shape == (512, 512, 3) and (first.rgb != later.rgb).any()
    assert later.notes == (f"the frame at 0.48 s of {clip}",)
    with pytest.raises(UsageError, match="lies behind the end"):
        read_picture(clip, at=5)


def test_what_cannot_be_read_is_said_in_a_line(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "words.txt").write_text("no picture")
    for name, error, message in (
        ("phone.heic", KeySyncError, "HEIC picture.*heif-convert"),
        ("cut.png", KeySyncError, "cut.png"),
        ("words.txt", KeySyncError, "words.txt"),
        ("none.png", KeySyncError, "none.png does not exist"),
        (".", KeySyncError, "is a folder"),
    ):
        with pytest.raises(error, match=message) as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--at is for videos"):
        read_picture(tmp_path / "a.png", at=1.0)


@pytest.mark.parametrize("size", [16, 48])
def test_what_was_cut_out_is_pasted_where_it_was(size):
    rng = np.random.default_rng(0)
    picture = np.clip(scene(80, 60).astype(int) // 2 + rng.integers(0, 5, (60, 80, 3)), 0, 255).astype(np.uint8)
    crop = Crop(20, 10, 32)
    smooth = picture[10:42, 20:52].astype(np.float32) / 255
    square = np.asarray(Image.fromarray(picture[10:42, 20:52]).resize((size, size), Image.Resampling.BOX), np.float32) / 255
    paste = Paster(picture, crop, size)
    out = paste(square)
    assert out.shape == picture.shape and (out[:10] == picture[:10]).all() and (out[:, 52:] == picture[:, 52:]).all()
    assert np.abs(out[14:38, 24:48] / 255 - smooth[4:28, 4:28]).mean() < 0.03
    paste(np.ones((size, size, 3), np.float32))
    assert paste.seams[0] < 8 < paste.seams[1] and paste.figures()["largest"] == round(paste.seams[1], 2)
    inner = int(np.ceil(32 * RING)) + 2
    assert (paste(np.ones((size, size, 3), np.float32))[10 + inner : 42 - inner, 20 + inner : 52 - inner] == 255).all()


def test_a_square_that_reaches_beyond_the_picture_or_is_turned():
    picture = np.full((40, 40, 3), 60, np.uint8)
    beyond = Paster(picture, Crop(-10, -10, 30), 30)(np.ones((30, 30, 3), np.float32))
    assert (beyond[:12, :12] == 255).all() and (beyond[21:] == 60).all()
    turned = Paster(picture, View.around((20, 20), 20, 0.7), 20)(np.ones((20, 20, 3), np.float32))
    assert turned[20, 20, 0] == 255 and turned[6, 20, 0] == turned[34, 20, 0] and (turned[0] == 60).all()
    assert np.abs(turned[20, 5:35, 0].astype(int) - turned[19, 5:35, 0][::-1]).max() <= 1  # the same seen from the other side
