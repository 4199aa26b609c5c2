"""A picture from a file, upright and in RGB: whatever Pillow reads, or the frame of a video at a moment.

EXIF rotation is applied, transparency lies over a plain background, and grey, palette, CMYK and 16-bit pictures become 8-bit RGB.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media import video

_BACKGROUND = (128, 128, 128)  # as light as a face, so that the edge of a cut-out person does not glare
_NOT_PICTURES = ("MPEG",)  # formats that Pillow names and cannot decode
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


class Picture(NamedTuple):
    """A picture and what was done to it.

    Attributes:
      rgb: uint8 `[H, W, 3]`.
      notes: a line for each thing that a person may want to know.
    """

    rgb: np.ndarray
    notes: tuple[str, ...]


def read_picture(path: str | os.PathLike, at: float | None = None) -> Picture:
    """The picture in a file.

    Args:
      path: a picture, or a video.
      at: of a video, the moment in seconds; its first frame by default.

    Raises:
      UsageError: a moment of a picture, or one that a video does not have.
      KeySyncError: no such file, or nothing that can be read; says how to convert it where that is known.
    """
    name = os.fspath(path)
    if at is not None and not at >= 0:
        raise UsageError(f"--at {at} is out of range; give seconds from the start of the video")
    if not os.path.isfile(name):
        raise KeySyncError(f"{name} {'is a folder' if os.path.isdir(name) else 'does not exist'}; give a picture or a video")
    try:
        with Image.open(name) as image:
            if image.format not in _NOT_PICTURES:
                if at is not None:
                    raise UsageError(f"--at is for videos; {name} is a picture ({image.format})")
                return _from_pillow(image, name)
    except UnidentifiedImageError:
        if _is_heif(name):
            raise KeySyncError(
                f"{name} is a HEIC picture, which is not read here; convert it, for example with heif-convert {name} photo.jpg"
            ) from None
    except Image.DecompressionBombError as error:
        raise KeySyncError(f"{name}: {error}; shrink it first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise KeySyncError(f"{name}: the picture cannot be read ({error}); save it anew as .png or .jpg") from None
    return _from_video(name, at)


def _is_heif(name: str) -> bool:
    with open(name, "rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _from_pillow(image: ImageFile.ImageFile, name: str) -> Picture:
    notes = []
    if (count := getattr(image, "n_frames", 1)) > 1:
        notes.append(f"{name} holds {count} pictures; the first one is taken")
    mode = image.mode
    turned = ImageOps.exif_transpose(image)
    if image.getexif().get(0x0112, 1) not in (0, 1):
        notes.append("turned upright as its EXIF data say")
    if mode.startswith(("I;16", "I", "F")):
        values = np.asarray(turned, np.float64)
        top = 65535.0 if mode.startswith("I") else max(1.0, float(values.max(initial=0.0)))
        grey = np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)
        notes.append(f"{mode} values were reduced to 8 bits")
        return Picture(np.repeat(grey[..., None], 3, axis=-1), tuple(notes))
    if turned.has_transparency_data:
        layer = turned.convert("RGBA")
        if np.asarray(layer.getchannel("A")).min() < 255:
            plain = Image.new("RGBA", layer.size, (*_BACKGROUND, 255))
            turned = Image.alpha_composite(plain, layer)
            notes.append("its transparency was laid over a plain grey background")
    if mode in ("CMYK", "YCCK", "L", "LA", "1"):
        notes.append(f"converted from {'CMYK' if mode != 'L' and mode != 'LA' and mode != '1' else 'grey'} to RGB")
    return Picture(np.array(turned.convert("RGB")), tuple(notes))


def _from_video(name: str, at: float | None) -> Picture:
    """The frame that is shown at a moment; of a video that ends before it, nothing."""
    info = video.probe(name)
    moment, shown, when = at or 0.0, None, 0.0
    with video.read(name, info) as reader:
        for frame in reader:
            seconds = float(frame.time - info.start_time)
            if shown is not None and seconds > moment:
                break
            shown, when = frame, seconds
        else:
            length = when + 1 / float(info.average_rate or 25)
            if moment > length:
                raise UsageError(f"--at {at:g} lies behind the end of {name}, which is {length:.2f} s long")
    if shown is None:
        raise KeySyncError(f"{name}: no picture could be decoded")
    return Picture(shown.rgb(), (f"the frame at {when:.2f} s of {name}",))
