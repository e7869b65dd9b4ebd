"""How CogVideoX says where a token lies: rotary grids for every version, and the learned table of 5B-I2V."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from finetrainers.config.schema import RopeTemporal
from finetrainers.families.rope import position_scale, temporal_frequencies
from finetrainers.types import Bucket

# Shape suffixes: B batch, F frames, H height, W width (of latents, or of their patches), L text tokens, D features.

FRAMES, SPACE = 4, 8
"""Pixels of a latent in time and in space."""
THETA = 10_000.0
"""Base of the rotary frequencies."""

Rotary = Callable[[tuple[int, int, int], torch.device], tuple[Tensor, Tensor]]
"""Latent frames, height and width, and a device, to the cosines and sines of all tokens."""

LearnedPositions = Literal["keep", "resize", "remove"] | None
"""What becomes of the learned table; None is `keep`."""


def base_size(config: Mapping[str, Any]) -> Bucket:
    """The size that 1.0 was trained on; for 1.5 the trained frames, and the largest height and width."""
    return Bucket(config["sample_frames"], config["sample_height"] * SPACE, config["sample_width"] * SPACE)


def refuse_positions(bucket: Bucket, *, config: Mapping[str, Any], learned_positions: LearnedPositions) -> str | None:
    """None if a transformer has positions for a size; otherwise for which it has."""
    base = base_size(config)
    if config.get("use_learned_positional_embeddings"):
        if bucket == base or learned_positions in ("resize", "remove"):
            return None
        # diffusers would stop, or take sines and cosines for the table without a word.
        return (
            f"this CogVideoX has learned positions for {base} alone; for other sizes set model.learned_positions to "
            "resize (interpolate them) or remove (go by rotary ones alone)"
        )
    if config.get("patch_size_t") is None or (bucket.height <= base.height and bucket.width <= base.width):
        return None
    nearest = Bucket(bucket.num_frames, min(bucket.height, base.height), min(bucket.width, base.width))
    return (
        f"CogVideoX 1.5 has positions for a height up to {base.height} and a width up to {base.width}; the nearest is "
        f"{nearest}"
    )


def rotary_positions(
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    config: Mapping[str, Any],
    rope_temporal: RopeTemporal | None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, fp32 [tokens, head], as the pipeline of a transformer with this config
    prepares them: 1.0 squeezes every size into the grid that it was trained on, 1.5 counts patches from the corner."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    num_frames, height, width = shape
    patch = config["patch_size"]
    grid, base = (height // patch, width // patch), (config["sample_height"] // patch, config["sample_width"] // patch)
    if config.get("patch_size_t") is None:
        size = {"crops_coords": get_resize_crop_region_for_grid(grid, base[1], base[0])}
    else:
        num_frames = -(-num_frames // config["patch_size_t"])
        size = {"crops_coords": None, "grid_type": "slice", "max_size": base}
    head = config["attention_head_dim"]
    cos, sin = get_3d_rotary_pos_embed(head, grid_size=grid, temporal_size=num_frames, device=device, **size)
    if rope_temporal is not None:
        angles = _time_angles(num_frames, config, rope_temporal)
        for table, of in ((cos, torch.cos), (sin, torch.sin)):
            # The first quarter of each head is time, each frequency twice.
            table.view(num_frames, -1, head)[:, :, : head // 4] = of(angles).float().to(device)[:, None]
    return cos, sin


def _num_positions(num_frames: int, config: Mapping[str, Any]) -> int:
    """Positions in time of a clip of so many pixel frames: its latent frames, or pairs of them in 1.5."""
    latent_frames = (num_frames - 1) // FRAMES + 1
    return -(-latent_frames // (config.get("patch_size_t") or 1))


def _time_angles(num_frames: int, config: Mapping[str, Any], rope_temporal: RopeTemporal) -> Tensor:
    """Angles of the time axis, fp64 [frames, head / 4], reaching for another length than the model was trained on."""
    lengths = {
        "trained": _num_positions(config["sample_frames"], config),
        "wanted": _num_positions(rope_temporal.frames, config),
    }
    method = rope_temporal.method
    frequencies = temporal_frequencies(config["attention_head_dim"] // 4, THETA, **lengths, method=method)
    positions = torch.arange(num_frames, dtype=torch.float64, device="cpu") * position_scale(**lengths, method=method)
    return torch.outer(positions, frequencies).repeat_interleave(2, dim=1)


def pipeline_with(rotary: Rotary, kind: Any) -> Any:
    """A pipeline class that differs from `kind` in its rotary positions alone; also in name it is the same, so that a
    pipeline that is saved says what diffusers can load."""

    def prepare(self: Any, height: int, width: int, num_frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        scale = self.vae_scale_factor_spatial
        return rotary((num_frames, height // scale, width // scale), device)

    return type(kind.__name__, (kind,), {"_prepare_rotary_positional_embeddings": prepare})


def place_table(transformer: Any, learned_positions: LearnedPositions) -> Any:
    """Make a transformer treat its learned table of positions as `model.learned_positions` says, and give it back.

    The names of weights stay as they are: with `resize` a transformer is saved with its own table and config, and loads
    anywhere for the base size; with `remove` it is saved without a table, and its config says so.
    """
    embed = transformer.patch_embed
    if learned_positions == "remove":
        del embed.pos_embedding
        embed.use_learned_positional_embeddings = False
        transformer.register_to_config(use_learned_positional_embeddings=False)
    elif learned_positions == "resize":
        # Its weights stay where they are and only its behaviour changes, as torch's `fully_shard` does it.
        embed.__class__ = _resizing()
        embed.use_positional_embeddings, embed.use_learned_positional_embeddings = True, False
    return transformer


def _resizing() -> type:
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    class ResizedTable(CogVideoXPatchEmbed):
        """Where the size is not the table's own, its positions come from the table too."""

        def _get_positional_embeddings(
            self, sample_height: int, sample_width: int, sample_frames: int, device: torch.device | None = None
        ) -> Tensor:
            own = self._grid(self.sample_frames, self.sample_height, self.sample_width)
            asked = self._grid(sample_frames, sample_height, sample_width)
            return resize_table(self.pos_embedding, self.max_text_seq_length, own, asked)

        def _grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
            latent_frames = (frames - 1) // self.temporal_compression_ratio + 1
            return latent_frames, height // self.patch_size, width // self.patch_size

    return ResizedTable


def resize_table(table_1LD: Tensor, num_text: int, own: tuple[int, int, int], asked: tuple[int, int, int]) -> Tensor:
    """A table of positions, fp32, whose video part is interpolated from its own frames, height and width to those asked
    for; the rows of the text come first and stay."""
    text_1LD, video_1LD = table_1LD.float().split([num_text, table_1LD.shape[1] - num_text], dim=1)
    grid_1DFHW = video_1LD.transpose(1, 2).unflatten(2, own)
    resized_1DFHW = torch.nn.functional.interpolate(grid_1DFHW, size=asked, mode="trilinear", align_corners=False)
    return torch.cat([text_1LD, resized_1DFHW.flatten(2).transpose(1, 2)], dim=1)
