"""Drawn talking heads whose voice and mouth come from one random phoneme sequence, with exact truth. See docs/synthetic.md."""

from keysync_jax.data_pipeline.synthetic.clip import TalkerClip, TalkerOptions, make_clip
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from keysync_jax.data_pipeline.synthetic.measure import MouthMeasure, measure_mouth
from keysync_jax.data_pipeline.synthetic.write import write_clip

__all__ = ["MouthMeasure", "SynthSettings", "TalkerClip", "TalkerOptions", "make_clip", "measure_mouth", "synth_dataset", "write_clip"]
