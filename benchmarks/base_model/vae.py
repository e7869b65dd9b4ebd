"""Trains the VAE of the bundled model on rendered clips, and writes it as a diffusers folder.

    python -m benchmarks.base_model.vae --output vae
    python -m benchmarks.base_model.vae --decoder-of vae --output vae-sharper --steps 1000 --lr 1e-3 --seed 1

The second command trains the decoder of the first one's VAE alone, whose latents stay what they are.

Of its clips, unlike those of the transformer, a third are outlines of some width and glow, so that it can show styles
which the transformer has never seen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from benchmarks.machine import describe_machine
from finetrainers.demo.bundled import HEIGHT, NUM_FRAMES, WIDTH
from finetrainers.demo.clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Course, Scene, flat, neon, render_scene

# Shape suffixes: B batch, C channels, F frames, H height, W width.
SIZE = {"num_frames": NUM_FRAMES, "height": HEIGHT, "width": WIDTH}
LATENT_CHANNELS = 24
KL_WEIGHT = 3e-4
"""Of nats for each number of a latent, beside the mean absolute and squared error of a pixel in -1..1."""


class Muon(torch.optim.Optimizer):
    """Orthogonal updates (Jordan et al., https://kellerjordan.github.io/posts/muon), for kernels of convolutions as
    well, which torch's takes not: each is a matrix of output channels by all the rest. After 200
    steps of four clips the error was 0.14 with it here, and 0.28 with AdamW."""

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]).flatten(1))
                # As large as AdamW's are (arXiv 2502.16982).
                size = 0.2 * math.sqrt(max(update.shape))
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton and Schulz's iteration towards the nearest orthogonal matrix, with Muon's coefficients."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def build_vae() -> AutoencoderKLLTXVideo:
    """LTX-Video's VAE with two levels of its three: 4x16x16 pixels are one latent."""
    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(24, 48),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(48, 96),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(3, 1, 0),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(True,) * 2,
        upsample_factor=(2, 2),
        timestep_conditioning=False,
        patch_size=4,
        patch_size_t=1,
    )


def draw_scene(draw: random.Random) -> Scene:
    return Scene(*(draw.choice(options) for options in (SHAPES, list(COLOURS), MOTIONS, BACKGROUNDS)))


def render_varied(draw: random.Random) -> np.ndarray:
    """A clip of one shape, uint8 FHWC: filled, or an outline of some width and glow, on black or on its background."""
    scene = draw_scene(draw)
    course = Course.draw(scene.motion, draw)
    if draw.random() < 0.7:
        return render_scene(scene, course=course, **SIZE)
    half_width, reach, strength = draw.uniform(1, 2.5), draw.uniform(1.5, 4), draw.uniform(0, 0.7)
    shown = draw.choice([0.0, 0.0, draw.uniform(0, 1)])

    def outline(distance_FHW: np.ndarray, background_HWC: np.ndarray, colour_C: np.ndarray) -> np.ndarray:
        away = np.abs(distance_FHW)[..., None]
        light = np.maximum(np.clip(half_width + 0.5 - away, 0, 1), strength * np.exp(-away / reach))
        return shown * background_HWC * (1 - light) + colour_C * light

    return render_scene(scene, course=course, style=outline, **SIZE)


def render_pool(count: int, seed: int) -> torch.Tensor:
    """Clips as uint8 [N, C, F, H, W]."""
    draw = random.Random(seed)
    pool_NCFHW = torch.empty(count, 3, *SIZE.values(), dtype=torch.uint8)
    for index in range(count):
        pool_NCFHW[index] = torch.from_numpy(render_varied(draw)).permute(3, 0, 1, 2)
    return pool_NCFHW


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 as -1..1."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def measure(vae: AutoencoderKLLTXVideo) -> dict[str, float]:
    """Peak signal to noise, in dB, of held-out clips of each style in fp32."""
    found = {}
    for style in (flat, neon):
        draw = random.Random(7)
        errors = []
        for _ in range(40):
            scene = draw_scene(draw)
            frames = render_scene(scene, course=Course.draw(scene.motion, draw), style=style, **SIZE)
            video_BCFHW = to_unit(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
            again_BCFHW = vae.decode(vae.encode(video_BCFHW).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append((again_BCFHW - video_BCFHW).square().mean().item())
        found[f"psnr_{style.__name__}"] = round(10 * math.log10(4 / float(np.mean(errors))), 2)
    return found


@torch.no_grad()
def set_statistics(vae: AutoencoderKLLTXVideo, pool_NCFHW: torch.Tensor) -> None:
    """Mean and deviation of each channel, by which latents are normalised."""
    latents_BCFHW, _ = encode_pool(vae, pool_NCFHW).chunk(2, dim=1)
    vae.latents_mean.copy_(latents_BCFHW.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(latents_BCFHW.std((0, 2, 3, 4)))


def train(
    vae: AutoencoderKLLTXVideo,
    pool_NCFHW: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    decoder_only: bool,
) -> list[dict[str, float]]:
    """Minimise error and divergence, or the error alone with latents that stay; gives what was measured on the way."""
    parameters = list((vae.decoder if decoder_only else vae).parameters())
    optimizers = [
        Muon([parameter for parameter in parameters if parameter.ndim > 1], lr=lr),
        torch.optim.AdamW(
            [parameter for parameter in parameters if parameter.ndim == 1],
            lr=lr,
            betas=(0.9, 0.98),
            weight_decay=0,
            fused=True,
        ),
    ]
    moments = encode_pool(vae, pool_NCFHW) if decoder_only else None
    draw = torch.Generator().manual_seed(seed)
    log: list[dict[str, float]] = []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pool_NCFHW), (batch_size,), generator=draw)
        video_BCFHW = to_unit(pool_NCFHW[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            if moments is None:
                posterior = vae.encode(video_BCFHW).latent_dist
            else:
                posterior = DiagonalGaussianDistribution(moments[chosen])
            again_BCFHW = vae.decode(posterior.sample(draw)).sample
        difference = again_BCFHW.float() - video_BCFHW
        error = difference.abs().mean() + difference.square().mean()
        divergence = divergence_of(posterior)
        (error if decoder_only else error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(step / 100, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            row = {"step": step, "error": error.item(), "divergence": divergence.item()}
            row["seconds"] = round(time.perf_counter() - started, 1)
            log.append({name: round(value, 5) for name, value in row.items()})
            print(json.dumps(log[-1]), flush=True)
        if step % 500 == 0:
            print(json.dumps(measure(vae)), flush=True)
    return log


def divergence_of(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """From the standard normal, nats for each number of a latent."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def encode_pool(vae: AutoencoderKLLTXVideo, pool_NCFHW: torch.Tensor) -> torch.Tensor:
    """Mean and log variance of each clip's latents, one after the other in the channels."""
    return torch.cat([vae.encode(to_unit(batch)).latent_dist.parameters for batch in pool_NCFHW.split(16)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--decoder-of", type=Path, metavar="VAE")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    decoder_only = options.decoder_of is not None
    vae = AutoencoderKLLTXVideo.from_pretrained(options.decoder_of) if decoder_only else build_vae()
    pool_NCFHW = render_pool(options.clips, options.seed)
    log = train(
        vae,
        pool_NCFHW,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        decoder_only=decoder_only,
    )
    if not decoder_only:
        set_statistics(vae, pool_NCFHW[:1024])
    vae.save_pretrained(options.output)
    found = {"machine": describe_machine(), "log": log, **measure(vae)}
    (options.output / "training.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
