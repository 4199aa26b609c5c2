"""Sizes of a SAM 2.1 network, read from the shapes of its weights (no JAX)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from keysync_jax.core.errors import KeySyncError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Sizes of a SAM 2.1 network; defaults are those of `sam2.1_hiera_tiny`.

    Attributes:
      embed_dim: channels of the first stage of Hiera; each further stage has twice as many, and twice the heads.
      num_heads: attention heads of the first stage.
      stages: blocks of each of the four stages.
      global_att_blocks: blocks whose attention sees the whole picture.
      window_spec: side of the attention windows of each stage, in tokens.
      background: rows and columns of the stored background position embedding.
      d_model: width of the features that memory and masks work with.
      mem_dim: channels of a memory.
      attention_layers: layers of the memory attention.
      attention_ff: width of their MLP.
      fuser_layers: blocks of the memory encoder.
      num_maskmem: memories that a frame sees, its prompt included.
      decoder_layers: layers of the mask decoder's transformer.
      decoder_ff: width of their MLP.
      iou_width: width of the MLP that rates masks.
      prompt_mask_channels: channels on a mask prompt's way in.
    """

    embed_dim: int = 96
    num_heads: int = 1
    stages: tuple[int, ...] = (1, 2, 7, 2)
    global_att_blocks: tuple[int, ...] = (5, 7, 9)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)
    background: tuple[int, int] = (7, 7)
    d_model: int = 256
    mem_dim: int = 64
    attention_layers: int = 4
    attention_ff: int = 2048
    fuser_layers: int = 2
    num_maskmem: int = 7
    decoder_layers: int = 2
    decoder_ff: int = 2048
    iou_width: int = 256
    prompt_mask_channels: int = 16

    def __post_init__(self):
        if len(self.stages) != 4 or len(self.window_spec) != 4:
            raise KeySyncError(f"Sam2Config: four stages and four windows are needed, not {self.stages} and {self.window_spec}")
        if self.embed_dim % self.num_heads:
            raise KeySyncError(f"Sam2Config.embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.d_model % self.mem_dim or self.d_model % 16:
            raise KeySyncError(f"Sam2Config.d_model {self.d_model} must be a multiple of 16 and of mem_dim {self.mem_dim}")

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The last block of each stage."""
        return tuple(sum(self.stages[: i + 1]) - 1 for i in range(len(self.stages)))

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.stages)))

    @property
    def pointer_tokens(self) -> int:
        """Memory tokens that an object pointer is cut into."""
        return self.d_model // self.mem_dim


# What shapes do not say of the published sizes: heads, blocks with global attention, windows.
_RELEASED: dict[tuple[int, tuple[int, ...]], tuple[str, int, tuple[int, ...], tuple[int, ...]]] = {
    (96, (1, 2, 7, 2)): ("tiny", 1, (5, 7, 9), (8, 4, 14, 7)),
    (96, (1, 2, 11, 2)): ("small", 1, (7, 10, 13), (8, 4, 14, 7)),
    (112, (2, 3, 16, 3)): ("base_plus", 2, (12, 16, 20), (8, 4, 14, 7)),
    (144, (2, 6, 36, 4)): ("large", 2, (23, 33, 43), (8, 4, 16, 8)),
}
# Stored in every checkpoint and read by nothing that the tracker does: mask prompts, and an option that the published models turn off.
UNUSED = ("no_mem_pos_enc", "mask_downsample.weight", "mask_downsample.bias")
# What 2.1 added; a SAM 2.0 checkpoint lacks both.
_ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight")
_TRUNK = "image_encoder.trunk"


def size_name(config: Sam2Config) -> str:
    """ "tiny", "small", "base_plus" or "large"; "custom" for others."""
    known = _RELEASED.get((config.embed_dim, config.stages))
    return known[0] if known else "custom"


def config_from_shapes(
    shapes: Mapping[str, Shape],
    source: str = "weights",
    *,
    num_heads: int | None = None,
    global_att_blocks: Sequence[int] | None = None,
    window_spec: Sequence[int] | None = None,
) -> Sam2Config:
    """Sizes of the network whose tensors have these shapes.

    Args:
      shapes: torch key -> shape, as in a checkpoint's `["model"]`.
      source: what to call the file in errors.
      num_heads, global_att_blocks, window_spec: what shapes do not say; None takes those of the published model of that size.

    Raises:
      KeySyncError: no SAM 2.1 weights (those of SAM 2.0 are named as such), or of no published size and nothing else is given.
    """
    needed = (f"{_TRUNK}.patch_embed.proj.weight", "maskmem_tpos_enc", "sam_mask_decoder.iou_token.weight")
    if any(key not in shapes for key in needed):
        raise KeySyncError(f"{source} holds no SAM 2.1 video model ({next(k for k in needed if k not in shapes)} is missing)")
    lacking = [key for key in _ONLY_IN_2_1 if key not in shapes]
    if lacking:
        raise KeySyncError(f"{source} holds SAM 2.0 weights ({lacking[0]} is missing); give those of SAM 2.1, sam2.1_hiera_*.pt")
    embed_dim = shapes[f"{_TRUNK}.patch_embed.proj.weight"][0]
    stages = _stages(shapes)
    known = _RELEASED.get((embed_dim, stages))
    if known is None and (num_heads is None or global_att_blocks is None):
        raise KeySyncError(f"{source}: a Hiera of width {embed_dim} with {stages} blocks is none of tiny, small, base_plus, large")
    _, heads, blocks, windows = known or ("", 0, (), Sam2Config.window_spec)
    try:
        return Sam2Config(
            embed_dim=embed_dim,
            num_heads=heads if num_heads is None else num_heads,
            stages=stages,
            global_att_blocks=tuple(blocks if global_att_blocks is None else global_att_blocks),
            window_spec=tuple(windows if window_spec is None else window_spec),
            background=(shapes[f"{_TRUNK}.pos_embed"][2], shapes[f"{_TRUNK}.pos_embed"][3]),
            d_model=shapes["no_mem_embed"][-1],
            mem_dim=shapes["maskmem_tpos_enc"][-1],
            attention_layers=_count(shapes, r"memory_attention\.layers\.(\d+)\."),
            attention_ff=shapes["memory_attention.layers.0.linear1.weight"][0],
            fuser_layers=_count(shapes, r"memory_encoder\.fuser\.layers\.(\d+)\."),
            num_maskmem=shapes["maskmem_tpos_enc"][0],
            decoder_layers=_count(shapes, r"sam_mask_decoder\.transformer\.layers\.(\d+)\."),
            decoder_ff=shapes["sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight"][0],
            iou_width=shapes["sam_mask_decoder.iou_prediction_head.layers.0.weight"][0],
            prompt_mask_channels=shapes["sam_prompt_encoder.mask_downscaling.3.weight"][0],
        )
    except KeyError as error:
        raise KeySyncError(f"{source} holds no complete SAM 2.1 video model ({error.args[0]} is missing)") from None
    except IndexError:
        raise KeySyncError(f"{source}: a tensor of SAM 2.1 has too few axes; the file is damaged") from None


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return 1 + max((int(m[1]) for m in (re.match(pattern, key) for key in shapes) if m), default=-1)


def _stages(shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    """Blocks of each stage: a stage starts with a block that widens its input, by `proj`."""
    depth = _count(shapes, rf"{re.escape(_TRUNK)}\.blocks\.(\d+)\.")
    starts = [0, *(i for i in range(depth) if f"{_TRUNK}.blocks.{i}.proj.weight" in shapes), depth]
    return tuple(b - a for a, b in zip(starts, starts[1:], strict=False))
