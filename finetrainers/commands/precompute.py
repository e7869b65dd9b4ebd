"""`finetrainers precompute`: only the encoding."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetrainers.config.load import fill_defaults, resolved_buckets, resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.data.cache import Cache
from finetrainers.data.dataset import Dataset, cache_folder, name_problems, open_dataset
from finetrainers.data.index import FileIndex
from finetrainers.data.scan import Item, scan
from finetrainers.encoding import EncodedDataset, Encoder, Prompt, encode_dataset
from finetrainers.engines.base import Engine
from finetrainers.engines.build import build_engine
from finetrainers.errors import UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, Family
from finetrainers.families.find import all_families, find_family
from finetrainers.folder import RunFolder, write_atomically
from finetrainers.memory.quantized import check_format
from finetrainers.memory.report import MemoryReport
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.training.progress import phase_progress
from finetrainers.training.signals import StopSignals
from finetrainers.types import Bucket, Condition, Record

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Prepared:
    """A run whose data is encoded and whose config is whole."""

    config: RunConfig
    engine: Engine
    family: Family
    run: RunFolder
    cache: Cache
    encoder: Encoder
    data: EncodedDataset
    method: Method
    scenes: list[Prompt]
    """Of the sample videos."""
    memory: MemoryReport


def precompute(config: RunConfig) -> int:
    """Encode everything that a run of this config needs, and say where it lies."""
    with StopSignals():
        engine = build_engine(config.parallel)
        prepared = encode(config, engine)
    num_samples = len(prepared.data.train) + len(prepared.data.held_out)
    if engine.is_main:
        print(f"{num_samples} samples are encoded in {prepared.cache.root}")
    engine.close()
    return 0


def encode(config: RunConfig, engine: Engine) -> Prepared:
    """Find the family, complete the config, look at the clips, and encode what the cache lacks, on all processes."""
    family, config = complete(config)
    run = RunFolder(config.output)
    run.root.mkdir(parents=True, exist_ok=True)
    memory = MemoryReport(run.memory if engine.is_main else None, engine.device)
    memory.phase("start")
    cache = Cache(cache_folder(config.data, run.cache))
    index = FileIndex(cache.root / "files.json")
    # The others then find every clip in the index.
    with engine.main_first():
        dataset = open_dataset(config.data, index, phase_progress)
    method = build_method(family, config)
    encoder = Encoder(
        family,
        cache,
        engine,
        DTYPES[config.training.precision],
        config.data.num_workers,
        phase_progress,
        conditions=[condition for condition, _ in resolved_conditions(config)],
        tokens_only=method.trains_text_encoder,
        weights_format=config.memory.text_encoder_weights,
    )
    scenes = choose_scenes(config, family, dataset, index)
    negatives = [Prompt(config.validation.negative_prompt, scene.item) for scene in scenes]
    data = encode_dataset(encoder, dataset, trigger=config.data.trigger, prompts=[*scenes, *negatives])
    problems = [*dataset.problems, *data.unreadable]
    name_problems(data.unreadable, total=dataset.num_clips, strict=config.data.strict)
    if not data.train:
        raise UserError(f"data.train: no clip can be decoded; {problems[-1].name} {problems[-1].reason}")
    if problems:
        logger.warning("%d of %d clips are left out, for the reasons above", len(problems), dataset.num_clips)
    rows = (json.dumps({"name": problem.name, "reason": problem.reason}) for problem in problems)
    if engine.is_main:
        write_atomically(run.problems, "".join(f"{row}\n" for row in rows))
    memory.phase("after encoding")
    return Prepared(config, engine, family, run, cache, encoder, data, method, scenes, memory)


def complete(config: RunConfig, *, weights: bool = True) -> tuple[Family, RunConfig]:
    """The family of the config's model, and the config with the family's defaults put in and its sizes checked."""
    family = find_family(config.model, vae_tiling=config.memory.vae_tiling, weights=weights)
    config = fill_defaults(config, family.defaults(config.method.name))
    check_sizes(family, config)
    check_context(family, config)
    check_weights(config)
    return family, config


def build_method(family: Family, config: RunConfig) -> Method:
    """The method that a whole config asks for, on its family and objective."""
    objective = build_objective(
        config.objective, alphas_cumprod=family.alphas_cumprod(), noise_range=family.noise_range
    )
    return find_method(config.method, family, objective, dtype=DTYPES[config.training.precision])


def check_sizes(family: Family, config: RunConfig) -> None:
    """Refuse buckets that the model cannot take and conditions that it cannot be given, saying why and what is near."""
    for key, bucket, conditions in _sizes(config):
        if reason := family.check_bucket(bucket):
            raise UserError(f"{key} {bucket}: {reason}")
        for condition in conditions:
            if reason := family.check_condition(condition, bucket):
                raise UserError(f"data.conditions {condition} with {key} {bucket}: {reason}")


def check_context(family: Family, config: RunConfig) -> None:
    """Refuse to split tokens over processes where the model cannot, or where heads or tokens do not divide."""
    key, size = "parallel.context_parallel_size", config.parallel.context_parallel_size
    if size == 1:
        return
    if not family.context_plan():
        able = " and ".join(kind.name for kind in all_families() if kind.context_plan())
        raise UserError(f"{key} {size}: the tokens of {able} can be split over processes, not of {family.name}; set 1")
    heads = int(family.config("transformer")["num_attention_heads"])
    counts = {f"{heads} attention heads of the model": heads}
    for name, bucket, conditions in _sizes(config):
        for condition in conditions:
            length = family.sequence_length(bucket, condition)
            counts[f"{length:,} video tokens of {name} {bucket} with {condition} given"] = length
    if undivided := next((what for what, count in counts.items() if count % size), None):
        fitting = [str(n) for n in range(1, heads + 1) if not any(count % n for count in counts.values())]
        raise UserError(f"{key} {size} does not divide the {undivided}; with these sizes take {' or '.join(fitting)}")


def check_weights(config: RunConfig) -> None:
    """Refuse low precision for weights that move or are shared out, and a format that is not installed."""
    memory, strategy = config.memory, config.parallel.strategy
    base, text = (f"memory.{name}_weights {getattr(memory, f'{name}_weights')}" for name in ("base", "text_encoder"))
    if memory.base_weights and config.method.name == "full":
        raise UserError(f"{base} is for weights that stay as they are: take method.name lora, or leave it out")
    if memory.base_weights and strategy in ("fsdp", "deepspeed"):
        raise UserError(
            f"{base} leaves each process the whole model, and {strategy} shares it out: take parallel.strategy ddp, or "
            "leave it out"
        )
    if memory.text_encoder_weights and getattr(config.method, "text_encoder", "frozen") == "lora":
        raise UserError(
            f"{text} is for captions that are encoded once, and method.text_encoder lora embeds them in every step: "
            "leave one of them out"
        )
    check_format("memory.base_weights", memory.base_weights)
    check_format("memory.text_encoder_weights", memory.text_encoder_weights)


def _sizes(config: RunConfig) -> list[tuple[str, Bucket, list[Condition]]]:
    """Each size of clips and sample videos: the option that names it, and which frames are given."""
    named = [("data.buckets", bucket) for bucket in resolved_buckets(config)]
    if config.validation.bucket:
        named.append(("validation.bucket", Bucket.parse(config.validation.bucket)))
    conditions = [condition for condition, _ in resolved_conditions(config)]
    # A still image among clips is trained on with nothing given, where the model can.
    still = [Condition()] if Condition() in conditions else conditions
    return [(key, bucket, still if bucket.num_frames == 1 else conditions) for key, bucket in named]


def choose_scenes(config: RunConfig, family: Family, dataset: Dataset, index: FileIndex) -> list[Prompt]:
    """What the sample videos show: the given prompts, or the first captions with the trigger before them; and, where
    the model is given frames, the images that belong to the prompts, or the captions' own clips."""
    options = config.validation
    if options.every == 0:
        return []
    bucket = Bucket.parse(options.bucket) if options.bucket else resolved_buckets(config)[0]
    sees = family.task == IMAGE_TO_VIDEO
    if options.prompts and not sees:
        return [Prompt(text) for text in options.prompts]
    if options.prompts:
        return _scenes_of_images(config, bucket, index)
    items = {item.record.caption: item for item in reversed(dataset.held_out or dataset.train)}
    chosen = list(reversed(items.items()))[: options.num_videos]
    return [
        Prompt(" ".join(filter(None, (config.data.trigger, caption))), _at_size(item, bucket) if sees else None)
        for caption, item in chosen
    ]


def _scenes_of_images(config: RunConfig, bucket: Bucket, index: FileIndex) -> list[Prompt]:
    """Each of `validation.prompts` with its own of `validation.images`."""
    prompts, images = config.validation.prompts, config.validation.images
    if len(images) != len(prompts):
        raise UserError(
            f"validation.images must name one image or clip for each of the {len(prompts)} validation.prompts, because "
            f"the model animates one, but it names {len(images)}"
        )
    records = [Record(path, Path(path).expanduser(), text) for path, text in zip(images, prompts, strict=True)]
    buckets = [bucket, Bucket(1, bucket.height, bucket.width)]
    items, problems = scan(records, index, buckets=buckets, fps=config.data.fps, window="first")
    if problems:
        raise UserError(f"validation.images {problems[0].name} {problems[0].reason}")
    return [Prompt(text, _at_size(item, bucket)) for text, item in zip(prompts, items, strict=True)]


def _at_size(item: Item, bucket: Bucket) -> Item:
    """The item at the height and width of the sample videos."""
    return replace(item, bucket=Bucket(item.window.num_frames, bucket.height, bucket.width))
