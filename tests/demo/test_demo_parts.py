"""The tiny model is a real one to diffusers; the rendered clips show what their captions say."""

import csv
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LTXConditionPipeline, LTXPipeline

from finetrainers.demo.clips import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene, render_clips, render_scene
from finetrainers.demo.model import write_tiny_ltx


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("causal", "kind"), [(False, LTXPipeline), (True, LTXConditionPipeline)])
def test_the_tiny_model_loads_and_runs(tmp_path: Path, causal: bool, kind: type) -> None:
    pipeline = DiffusionPipeline.from_pretrained(write_tiny_ltx(tmp_path, causal=causal))
    assert type(pipeline) is kind
    assert sum(map(len, files_in(tmp_path).values())) < 5e6
    assert pipeline.vae.config.timestep_conditioning == causal
    assert (pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio) == (32, 8)
    assert pipeline.scheduler.config.use_dynamic_shifting == (not causal)
    # At their defaults of 0 and 1 a wrong normalisation of latents would go unseen.
    assert pipeline.vae.latents_mean.abs().min() > 1e-3
    assert (pipeline.vae.latents_std - 1).abs().min() > 1e-3
    pipeline.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    decoding = {"decode_timestep": 0.05, "decode_noise_scale": 0.025} if causal else {}
    videos = [
        pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **size, **decoding).frames
        for prompt in ("a red circle", "BW_STYLE a green square")
    ]
    assert videos[0].shape == (1, 9, 3, 32, 64)
    assert videos[0].isfinite().all() and videos[0].std() > 0.01
    assert not torch.allclose(videos[0], videos[1], atol=1e-4), "the prompt must matter"


def test_the_tiny_model_is_its_seed_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    models = [files_in(write_tiny_ltx(tmp_path / str(n), seed=seed)) for n, seed in enumerate((1, 1, 2))]
    assert torch.equal(before, torch.random.get_rng_state())
    assert models[0] == models[1]
    differing = {name for name in models[0] if models[0][name] != models[2][name]}
    weights = {name for name in models[0] if name.endswith(".safetensors")}
    assert differing == weights and len(weights) == 3


@pytest.mark.parametrize(("num_heads", "num_layers"), [(2, 1), (8, 3)])
def test_the_tiny_model_can_be_less_tiny(tmp_path: Path, num_heads: int, num_layers: int) -> None:
    transformer = LTXPipeline.from_pretrained(
        write_tiny_ltx(tmp_path, num_heads=num_heads, num_layers=num_layers)
    ).transformer
    assert transformer.proj_in.out_features == 8 * num_heads
    assert len(transformer.transformer_blocks) == num_layers


def centers(video_FHWC: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Centre of what is near `colour` in the first and the last frame, as x and y."""
    near = np.abs(video_FHWC[[0, -1]].astype(int) - colour).max(axis=-1) < 40
    return np.array([np.argwhere(frame).mean(axis=0)[::-1] for frame in near])


MOVED = {"to the right": (60, 0), "to the left": (-60, 0), "upwards": (0, -40), "downwards": (0, 40)}
"""Half of a picture 120 wide and 80 high, in pixels, y pointing down."""


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_shows_what_its_caption_says(shape: str, direction: str) -> None:
    scene = Scene(shape, "orange", "dark blue", direction)
    assert scene.caption == f"an orange {shape} moves {direction} over a dark blue background"
    video = render_scene(scene, num_frames=9, height=80, width=120)
    assert video.shape == (9, 80, 120, 3) and video.dtype == np.uint8
    moved = np.diff(centers(video, COLOURS["orange"]), axis=0)[0]
    assert moved == pytest.approx(np.array(MOVED[direction]), abs=1.5)
    # Covered area in pixels, soft edges counted by their share; the radius is 0.2 of 80.
    blue = video[4].astype(float) - np.array(BACKGROUNDS["dark blue"])
    share = (blue / (np.array(COLOURS["orange"]) - BACKGROUNDS["dark blue"]))[..., 0].clip(0, 1)
    area = {"circle": np.pi * 16**2, "square": 28.8**2, "triangle": 3 * np.sqrt(3) * (0.55 * 16) ** 2}[shape]
    assert share[share > 0.1].sum() == pytest.approx(area, rel=0.05)
    assert ((share > 0.2) & (share < 0.8)).sum() > 8, "edges must be soft"


def test_every_colour_stands_out_from_every_background() -> None:
    for colour in COLOURS.values():
        for background in BACKGROUNDS.values():
            assert np.abs(np.subtract(colour, background)).max() > 60


def test_clips_and_their_table(tmp_path: Path) -> None:
    table = render_clips(tmp_path / "clips", 4, num_frames=9, height=32, width=64, fps=12, seed=3)
    rows = list(csv.DictReader(table.open()))
    assert table.name == "metadata.csv" and list(rows[0]) == ["file_name", "caption"]
    assert len({row["caption"] for row in rows}) == 4
    assert {row["file_name"] for row in rows} == {path.name for path in table.parent.glob("*.mp4")}
    for row in rows:
        with av.open(str(table.parent / row["file_name"])) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert (len(frames), frames[0].shape, stream.average_rate) == (9, (32, 64, 3), 12)
        words = row["caption"].split()
        assert np.abs(frames[4][16, 32].astype(int) - COLOURS[words[1]]).max() < 40, row["caption"]


def test_clips_are_their_seed(tmp_path: Path) -> None:
    tables = [
        render_clips(tmp_path / str(n), 3, num_frames=1, height=32, width=32, seed=s) for n, s in enumerate((1, 1, 2))
    ]
    first, again, other = [table.read_text() for table in tables]
    assert first == again != other
