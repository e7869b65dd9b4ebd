"""`finetrainers precompute`: only the encoding."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from finetrainers.commands.completing import DTYPES, build_method
from finetrainers.commands.opening import open_run
from finetrainers.config.load import resolved_buckets, resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.data.cache import Cache
from finetrainers.data.dataset import Dataset, cache_folder, name_problems, open_dataset
from finetrainers.data.index import FileIndex
from finetrainers.data.scan import Item, scan
from finetrainers.encoding import EncodedDataset, Encoder, Prompt, encode_dataset
from finetrainers.engines.base import Engine
from finetrainers.errors import UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, Family
from finetrainers.folder import RunFolder, write_atomically
from finetrainers.memory.report import MemoryReport
from finetrainers.methods.base import Method
from finetrainers.training.progress import phase_progress
from finetrainers.training.signals import StopSignals
from finetrainers.types import Bucket, Record

logger = logging.getLogger(__name__)


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
        family, config, engine = open_run(config, trains=False)
        prepared = encode(family, config, engine)
    num_samples = len(prepared.data.train) + len(prepared.data.held_out)
    if engine.is_main:
        print(f"{num_samples} samples are encoded in {prepared.cache.root}")
    engine.close()
    return 0


def encode(family: Family, config: RunConfig, engine: Engine) -> Prepared:
    """Look at the clips, and encode what the cache lacks, on all processes; the config is whole."""
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
        stream_text_encoder=config.memory.stream_text_encoder,
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
