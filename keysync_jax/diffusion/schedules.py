"""Noise levels that the sampler walks through."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.errors import KeySyncError, UsageError

# "Align Your Steps" schedule for Stable Video Diffusion (Sabour et al. 2024), from pure noise to almost clean. Eleven values:
# ten steps between them and an eleventh to zero.
AYS_SIGMAS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
MIN_STEPS = len(AYS_SIGMAS) - 1


def ays_sigmas(num_steps: int = MIN_STEPS, strength: float = 1.0) -> np.ndarray:
    """Decreasing noise levels, the last of them zero.

    Args:
      num_steps: 10 takes the published table as it is, which is **eleven** network evaluations (as in the released models);
        more resample the table log-linearly to that many evaluations.
      strength: fraction of the schedule to walk; below one its beginning is left out (at least the final zero stays).

    Returns:
      float64 `[number of evaluations + 1]`.

    Raises:
      UsageError: fewer than 10 steps.
      KeySyncError: a strength outside [0, 1].
    """
    if num_steps < MIN_STEPS:
        raise UsageError(
            f"--steps {num_steps} is too few: the noise schedule is published for {MIN_STEPS} steps and is not defined below; "
            f"use --steps {MIN_STEPS} or more"
        )
    if not 0.0 <= strength <= 1.0:
        raise KeySyncError(f"strength is {strength}; it must lie between 0 and 1")
    sigmas = np.array(AYS_SIGMAS)
    if num_steps > MIN_STEPS:
        log_sigmas = np.interp(np.linspace(0, 1, num_steps), np.linspace(0, 1, len(sigmas)), np.log(sigmas))
        sigmas = np.exp(log_sigmas)
    sigmas = np.append(sigmas, 0.0)
    return sigmas[len(sigmas) - max(int(strength * len(sigmas)), 1) :]
