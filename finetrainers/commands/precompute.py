"""`finetrainers precompute`: only the encoding."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import torch

from finetrainers.config.load import fill_defaults, resolved_buckets
from finetrainers.config.schema import RunConfig
from finetrainers.data.cache import Cache
from finetrainers.data.dataset import cache_folder, name_problems, open_dataset
from finetrainers.data.index import FileIndex
from finetrainers.encoding import EncodedDataset, Encoder, encode_dataset
from finetrainers.engines.base import Engine
from finetrainers.engines.build import build_engine
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.families.find import find_family
from finetrainers.folder import RunFolder, write_atomically
from finetrainers.memory.report import MemoryReport
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.training.progress import phase_progress
from finetrainers.training.signals import StopSignals
from finetrainers.types import Bucket

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
    prompts: list[str]
    """Of the sample videos."""
    memory: MemoryReport


def precompute(config: RunConfig) -> int:
    """Encode everything that a run of this config needs, and say where it lies."""
    with StopSignals():
        prepared = encode(config)
    num_samples = len(prepared.data.train) + len(prepared.data.held_out)
    print(f"{num_samples} samples are encoded in {prepared.cache.root}")
    return 0


def encode(config: RunConfig) -> Prepared:
    """Find the family, complete the config, look at the clips, and encode what the cache lacks."""
    engine = build_engine(config.parallel.strategy)
    family, config = complete(config)
    run = RunFolder(config.output)
    run.root.mkdir(parents=True, exist_ok=True)
    memory = MemoryReport(run.memory, engine.device)
    memory.phase("start")
    cache = Cache(cache_folder(config.data, run.cache))
    dataset = open_dataset(config.data, FileIndex(cache.root / "files.json"), phase_progress)
    encoder = Encoder(
        family, cache, engine.device, DTYPES[config.training.precision], config.data.num_workers, phase_progress
    )
    prompts = choose_prompts(config, [item.record.caption for item in dataset.held_out or dataset.train])
    data = encode_dataset(
        encoder, dataset, trigger=config.data.trigger, prompts=[*prompts, config.validation.negative_prompt]
    )
    problems = [*dataset.problems, *data.unreadable]
    name_problems(data.unreadable, total=dataset.num_clips, strict=config.data.strict)
    if not data.train:
        raise UserError(f"data.train: no clip can be decoded; {problems[-1].name} {problems[-1].reason}")
    if problems:
        logger.warning("%d of %d clips are left out, for the reasons above", len(problems), dataset.num_clips)
    rows = (json.dumps({"name": problem.name, "reason": problem.reason}) for problem in problems)
    write_atomically(run.problems, "".join(f"{row}\n" for row in rows))
    memory.phase("after encoding")
    return Prepared(config, engine, family, run, cache, encoder, data, prompts, memory)


def complete(config: RunConfig, *, weights: bool = True) -> tuple[Family, RunConfig]:
    """The family of the config's model, and the config with the family's defaults put in and its sizes checked."""
    family = find_family(
        config.model.path,
        revision=config.model.revision,
        task=config.model.task,
        vae_tiling=config.memory.vae_tiling,
        weights=weights,
    )
    config = fill_defaults(config, family.defaults(config.method.name))
    check_sizes(family, config)
    return family, config


def build_method(family: Family, config: RunConfig) -> Method:
    """The method that a whole config asks for, on its family and objective."""
    options = config.objective.model_dump()
    objective = build_objective(options.pop("timestep_sampling"), **options)
    return find_method(config.method, family, objective, dtype=DTYPES[config.training.precision])


def check_sizes(family: Family, config: RunConfig) -> None:
    """Refuse buckets that the model cannot take, saying why and which is near."""
    named = [("data.buckets", bucket) for bucket in resolved_buckets(config)]
    if config.validation.bucket:
        named.append(("validation.bucket", Bucket.parse(config.validation.bucket)))
    for key, bucket in named:
        if reason := family.check_bucket(bucket):
            raise UserError(f"{key} {bucket}: {reason}")


def choose_prompts(config: RunConfig, captions: list[str]) -> list[str]:
    """Prompts of the sample videos: the given ones, or the first captions, with the trigger before them."""
    options = config.validation
    if options.every == 0:
        return []
    if options.prompts:
        return options.prompts
    chosen = list(dict.fromkeys(captions))[: options.num_videos]
    return [" ".join(part for part in (config.data.trigger, caption) if part) for caption in chosen]
