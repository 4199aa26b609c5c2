"""SAM 2.1 tiny at its real size: 100 frames of 512 pixels. Minutes; prints what it took.

pytest tests/segmentation/test_full_size_tracking.py -m slow -n 0 -s
"""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Runs apart, so that its peak memory is its own.
TRACK = """
import json, resource, time
import numpy as np
from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_table import sam2_table
from keysync_jax.models.table import to_flax
from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.object_tracker import ObjectTracker

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

class Video:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        y, x = np.mgrid[:512, :512]
        disc = (x - 100 - 3 * index) ** 2 + (y - 300) ** 2 < 3600
        noise = np.random.default_rng(index).integers(60, 90, (512, 512, 3))
        return np.where(disc[..., None], [220, 180, 160], noise).astype(np.uint8)

rng = np.random.default_rng(0)
tensors = {e.torch_key: rng.normal(0, 0.02, e.torch_shape).astype(np.float32) + e.torch_key.endswith(("norm1.weight", "norm2.weight"))
           for e in sam2_table(Sam2Config())}
tensors["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 10
tracker = ObjectTracker(Sam2Config(), to_flax(sam2_table(Sam2Config()), tensors), 512)
times, peaks, start = [], [], time.perf_counter()
for frame, logits in tracker.follow(Video(), [Prompt(0, ((100, 300),), (True,))]):
    times.append(time.perf_counter() - start)
    peaks.append(peak())
    assert logits.shape == (1, 512, 512) and np.isfinite(logits).all()
took = {"frames": len(times), "compile": times[1], "per_frame": (times[-1] - times[9]) / 90, "peak": peaks[-1], "early": peaks[24]}
print(json.dumps(took))
"""


def test_a_hundred_frames_at_512_pixels():
    done = subprocess.run([sys.executable, "-c", TRACK], check=True, capture_output=True, text=True)
    took = json.loads(done.stdout.splitlines()[-1])
    print(
        f"100 frames at 512 pixels: {took['compile']:.0f} s until the second frame, then {took['per_frame']:.2f} s a frame; "
        f"peak memory {took['peak']:.0f} MB, {took['early']:.0f} MB after 25 frames"
    )
    assert took["frames"] == 100
    assert took["peak"] < took["early"] + 50  # what is kept does not grow with length
