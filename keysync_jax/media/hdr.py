"""HDR mastering metadata of a picture, and how the encoders take it.

SMPTE ST 2086 says on what display a film was graded, CTA-861.3 how bright its brightest pixel and picture are. Both stand in the
first picture's side data, and in the parameters of x264 and x265 in the same units: chromaticities in steps of 0.00002, luminances in
steps of 0.0001 cd/m².
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import av

_CHROMATICITY, _LUMINANCE = 50_000, 10_000  # steps per unit
_RATIONALS = 10  # of AVMasteringDisplayMetadata: three primaries and white, x and y each; darkest and brightest
_DYNAMIC = {
    "DYNAMIC_HDR_PLUS": "HDR10+",
    "DOVI_METADATA": "Dolby Vision",
    "DOVI_RPU_BUFFER": "Dolby Vision",
    "DYNAMIC_HDR_VIVID": "HDR Vivid",
}


class Mastering(NamedTuple):
    """What is known of the grading.

    Attributes:
      display: `G(x,y)B(x,y)R(x,y)WP(x,y)L(max,min)` in the encoders' steps, "" where the file does not say.
      light_level: `MaxCLL,MaxFALL` in cd/m², "" where the file does not say.
      dynamic: names of metadata that change from picture to picture.
    """

    display: str = ""
    light_level: str = ""
    dynamic: tuple[str, ...] = ()

    def x265_params(self) -> str:
        """The part of `x265-params` that states it, with the colon before it; "" for none."""
        parts = [f"master-display={self.display}"] if self.display else []
        parts += [f"max-cll={self.light_level}"] if self.light_level else []
        return "".join(f":{part}" for part in [*parts, "hdr10=1"]) if parts else ""

    def x264_params(self) -> str:
        """The same as `x264-params`."""
        parts = [f"mastering-display={self.display}"] if self.display else []
        parts += [f"cll={self.light_level}"] if self.light_level else []
        return ":".join(parts)


def of_picture(picture: av.VideoFrame) -> Mastering:
    """What a decoded picture's side data say."""
    side_data = picture.side_data
    display, light = (side_data.get(name) for name in ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL"))
    dynamic = dict.fromkeys(said for name, said in _DYNAMIC.items() if side_data.get(name) is not None)
    return Mastering(
        _display(bytes(display)) if display is not None else "",
        "{},{}".format(*struct.unpack_from("=2I", bytes(light))) if light is not None else "",
        tuple(dynamic),
    )


def _display(data: bytes) -> str:
    """`AVMasteringDisplayMetadata` (libavutil/mastering_display_metadata.h) in the encoders' words."""
    *numbers, has_primaries, has_luminance = struct.unpack_from(f"={2 * _RATIONALS + 2}i", data)
    values = [num / den if den else 0.0 for num, den in zip(numbers[0::2], numbers[1::2], strict=True)]
    if not (has_primaries and has_luminance):
        return ""
    red, green, blue, white = (tuple(round(v * _CHROMATICITY) for v in values[i : i + 2]) for i in (0, 2, 4, 6))
    darkest, brightest = (round(v * _LUMINANCE) for v in values[8:10])
    points = "".join(f"{name}({x},{y})" for name, (x, y) in (("G", green), ("B", blue), ("R", red), ("WP", white)))
    return f"{points}L({brightest},{darkest})"
