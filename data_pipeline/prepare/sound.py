"""The sound of an item's video at 16 kHz. That of a video of which items name parts is kept until another one's is asked for."""

from __future__ import annotations

from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.work import identity
from keysync_jax.media import audio

_last: dict[tuple[str, int, int], audio.AudioClip] = {}


def load_sound(item: Item) -> audio.AudioClip:
    """What `audio.load_audio` says about the item's file, or the file of its sound; its samples must not be written to.

    Raises:
      KeySyncError: see there.
    """
    path = item.audio or item.path
    key = identity(path) if item.is_part else None
    held = None if key is None else _last.get(key)
    if held is None:
        _last.clear()  # before loading: never two in memory
        held = audio.load_audio(path)
        if key is not None:
            held.samples.flags.writeable = False
            _last[key] = held
    return held
