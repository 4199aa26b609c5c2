"""Which block stands where in the U-Net, derived from the config alone (no JAX): the network and the conversion table walk it."""

from __future__ import annotations

from typing import NamedTuple

from keysync_jax.config import UNetConfig
from keysync_jax.core.errors import KeySyncError


class Block(NamedTuple):
    """One entry of `input_blocks` or `output_blocks`.

    `kind` is "conv" (the first convolution), "res" (residual block, with `attention` behind it if set) or "down". `upsample` is
    the index inside the block at which the upsampling convolution stands, 0 if there is none.
    """

    kind: str
    in_channels: int
    out_channels: int
    attention: bool = False
    upsample: int = 0


class Layout(NamedTuple):
    input: tuple[Block, ...]
    middle_channels: int
    output: tuple[Block, ...]


def unet_layout(config: UNetConfig) -> Layout:
    """The blocks of a `VideoUNet`.

    Raises:
      KeySyncError: a width that the groups of GroupNorm or the attention heads do not divide.
    """
    widths = [config.model_channels * mult for mult in config.channel_mult]
    for width in (config.model_channels, *widths):
        if width % config.norm_groups:
            raise KeySyncError(
                f"UNetConfig: width {width} is not a multiple of norm_groups {config.norm_groups}; "
                "change model_channels, channel_mult or norm_groups"
            )
    for width in widths:
        if width % config.num_head_channels:
            raise KeySyncError(f"UNetConfig: width {width} is not a multiple of num_head_channels {config.num_head_channels}")
    blocks = [Block("conv", config.in_channels, config.model_channels)]
    skips = [config.model_channels]
    channels = config.model_channels
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            blocks.append(Block("res", channels, width, 2**level in config.attention_resolutions))
            channels = width
            skips.append(channels)
        if level < len(widths) - 1:
            blocks.append(Block("down", channels, channels))
            skips.append(channels)
    outputs = []
    middle = channels
    for level, width in reversed(list(enumerate(widths))):
        attention = 2**level in config.attention_resolutions
        for i in range(config.num_res_blocks + 1):
            upsample = 1 + attention if level and i == config.num_res_blocks else 0
            outputs.append(Block("res", channels + skips.pop(), width, attention, upsample))
            channels = width
    return Layout(tuple(blocks), middle, tuple(outputs))
