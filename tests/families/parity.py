"""What a pipeline hands to its transformer, what training hands to it, and a transformer that knows the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetrainers.families.base import Family, SamplingOptions
from finetrainers.latents import draw_latents
from finetrainers.types import Bucket, Condition
from tests.families.rows import Row

CPU = torch.device("cpu")
PROMPT = "a red circle moves, and stops"
CALL_OF_THEIR_OWN = ("attention_kwargs", "return_dict")
"""Arguments that carry no input."""


@contextmanager
def means_for_draws() -> Iterator[None]:
    """Pipelines draw the latents of given frames from their posterior; the draw is random, so both sides take the
    mean."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    drawn = DiagonalGaussianDistribution.sample
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mean
    try:
        yield
    finally:
        DiagonalGaussianDistribution.sample = drawn


def rates(*fps: float) -> Tensor:
    """Frames per second of a batch's samples."""
    return torch.tensor(fps, dtype=torch.float64)


def random_clip(bucket: Bucket, *, seed: int = 0) -> Tensor:
    """Pixels, uint8 FCHW."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (bucket.num_frames, 3, bucket.height, bucket.width), dtype=torch.uint8, generator=generator
    )


def images_of(video_FCHW: Tensor, condition: Condition) -> dict[str, Any]:
    """The given frames of a clip as `Family.render` takes them."""
    frames = [Image.fromarray(frame) for frame in video_FCHW.permute(0, 2, 3, 1).numpy()]
    if condition.is_none:
        return {}
    first = frames[0] if condition.num_first == 1 else frames[: condition.num_first]
    return {"image": first} | ({"last_image": frames[-1]} if condition.num_last else {})


def inputs_of(
    family: Family, video_FCHW: Tensor, condition: Condition, *, prompt: str = PROMPT
) -> tuple[Tensor, dict[str, Any]]:
    """A clip's clean latents, BCFHW, and the rest of what `predict` takes, as training has them in the cache."""
    encoders = family.load_video_encoders(CPU, torch.float32)
    latents = draw_latents(family.encode_video(encoders, video_FCHW), None)
    encoded = {}
    if family.needs_encoding(condition):
        encoded = family.encode_condition(encoders, video_FCHW, condition, torch.Generator().manual_seed(0))
    given = family.given(condition, latents, encoded, None)
    shown = [video_FCHW[0]] if family.text_sees_image else None
    tokens = family.tokenize(family.load_tokenizers(), [prompt], shown)
    with torch.no_grad():
        text = family.embed(family.load_text_encoders(CPU, torch.float32), tokens)
    return latents[None], {"text": text, "given": {name: tensor[None] for name, tensor in given.items()}}


def recorded(pipeline: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every later call of a pipeline's transformers: which one, and its arguments."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append((name, kwargs))

    for name, transformer in transformers_of(pipeline).items():
        transformer.register_forward_pre_hook(record(name), with_kwargs=True)
    return calls


def transformers_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    named = {name: getattr(pipeline, name, None) for name in ("transformer", "transformer_2")}
    return {name: module for name, module in named.items() if module is not None}


def compare_calls(row: Row, folder: Path, condition: Condition, *, fps: float, prompt: str) -> None:
    """Assert that training calls the transformer as the pipeline does, at each of the pipeline's steps."""
    family, bucket = row.open(folder), Bucket.parse(row.bucket)
    video = random_clip(bucket)
    pipeline = family.load_pipeline(torch.float32)
    assert type(pipeline).__name__ == row.pipeline
    pipeline.set_progress_bar_config(disable=True)
    calls = recorded(pipeline)
    options = SamplingOptions(4, 1.0, fps, seed=3)
    with means_for_draws():
        family.render(
            pipeline, bucket, options, **images_of(video, condition), prompt=prompt, negative_prompt="", **row.call
        )
    theirs = list(calls)
    assert len(theirs) == 4
    _, inputs = inputs_of(family, video, condition, prompt=prompt)
    for name, call in theirs:
        noisy = row.noisy(call, family.latent_shape(bucket)).float()
        timestep = row.timestep(call).amax().expand(1)
        with torch.no_grad():
            family.predict(transformers_of(pipeline), noisy, timestep, fps_B=rates(fps), **inputs)
        assert calls[-1][0] == name, "the expert that the pipeline asks"
        assert_same(calls[-1][1], call)


def assert_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """The same arguments, of the same types and values."""
    meant = {name: value for name, value in theirs.items() if name not in CALL_OF_THEIR_OWN and value is not None}
    assert meant.keys() == {name for name, value in ours.items() if name != "return_dict" and value is not None}
    for name, value in meant.items():
        # Two copies of the same weights differ in the last bits: CPU kernels round by memory alignment.
        said = f"{name}: {{}}".format
        our = ours[name]
        if isinstance(value, tuple) and isinstance(value[0], float):
            # A number for all samples, where we have one for each.
            our, value = (tuple(map(float, parts)) for parts in (our, value))
        torch.testing.assert_close(our, value, rtol=1e-5, atol=3e-5, msg=said)


class Oracle(torch.nn.Module):
    """Stands for a transformer: it knows the clean latents and answers with the ideal prediction for the noisy input
    that it is given."""

    dtype = torch.float32

    def __init__(self, row: Row, latents_BCFHW: Tensor, alphas_cumprod: Tensor | None, config: Any) -> None:
        super().__init__()
        self.row, self.clean, self.alphas_cumprod, self.config = row, latents_BCFHW, alphas_cumprod, config

    def forward(self, **call: Any) -> tuple[Tensor]:
        noisy = self.row.noisy(call, tuple(self.clean.shape[2:]))
        timestep = self.row.timestep(call).reshape(len(noisy), -1).amax(1).view(-1, 1, 1, 1, 1)
        if self.alphas_cumprod is None:
            ideal = (noisy - self.clean) / (timestep / 1000)
        else:
            kept = self.alphas_cumprod[timestep.long()]
            noise = (noisy - kept.sqrt() * self.clean) / (1 - kept).sqrt()
            ideal = kept.sqrt() * noise - (1 - kept).sqrt() * self.clean
        return (self.row.answer(ideal.float(), call),)
