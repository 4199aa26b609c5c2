"""Built-in scorers: TorchScript files of published networks, run on the CPU or GPU through PyTorch (extra "torch").

TorchScript because it carries its own architecture: any checkpoint of these kinds can be exported to it once with `torch.jit.script`
or `trace` and used here, without this package containing anybody's model code. What each file must accept is said at its class.
"""

from __future__ import annotations

import numpy as np

from keysync_jax.core.errors import KeySyncError, first_line

# ImageNet statistics, which HyperIQA's backbone was trained with.
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_LARGEST_OFFSET = 15  # frames that the sync scorer looks to either side


class _Script:
    """A TorchScript file."""

    def __init__(self, path: str):
        try:
            import torch
        except ImportError as error:
            raise KeySyncError(f"{path}: TorchScript scorers need PyTorch; install the extra: pip install 'keysync-jax[torch]'") from error
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._module = torch.jit.load(path, map_location=self._device).eval()
        except (RuntimeError, ValueError) as error:
            raise KeySyncError(
                f"{path} is not a TorchScript file ({first_line(error)}); export the network with torch.jit.script or trace"
            ) from error
        self._path = path

    def _run(self, *arrays: np.ndarray):
        tensors = [self._torch.from_numpy(np.ascontiguousarray(a, np.float32)).to(self._device) for a in arrays]
        with self._torch.inference_mode():
            return self._module(*tensors)

    def _numbers(self, tensor, shape: tuple[int | None, ...]) -> np.ndarray:
        values = tensor.float().cpu().numpy()
        if values.ndim != len(shape) or any(want is not None and got != want for got, want in zip(values.shape, shape, strict=True)):
            raise KeySyncError(f"{self._path} gave shape {values.shape}, expected {shape}")
        if not np.isfinite(values).all():
            raise KeySyncError(f"{self._path} gave values that are not finite")
        return values


class ViewQuality(_Script):
    """Views `[N, 3, 224, 224]`, ImageNet-normalised, to scores `[N]`; HyperIQA's 0 to 100 is brought to 0 to 1."""

    def __call__(self, views: np.ndarray) -> np.ndarray:
        x = ((views.astype(np.float32) / 255 - _MEAN) / _STD).transpose(0, 3, 1, 2)
        scores = self._numbers(self._run(x).reshape(-1), (len(views),))
        return scores / 100 if scores.max() > 1.5 else scores


class ActiveSpeaker(_Script):
    """(MFCC `[1, 4 T, 13]`, grey faces `[1, T, 112, 112]` in 0..255) to the probability of speaking per frame `[T]`.

    The clip's score is their mean.
    """

    def __call__(self, faces: np.ndarray, samples: np.ndarray) -> dict[str, float]:
        features = mfcc(samples, 4 * len(faces))
        probability = self._numbers(self._run(features[None], faces[None].astype(np.float32)).reshape(-1), (len(faces),))
        return {"active_speaker": float(probability.mean())}


class SyncOffset(_Script):
    """(MFCC `[1, 4 T, 13]`, grey faces `[1, T, 112, 112]`) to embeddings of picture and sound, two tensors `[T, D]`.

    The offset is the shift of the sound, up to 15 frames, at which they lie nearest on average; the confidence is the median distance
    over all shifts minus the smallest, as SyncNet reports it.
    """

    def __call__(self, faces: np.ndarray, samples: np.ndarray) -> dict[str, float]:
        seen, heard = self._run(mfcc(samples, 4 * len(faces))[None], faces[None].astype(np.float32))
        seen = self._numbers(seen, (len(faces), None))
        return offset(seen, self._numbers(heard, seen.shape))


def offset(seen: np.ndarray, heard: np.ndarray, largest: int = _LARGEST_OFFSET) -> dict[str, float]:
    """Offset in frames (positive: the sound comes late) and confidence from embeddings `[T, D]` of picture and sound."""
    largest = min(largest, len(seen) // 2)
    distances = []
    for shift in range(-largest, largest + 1):
        a, b = (seen[: len(seen) - shift], heard[shift:]) if shift >= 0 else (seen[-shift:], heard[: len(heard) + shift])
        distances.append(float(np.linalg.norm(a - b, axis=1).mean()))
    best = int(np.argmin(distances))
    return {"sync_offset": float(best - largest), "sync_confidence": float(np.median(distances) - distances[best])}


def mfcc(samples: np.ndarray, frames: int) -> np.ndarray:
    """Mel cepstra `[frames, 13]` at 100 per second: 25 ms windows, 26 bands, orthonormal DCT, log energy as the first coefficient."""
    from scipy.fft import dct

    window, hop, fft, bands = 400, 160, 512, 26
    padded = np.pad(samples.astype(np.float64), (0, max(0, (frames - 1) * hop + window - len(samples))))
    emphasised = np.append(padded[0], padded[1:] - 0.97 * padded[:-1])
    pieces = emphasised[np.arange(frames)[:, None] * hop + np.arange(window)]
    power = np.abs(np.fft.rfft(pieces, fft)) ** 2 / fft
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.linspace(0, 8000, fft // 2 + 1)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    filtered = np.maximum(power @ np.maximum(0, np.minimum(rising, falling)), 1e-12)
    cepstra = np.asarray(dct(np.log(filtered), type=2, axis=1, norm="ortho"))[:, :13]
    cepstra *= 1 + 11 * np.sin(np.pi * np.arange(13) / 22)  # liftering
    cepstra[:, 0] = np.log(np.maximum(power.sum(axis=1), 1e-12))
    return cepstra.astype(np.float32)
