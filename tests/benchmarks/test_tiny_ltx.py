"""The tiny model is a real one to diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LTXConditionPipeline, LTXPipeline

from benchmarks.tiny_ltx import write_tiny_ltx


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
