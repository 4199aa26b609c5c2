"""Putting the generated face back into the source picture, in the source's own pixel format.

Only the masked part of the crop is blended, with an opacity that rises from exactly 0 at the mask's border to 1 inside it; so pixels
outside the mask keep the decoded Y, U and V values, and there is no edge. A chroma sample changes only where every luma pixel of its
cell is blended, so with subsampled chroma, too, no colour changes outside the mask. The crop may be turned, stretched or lie between
pixels (`View`): opacity is then found at the middle of each stored pixel, and the patch is resampled to the stored pixels once.

Before blending, the patch is matched in colour at low frequencies, from a band along the mask's border: first one gain, where source
and patch show the same thing there up to brightness; then the difference that is left, spread smoothly over the inside by normalised
convolution from coarse to fine scales (Knutsson and Westin, 1993), and added. The field is much smoother than a mouth, so brightness
and tint follow the source and the mouth stays as generated.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import av
import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import color
from keysync_jax.media.crop import View
from keysync_jax.media.video import VideoInfo

# Where a patch goes: (x0, y0, side) in upright pixels, or a view of them.
Square = tuple[float, float, float] | View

_GRID = 48  # cells of the colour-matching grid across the crop
_SCALES = (0.35, 0.18, 0.09)  # standard deviations of the spreading, fractions of the crop, coarse to fine
_TRUST = 0.02  # band density at which a scale is half trusted
_MIN_BAND = 1e-3  # grid cells below this weight say nothing
_SAME_CONTENT = 0.85  # squared correlation of source and patch along the border from which a gain is believed
_MAX_GAIN = 1.6
_INSIDE_WEIGHT = 0.5  # the band inside the mask shows other content than the source, outside it shows the same


@dataclass(frozen=True)
class BlendSettings:
    """How the patch is blended in.

    Attributes:
      feather: width of the opacity ramp inside the mask, fraction of the crop's side.
      bottom_gap: rows left unblended above the bottom of the crop where the mask reaches it, fraction of the side (the KeySync
        author's advice against a visible lower border).
      band: standard deviation of the band where colours are compared, fraction of the side.
      max_correction: largest colour correction, in units of R'G'B' 0..1; 0 switches matching off.
    """

    feather: float = 0.06
    bottom_gap: float = 0.02
    band: float = 0.03
    max_correction: float = 0.25


class Rect(NamedTuple):
    """Pixels x0 <= x < x1, y0 <= y < y1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.y1 - self.y0, self.x1 - self.x0


class _Plan(NamedTuple):
    """What depends on box and mask only. Arrays are in stored orientation over `rect`, whose edges lie between chroma cells."""

    rect: Rect
    alpha: np.ndarray  # luma opacity
    alpha_chroma: np.ndarray
    band: np.ndarray  # weight of the colour comparison, luma resolution
    band_chroma: np.ndarray
    grid: tuple[int, int]  # (columns, rows) of the matching grid
    on_grid: np.ndarray  # band on the grid
    density: list[np.ndarray]  # the same spread by each scale
    total: float  # the same summed


class Compositor:
    """Blends patches into the frames of one video.

    Args:
      info: description of the video.
      settings: feather, gap and colour matching.
      cache_size: how many (box, mask) pairs are kept prepared; the box is fixed in a shot and masks repeat.
    """

    def __init__(self, info: VideoInfo, settings: BlendSettings = BlendSettings(), cache_size: int = 16):
        self.info = info
        self.settings = settings
        self._cache_size = cache_size
        self._plans: OrderedDict[tuple, _Plan | None] = OrderedDict()

    def composite(self, frame: av.VideoFrame, patch: np.ndarray, box: Square, mask: np.ndarray) -> av.VideoFrame:
        """Blend `patch` into `frame` itself and return it.

        Args:
          frame: picture in `info.pix_fmt`, stored orientation. Its own memory is made private first, so the decoder keeps its references.
          patch: upright R'G'B' float `[p, p, 3]` in 0..1, the whole crop.
          box: (x0, y0, side) of the crop in upright pixels; may be fractional and reach beyond the picture. Or a view of the picture.
          mask: `[m, m]`, non-zero where the crop was regenerated; cell (i, j) covers side/m pixels from (y0 + i side/m, x0 + j side/m).

        Raises:
          KeySyncError: a patch that is not finite.
          ValueError: arrays of the wrong shape, or a frame in another size or format than `info` says.
        """
        self._check(frame, patch, mask)
        plan = self._plan(box, mask)
        if plan is None:
            return frame
        fmt = self.info.planes
        codes = color.to_codes(self._resampled(patch, box, plan.rect), fmt)
        frame.make_writable()
        views = self._regions(frame, plan.rect)
        sources = [view.astype(np.float32) for view in views]
        patches = [np.ascontiguousarray(codes[:, :, 0])]
        for index in range(1, fmt.num_planes):
            patches.append(color.subsample(np.ascontiguousarray(codes[:, :, index]), fmt))
        gain, field = self._match(sources, patches, plan)
        top = 2**fmt.bits - 1
        for index, (view, source, target) in enumerate(zip(views, sources, patches, strict=True)):
            low, high = color.nominal_limits(fmt)[index]
            zero = color.code_zero(fmt)[index]
            if field is not None:
                size = (target.shape[1], target.shape[0])
                target = gain * target + ((1 - gain) * zero + cv2.resize(field[:, :, index], size, interpolation=cv2.INTER_LINEAR))
            alpha = plan.alpha if index == 0 else plan.alpha_chroma
            blended = source + alpha * (np.clip(target, low, high) - source)
            view[...] = np.clip(np.rint(blended), 0, top)
        return frame

    def alpha(self, box: Square, mask: np.ndarray) -> np.ndarray:
        """Luma opacity float32 `[H, W]` over the upright picture."""
        out = np.zeros((self.info.height, self.info.width), np.float32)
        plan = self._plan(box, mask)
        if plan is not None:
            out[plan.rect.y0 : plan.rect.y1, plan.rect.x0 : plan.rect.x1] = plan.alpha
        return np.ascontiguousarray(self.info.orientation.upright(out))

    def _check(self, frame: av.VideoFrame, patch: np.ndarray, mask: np.ndarray) -> None:
        info = self.info
        if (frame.width, frame.height, frame.format.name) != (info.width, info.height, info.pix_fmt):
            raise ValueError(f"frame is {frame}, expected {info.width}x{info.height} {info.pix_fmt}")
        if patch.ndim != 3 or patch.shape[0] != patch.shape[1] or patch.shape[2] != 3:
            raise ValueError(f"patch has shape {patch.shape}, expected (p, p, 3)")
        if mask.ndim != 2:
            raise ValueError(f"mask has shape {mask.shape}, expected (m, m)")
        if not np.isfinite(patch).all():
            raise KeySyncError("the generated picture has values that are not finite; the model's weights or settings are broken")

    def _plan(self, box: Square, mask: np.ndarray) -> _Plan | None:
        mask = mask > 0.5
        if not isinstance(box, View):
            x, y, side = (float(value) for value in box)
            box = (x, y, side)
        key = (box, mask.shape, mask.tobytes())
        if key in self._plans:
            self._plans.move_to_end(key)
        else:
            self._plans[key] = _make_plan(self.info, self.settings, key[0], mask)
            if len(self._plans) > self._cache_size:
                self._plans.popitem(last=False)
        return self._plans[key]

    def _resampled(self, patch: np.ndarray, box: Square, rect: Rect) -> np.ndarray:
        """Patch over `rect` in stored orientation, float32; the inverse of how a crop is cut out (pixel centres at half coordinates)."""
        info = self.info
        if isinstance(box, View):
            return _laid_out(patch, stored_view(info, box), rect)
        stored = np.ascontiguousarray(info.orientation.stored(patch), np.float32)
        x0, y0, side = info.orientation.stored_box(box, info.display_width, info.display_height)
        whole = max(1, round(side))
        if whole != len(stored):
            method = cv2.INTER_AREA if whole < len(stored) else cv2.INTER_CUBIC
            stored = cv2.resize(stored, (whole, whole), interpolation=method)
        if whole == side and int(x0) == x0 and int(y0) == y0:
            rows = np.clip(np.arange(rect.y0 - int(y0), rect.y1 - int(y0)), 0, whole - 1)
            cols = np.clip(np.arange(rect.x0 - int(x0), rect.x1 - int(x0)), 0, whole - 1)
            return stored[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] if _runs(rows, cols) else stored[rows[:, None], cols]
        scale = whole / side
        matrix = np.array([[scale, 0, (rect.x0 + 0.5 - x0) * scale - 0.5], [0, scale, (rect.y0 + 0.5 - y0) * scale - 0.5]])
        size = (rect.x1 - rect.x0, rect.y1 - rect.y0)
        return cv2.warpAffine(stored, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)

    def _regions(self, frame: av.VideoFrame, rect: Rect) -> list[np.ndarray]:
        fmt = self.info.planes
        views = color.plane_views(frame)
        regions = [views[0][rect.y0 : rect.y1, rect.x0 : rect.x1]]
        for view in views[1:]:
            rows = slice(rect.y0 >> fmt.log2_h, -(-rect.y1 >> fmt.log2_h))
            cols = slice(rect.x0 >> fmt.log2_w, -(-rect.x1 >> fmt.log2_w))
            regions.append(view[rows, cols])
        return regions

    def _match(self, sources: list[np.ndarray], patches: list[np.ndarray], plan: _Plan) -> tuple[float, np.ndarray | None]:
        """Gain and smooth field `[rows, columns, C]` (code values) that take the patch's colours to the source's along the border."""
        limit = self.settings.max_correction
        if limit <= 0 or plan.total <= 0:
            return 1.0, None
        fmt = self.info.planes
        scales = np.array(color.code_scale(fmt), np.float32)
        zeros = np.array(color.code_zero(fmt), np.float32)
        bands = [plan.band] + [plan.band_chroma] * (fmt.num_planes - 1)
        weight = plan.on_grid[:, :, None]
        known = weight > _MIN_BAND
        source, patch = (
            np.stack([_on_grid((plane - zero) * band, plan.grid) for plane, zero, band in zip(planes, zeros, bands, strict=True)], -1)
            for planes in (sources, patches)
        )
        gain = _gain(source[:, :, 0], patch[:, :, 0], plan.on_grid)
        # Far larger differences are other content (a jaw against the background), not another tint.
        bounds = limit * scales
        difference = (source - gain * patch) / np.where(known, weight, 1)
        measured = np.where(known, np.clip(difference, -2 * bounds, 2 * bounds), 0) * weight
        field = np.broadcast_to(measured.sum(axis=(0, 1)) / plan.total, measured.shape).astype(np.float32)
        for sigma, density in zip(_SCALES, plan.density, strict=True):
            spread = _blur(measured, sigma).reshape(measured.shape)
            trust = density / (density + _TRUST)
            field = trust * spread / np.maximum(density, 1e-6) + (1 - trust) * field
        return gain, np.clip(field, -bounds, bounds)


def blend_region(info: VideoInfo, box: Square, mask: np.ndarray, settings: BlendSettings = BlendSettings()) -> np.ndarray:
    """Upright bool `[H, W]`: the pixels that compositing may change. Y, U and V are untouched everywhere else."""
    return Compositor(info, settings).alpha(box, mask) > 0


def seam_step(before: np.ndarray, after: np.ndarray, region: np.ndarray, width: int = 3) -> float:
    """Visible step at the border of a blend, in the units of the pictures.

    Outside the blend nothing changes, so the step is what the low-passed change amounts to just inside the border.

    Args:
      before: luma `[H, W]` of the source.
      after: luma of the composite.
      region: bool `[H, W]`, the blended pixels.
      width: width of the ring inside the border in pixels.
    """
    change = cv2.blur(after.astype(np.float32) - before.astype(np.float32), (2 * width + 1, 2 * width + 1))
    inside = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 5)
    ring = (inside > 0) & (inside <= width)
    return float(np.abs(change[ring]).mean()) if ring.any() else 0.0


def _runs(rows: np.ndarray, cols: np.ndarray) -> bool:
    """Whether both index lists step by one throughout, so that a slice gives them without a copy."""
    return rows[-1] - rows[0] == len(rows) - 1 and cols[-1] - cols[0] == len(cols) - 1


def _on_grid(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return cv2.resize(values, grid, interpolation=cv2.INTER_AREA)


def _gain(source: np.ndarray, patch: np.ndarray, weight: np.ndarray) -> float:
    """Brightness gain between two weighted luma grids, 1 unless they show the same thing along the border.

    A patch that is darker by a factor is darkest where the face is brightest, which an added field cannot follow.
    """
    known = weight > _MIN_BAND
    weights = weight[known] / weight[known].sum()
    s, p = source[known] / weight[known], patch[known] / weight[known]
    s, p = s - weights @ s, p - weights @ p
    var_s, var_p, cov = weights @ (s * s), weights @ (p * p), weights @ (s * p)
    if cov <= 0 or cov * cov < _SAME_CONTENT * var_s * var_p:
        return 1.0
    return float(np.clip(cov / var_p, 1 / _MAX_GAIN, _MAX_GAIN))


def _blur(values: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(values, (0, 0), sigma * _GRID, borderType=cv2.BORDER_CONSTANT)


def stored_view(info: VideoInfo, view: View) -> View:
    """A view of the upright picture as one of the stored picture."""
    turn = info.orientation

    def point(x: float, y: float) -> tuple[float, float]:
        x = info.display_width - x if turn.flip_x else x
        y = info.display_height - y if turn.flip_y else y
        return (y, x) if turn.transpose else (x, y)

    def vector(x: float, y: float) -> tuple[float, float]:
        x, y = (-x if turn.flip_x else x), (-y if turn.flip_y else y)
        return (y, x) if turn.transpose else (x, y)

    return View(point(*view.corner), vector(*view.right), vector(*view.down))


def _laid_out(patch: np.ndarray, view: View, rect: Rect) -> np.ndarray:
    """Patch `[p, p, 3]` over the stored pixels of `rect`, float32: averaged over area where it shrinks, then cubic at the exact place."""
    source = np.ascontiguousarray(patch, np.float32)
    columns, rows = (min(len(patch), max(1, round(length))) for length in (math.hypot(*view.right), math.hypot(*view.down)))
    if columns < len(patch) or rows < len(patch):
        source = cv2.resize(source, (columns, rows), interpolation=cv2.INTER_AREA)
    to_unit = np.linalg.inv(view.matrix[:, :2])
    matrix = np.empty((2, 3))
    matrix[:, :2] = to_unit
    matrix[:, 2] = to_unit @ (np.array([rect.x0 + 0.5, rect.y0 + 0.5]) - view.matrix[:, 2])
    matrix *= np.array([[columns], [rows]])
    matrix[:, 2] -= 0.5
    size = (rect.x1 - rect.x0, rect.y1 - rect.y0)
    return cv2.warpAffine(source, matrix, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)


def _make_plan(info: VideoInfo, settings: BlendSettings, box: Square, mask: np.ndarray) -> _Plan | None:
    """Opacity and band of one box and mask; None where no pixel of the picture is blended."""
    if isinstance(box, View):
        return _view_plan(info, settings, stored_view(info, box), mask)
    x0, y0, side = box
    whole = Rect(int(np.floor(x0)), int(np.floor(y0)), int(np.ceil(x0 + side)), int(np.ceil(y0 + side)))
    alpha, band = _opacity(settings, box, mask, whole)
    seen = Rect(max(0, whole.x0), max(0, whole.y0), min(info.display_width, whole.x1), min(info.display_height, whole.y1))
    if seen.x0 >= seen.x1 or seen.y0 >= seen.y1:
        return None
    part = (slice(seen.y0 - whole.y0, seen.y1 - whole.y0), slice(seen.x0 - whole.x0, seen.x1 - whole.x0))
    alpha, band = (info.orientation.stored(values[part]) for values in (alpha, band))
    if not alpha.any():
        return None
    return _padded_plan(info, _stored_rect(info, seen), alpha, band, (side, side))


def _view_plan(info: VideoInfo, settings: BlendSettings, view: View, mask: np.ndarray) -> _Plan | None:
    """`_make_plan` of a view of the stored picture."""
    low, high = view.corners.min(axis=0), view.corners.max(axis=0)
    whole = Rect(*np.floor(low).astype(int).tolist(), *np.ceil(high).astype(int).tolist())
    tight = Rect(max(0, whole.x0), max(0, whole.y0), min(info.width, whole.x1), min(info.height, whole.y1))
    if tight.x0 >= tight.x1 or tight.y0 >= tight.y1:
        return None
    x, y = np.arange(whole.x0, whole.x1) + 0.5, np.arange(whole.y0, whole.y1) + 0.5
    unit = view.unit(np.stack(np.meshgrid(x, y), axis=-1))
    alpha, band = _weights(settings, unit[..., 0], unit[..., 1], view.side, mask)
    part = (slice(tight.y0 - whole.y0, tight.y1 - whole.y0), slice(tight.x0 - whole.x0, tight.x1 - whole.x0))
    if not alpha[part].any():
        return None
    return _padded_plan(info, tight, alpha[part], band[part], view.extent)


def _padded_plan(info: VideoInfo, tight: Rect, alpha: np.ndarray, band: np.ndarray, extent: tuple[float, float]) -> _Plan:
    """Opacity and band over the stored pixels of `tight`, brought out to whole chroma cells; the crop spans `extent` pixels."""
    fmt = info.planes
    rect = Rect(
        tight.x0 >> fmt.log2_w << fmt.log2_w,
        tight.y0 >> fmt.log2_h << fmt.log2_h,
        min(info.width, -(-tight.x1 >> fmt.log2_w) << fmt.log2_w),
        min(info.height, -(-tight.y1 >> fmt.log2_h) << fmt.log2_h),
    )
    pad = ((tight.y0 - rect.y0, rect.y1 - tight.y1), (tight.x0 - rect.x0, rect.x1 - tight.x1))
    alpha, band = (np.pad(values, pad) for values in (alpha, band))
    blended = color.subsample((alpha > 0).astype(np.float32), fmt)
    alpha_chroma = np.where(blended > 0.999, color.subsample(alpha, fmt), 0).astype(np.float32)
    grid = (max(1, round(rect.shape[1] / (extent[0] / _GRID))), max(1, round(rect.shape[0] / (extent[1] / _GRID))))
    on_grid = _on_grid(band, grid)
    density = [_blur(on_grid, sigma).reshape(grid[1], grid[0], 1) for sigma in _SCALES]
    return _Plan(rect, alpha, alpha_chroma, band, color.subsample(band, fmt), grid, on_grid, density, float(on_grid.sum()))


def _opacity(settings: BlendSettings, box: tuple[float, float, float], mask: np.ndarray, whole: Rect) -> tuple[np.ndarray, np.ndarray]:
    """Opacity and comparison weight over the upright pixels of `whole`, each float32 of its shape."""
    x0, y0, side = box
    v = (np.arange(whole.y0, whole.y1) + 0.5 - y0) / side  # position of pixel centres in the crop, 0..1
    u = (np.arange(whole.x0, whole.x1) + 0.5 - x0) / side
    return _weights(settings, u[None, :], v[:, None], side, mask)


def _weights(settings: BlendSettings, u: np.ndarray, v: np.ndarray, side: float, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Opacity and comparison weight of pixels whose centres lie at (u, v) of the crop, 0..1; the arrays broadcast to the pixels' grid."""
    rows, cols = (np.floor(v * mask.shape[0]).astype(int), np.floor(u * mask.shape[1]).astype(int))
    in_crop = ((v >= 0) & (v < 1)) & ((u >= 0) & (u < 1))
    inside = in_crop & mask[np.clip(rows, 0, mask.shape[0] - 1), np.clip(cols, 0, mask.shape[1] - 1)]
    if mask[-1].any():
        inside &= v < 1 - settings.bottom_gap
    # A frame of zeros: where the mask reaches the crop's edge, the ramp begins there.
    padded = np.pad(inside.astype(np.uint8), 1)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    ramp = max(1.0, min(settings.feather * side, float(depth.max())))
    t = np.clip((depth - 0.5) / ramp, 0, 1)
    alpha = np.where(inside, t * t * (3 - 2 * t), 0).astype(np.float32)
    # Distance to the border on either side; beyond the crop's side it makes no difference.
    outside = cv2.distanceTransform(1 - inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    distance = np.minimum(np.where(inside, depth, outside), side)
    weight = np.where(inside, _INSIDE_WEIGHT, 1.0) * np.exp(-0.5 * (distance / max(1.0, settings.band * side)) ** 2)
    return alpha, np.where(in_crop, weight, 0).astype(np.float32)


def _stored_rect(info: VideoInfo, upright: Rect) -> Rect:
    """The same pixels in stored coordinates."""
    turn = info.orientation
    x0, y0, x1, y1 = upright
    if turn.flip_x:
        x0, x1 = info.display_width - x1, info.display_width - x0
    if turn.flip_y:
        y0, y1 = info.display_height - y1, info.display_height - y0
    return Rect(y0, x0, y1, x1) if turn.transpose else Rect(x0, y0, x1, y1)
