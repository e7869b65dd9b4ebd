"""What a run will hold in memory, phase by phase, worked out without its weights: the run's own programs on tensors
that have shapes and types but no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers import text_encoders
from finetrainers.engines.base import replace_tensors
from finetrainers.families.base import Family
from finetrainers.memory.layout import footprint, spread
from finetrainers.memory.simulation import HOST, SIMULATED, LiveBytes, Peak, simulation
from finetrainers.methods.base import Method
from finetrainers.optimizers.size import StateBytes, state_bytes
from finetrainers.text_batches import TEXTS_AT_ONCE
from finetrainers.training.measures import lower_precision, save_activations
from finetrainers.training.simulated import blank_batch, meta_models, one_expert, simulated_models
from finetrainers.training.timeline import Segment, Stretch, Timeline, stretched
from finetrainers.types import Batch, Bucket, Condition


@dataclass(frozen=True)
class Phase:
    """Bytes on the device in one phase of a run, at its height."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    """All else that lives at that time; None where the phase cannot be run without data."""
    peak: int
    """The most at one time: not all gradients are there when activations are at their height."""
    host: int = 0
    """Bytes that wait in the host's memory."""


@dataclass(frozen=True)
class Work:
    """What a run does that decides its memory."""

    method: Method
    bucket: Bucket
    """The largest."""
    condition: Condition
    batch_size: int
    sampled: Bucket | None
    """Size of the sample videos; None makes none."""
    validates: bool
    """Whether a loss on held-out clips is measured."""


def encoding_phases(work: Work, *, memory: Any) -> list[Phase]:
    """Captions and clips, each with its encoder alone on the device; `memory` is that section of the config."""
    family, dtype = work.method.family, work.method.dtype
    phases = []
    if not work.method.trains_text_encoder:
        phases.append(_text_phase(family, dtype, memory))
    with _simulated_encoders(family.load_video_encoders, dtype) as encoders:
        size = (work.bucket.num_frames, 3, work.bucket.height, work.bucket.width)
        peak = _peak_without_gradient(lambda: family.encode_video(encoders, torch.zeros(size, dtype=torch.uint8)))
        phases.append(_phase("encode video", _bytes_of(_networks(encoders)), peak))
    return phases


def _text_phase(family: Family, dtype: torch.dtype, memory: Any) -> Phase:
    tokenizers = family.load_tokenizers()
    with _simulated_encoders(family.load_text_encoders, dtype) as encoders:
        if memory.text_encoder_weights:
            text_encoders.lower_precision(family, encoders, memory.text_encoder_weights, device=SIMULATED)
        weights = host = 0
        for name, encoder in encoders.items():
            layers = text_encoders.streamed_layers(family, name, encoder) if memory.stream_text_encoder else []
            size = footprint(encoder, layers)
            weights, host = weights + size.resident + size.ring, host + size.host
        if family.text_sees_image:
            # Where it puts the image depends on the tokens.
            return Phase("encode text", weights, 0, 0, None, weights, host)
        tokens = family.tokenize(tokenizers, [""] * TEXTS_AT_ONCE)
        height = _peak_without_gradient(lambda: family.embed(encoders, tokens))
        return _phase("encode text", weights, height, host=host)


@dataclass(frozen=True)
class Step:
    """What a step holds, with the measures that change what it computes; what only moves weights and states elsewhere
    is reckoned from it."""

    models: Mapping[str, nn.Module]
    """On the meta device."""
    method: Method
    height: Peak


def simulate_step(work: Work, *, checkpointing: str, memory: Any, release: bool) -> Step:
    """Run a step on simulated tensors, of as few blocks as tell what all of them hold; `memory` is that section of the
    config, and with `release` each gradient is let go as soon as it is there."""
    method, models = meta_models(work.method)
    lower_precision(method, models, memory.base_weights, device=torch.device("meta"))
    transformer = next(model for name, model in models.items() if name.startswith("transformer"))
    period = int(checkpointing.partition("-")[2] or 1)
    lists = {name: Stretch(len(getattr(transformer, name)), period) for name in method.family.block_lists}
    run = partial(_segments, work, checkpointing=checkpointing, memory=memory, release=release)
    height = stretched(run({name: each.kept for name, each in lists.items()}), lists)
    # Where blocks differ from each other, all of them are run.
    height = height or stretched(run({}), {})
    assert height is not None
    return Step(models, method, height)


def _segments(
    work: Work, most_blocks: Mapping[str, int], *, checkpointing: str, memory: Any, release: bool
) -> list[Segment]:
    """A step with only so many blocks of each list."""
    with simulated_models(work.method, most_blocks=most_blocks) as (method, models):
        lower_precision(method, models, memory.base_weights, device=SIMULATED)
        save_activations(method, models, checkpointing=checkpointing, offload=memory.offload_activations, host=HOST)
        for parameter in method.trained(models).values() if release else ():
            parameter.register_post_accumulate_grad_hook(_drop)
        batch = blank_batch(method, work.bucket, work.condition, batch_size=work.batch_size)
        return _watched(method, models, batch)


def _watched(method: Method, models: Mapping[str, nn.Module], batch: Batch) -> list[Segment]:
    transformers = [model for name, model in models.items() if name.startswith("transformer")]
    timeline = Timeline([(name, getattr(model, name)) for model in transformers for name in method.family.block_lists])
    timeline.watch(lambda: method.loss(one_expert(models), batch))
    return timeline.segments


def training_phases(
    step: Step,
    validation: int | None,
    *,
    memory: Any,
    optimizer: Any,
    shards: int = 1,
    keeps: bool = False,
    records: bool = False,
) -> list[Phase]:
    """A step, a validation where there is one, and a checkpoint; `memory` and `optimizer` are those sections of the
    config. Each of `shards` processes holds its part of weights, gradients and optimizer state. Where a step `keeps`
    gradients, they are there when a pass begins, and it was simulated with those of a pass let go. Where it `records`
    passes, their memory stays theirs between steps."""
    weights = _weights(step, memory)
    trained = step.method.trained(step.models).values()
    here = [parameter for parameter in trained if id(parameter) not in weights.streamed]
    there = [parameter for parameter in trained if id(parameter) in weights.streamed]
    # Applied in the backward pass, gradients are never there together.
    gradients = 0 if optimizer.in_backward else sum(parameter.nbytes for parameter in here) // shards
    state, away = (_state(parameters, optimizer) for parameters in (here, there))
    kept = state.device // shards
    # Gradients of streamed blocks leave as they come, and those that stay are added to what is then there.
    height = max(step.height.peak + (gradients if there or keeps else 0), gradients) + state.update
    # Before the backward pass has made gradients, or after: whichever is more.
    activations = max(height - gradients, step.height.after_forward)
    host = weights.host + state.host + away.device + away.host
    # Copies of weights are whole on each; where those are shared out they are made, and let go, as a layer runs.
    device = weights.device // shards + step.method.copied_bytes(step.models)
    phases = [Phase("train", device, gradients, kept, activations, device + kept + height, host)]
    stays = height if records else 0
    if validation is not None:
        phases.append(_phase("validate", device, stays + validation, optimizer=kept, host=host))
    return [*phases, _phase("save", device, stays, optimizer=kept, host=host)]


def _state(parameters: Sequence[nn.Parameter], optimizer: Any) -> StateBytes:
    return state_bytes(
        optimizer.name,
        [tuple(parameter.shape) for parameter in parameters],
        offload=optimizer.offload,
        bf16_weights=any(parameter.dtype == torch.bfloat16 for parameter in parameters),
    )


@dataclass(frozen=True)
class _Weights:
    """Bytes of the weights, and which parameters lie on the host and move from there."""

    device: int
    host: int
    streamed: frozenset[int]


def _weights(step: Step, memory: Any) -> _Weights:
    if not memory.stream_blocks:
        return _Weights(_bytes_of(step.models.values()), 0, frozenset())
    trained_too = not step.method.saves_trained_only
    device = host = 0
    streamed: set[int] = set()
    for name, model in step.models.items():
        every = step.method.family.blocks(name, model) if name.startswith("transformer") else []
        blocks = spread(every, len(every) if memory.stream_blocks == "all" else memory.stream_blocks) if every else []
        size = footprint(model, blocks, trained_too=trained_too)
        device, host = device + size.resident + size.ring, host + size.host
        if trained_too:
            streamed |= {id(parameter) for block in blocks for parameter in block.parameters()}
    return _Weights(device, host, frozenset(streamed))


def _phase(name: str, weights: int, height: int, *, optimizer: int = 0, host: int = 0) -> Phase:
    return Phase(name, weights, 0, optimizer, height, weights + optimizer + height, host)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True)
class _Decoder:
    """What makes sample videos of latents, in bytes."""

    weights: int
    activations: int


def _decoder(family: Family, bucket: Bucket, dtype: torch.dtype) -> _Decoder:
    with _simulated_encoders(family.load_video_encoders, dtype) as encoders:
        vae = encoders["vae"]
        latents = torch.zeros(1, family.latent_channels, *family.latent_shape(bucket), dtype=vae.dtype)
        # Later LTX-Video VAEs are told how much noise is left.
        timestep = (torch.zeros(1),) if getattr(vae.config, "timestep_conditioning", False) else ()
        return _Decoder(_bytes_of(_networks(encoders)), _peak_without_gradient(lambda: vae.decode(latents, *timestep)))


def simulate_validation(work: Work, *, memory: Any) -> int | None:
    """The most that a validation holds beyond what training does: a pass for the held-out loss, or sampling, whose
    transformer and decoder work one after the other; None where there is neither."""
    decoder = None if work.sampled is None else _decoder(work.method.family, work.sampled, work.method.dtype)
    heights = []
    with simulated_models(work.method) as (method, models):
        lower_precision(method, models, memory.base_weights, device=SIMULATED)
        for model in models.values():
            model.eval()
        if work.validates:
            batch = blank_batch(method, work.bucket, work.condition)
            heights.append(_peak_without_gradient(lambda: method.loss(one_expert(models), batch)))
        if decoder is not None and work.sampled is not None:
            # With and without the prompt, for guidance.
            both = blank_batch(method, work.sampled, work.condition, batch_size=2)
            passing = _peak_without_gradient(lambda: method.loss(one_expert(models), both))
            heights.append(decoder.weights + max(passing, decoder.activations))
    return max(heights, default=None)


@contextmanager
def _simulated_encoders(load: Callable[..., dict[str, Any]], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """What a family loads to encode, without memory."""
    encoders = load(torch.device("meta"), dtype)
    with simulation():
        for network in _networks(encoders):
            # Unlike `to_empty`, this leaves what stands in two places, such as embeddings, one tensor.
            replace_tensors(network, partial(torch.empty_like, device=SIMULATED))
        yield encoders


def _networks(encoders: Mapping[str, Any]) -> list[nn.Module]:
    return [part for part in encoders.values() if isinstance(part, nn.Module)]


@torch.no_grad()
def _peak_without_gradient(run: Callable[[], Any]) -> int:
    live = LiveBytes()
    with live.counted():
        run()
    return live.peak


def _bytes_of(models: Iterable[nn.Module]) -> int:
    """Parameters and buffers, each once."""
    tensors = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
